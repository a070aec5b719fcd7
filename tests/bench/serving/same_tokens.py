"""Whether readers generate the tokens that transformers does, from what was exported for them.

    python -m tests.bench.serving.same_tokens FOLDER [--steps 64] [--converter SCRIPT]

``FOLDER`` is a pruned causal language model with its tokenizer, ``SCRIPT`` a
``convert_hf_to_gguf.py`` with its repository around it. Tried is what can be imported here:
llama.cpp (``llama_cpp``) from our own GGUF and, with ``--converter``, from what llama.cpp's own
script makes of the DeciLM folder, its vocabulary filled up to Llama 3's size, and of the padded
one; mlx-lm from the DeciLM folder; ONNX Runtime and OpenVINO with a
cache. All in float32, greedy. Prints how many tokens agree before the first that does not, and the
seconds of the process that the export took.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

import sosp_hub
from sosp_hub.errors import CheckpointError
from sosp_hub.recipe.targets import make_target

PROMPT = "The state of our union"
LLAMA_3 = 128_256  # entries of its vocabulary


def by_transformers(folder, tokens, steps):
    model = sosp_hub.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model.generate(
            torch.tensor([tokens]), max_new_tokens=steps, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return found[0, len(tokens) :].tolist()


def by_llama_cpp(path, tokens, steps):
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=len(tokens) + steps, verbose=False, n_threads=1, n_threads_batch=1,
        flash_attn=False, type_k=0, type_v=0,
    )  # fmt: skip
    found = model.generate(tokens, temp=0.0, repeat_penalty=1.0, top_k=1)
    return [token for _, token in zip(range(steps), found, strict=False)]


def by_mlx(folder, tokens, steps):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    found, seen = [], list(tokens)
    for _ in range(steps):
        logits = model(mx.array([seen]))
        found.append(int(mx.argmax(logits[0, -1]).item()))
        seen.append(found[-1])
    return found


def by_steps(run, past, tokens, steps):
    new = seen = np.array([tokens])
    found = []
    for _ in range(steps):
        logits, *present = run({"input_ids": new, "attention_mask": np.ones_like(seen), **past})
        new = logits[:, -1:].argmax(-1)
        seen = np.concatenate([seen, new], 1)
        past = dict(zip(past, present, strict=True))
        found.append(new.item())
    return found


def by_onnxruntime(path, tokens, steps):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    past = {
        each.name: np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32)
        for each in session.get_inputs()[2:]
    }
    return by_steps(lambda inputs: session.run(None, inputs), past, tokens, steps)


def by_openvino(path, tokens, steps):
    import openvino

    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    past = {}
    for each in compiled.inputs[2:]:
        _, heads, _, size = each.get_partial_shape()
        past[each.any_name] = np.zeros([1, heads.get_length(), 0, size.get_length()], np.float32)
    return by_steps(lambda inputs: list(compiled(inputs).values()), past, tokens, steps)


def converted(script, folder, path):
    """A folder as llama.cpp's own script converts it, unmodified."""
    command = [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def with_vocabulary(folder, size):
    """The model with rows of zeros for tokens up to ``size``, which no text has.

    For DeciLM llama.cpp's script reads a byte-level BPE only where it has Llama 3's size.
    """
    model = sosp_hub.from_pretrained(folder, dtype=torch.float32)
    had = model.config.vocab_size
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[had:] = 0
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--converter", type=Path)
    parser.add_argument("--only", nargs="+")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    tokens = tokenizer(PROMPT)["input_ids"]
    expected = by_transformers(args.folder, tokens, args.steps)
    print("transformers:", repr(tokenizer.decode(expected))[:100], flush=True)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)

        def show(name, package, target, options, run):
            if args.only and name not in args.only:
                return
            if importlib.util.find_spec(package) is None:
                print(f"{name}: {package} is not installed", flush=True)
                return
            out = place / f"{name}{make_target(target, CheckpointError).suffix}"
            start = time.process_time()
            sosp_hub.export(options.pop("model", args.folder), target, out, **options)
            seconds = time.process_time() - start
            found = run(out, tokens, args.steps)
            pairs = zip(found, expected, strict=True)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), args.steps)
            print(f"{name}: {same} of {args.steps} tokens, export {seconds:.0f} s", flush=True)
            shutil.rmtree(out) if out.is_dir() else out.unlink()

        show("llama.cpp", "llama_cpp", "gguf", {}, by_llama_cpp)
        if args.converter:

            def by_converter(folder, *rest):
                script, path = args.converter.resolve(), place / "converted.gguf"
                return by_llama_cpp(converted(script, folder, path), *rest)

            filled = with_vocabulary(args.folder, LLAMA_3)
            options = {"model": filled, "tokenizer": tokenizer}
            show("converter, DeciLM", "llama_cpp", "deci", options, by_converter)
            show("converter, padded", "llama_cpp", "padded", {}, by_converter)
        show("mlx-lm", "mlx_lm", "deci", {}, by_mlx)
        show("onnxruntime", "onnxruntime", "onnx", {"cache": True}, by_onnxruntime)
        show("openvino", "openvino", "openvino", {"cache": True}, by_openvino)


if __name__ == "__main__":
    main()
