"""Whether vLLM and SGLang serve a pruned model as transformers computes it; needs a GPU and them.

    python -m tests.bench.serving.engines FOLDER --engine vllm [--tensor-parallel 2]
    python -m tests.bench.serving.engines FOLDER --engine sglang

``FOLDER`` is a pruned causal language model with its tokenizer, of the families that DeciLM is
written for. Served are the DeciLM folder that is exported from it and, by vLLM, the folder itself
through the plugin and the transformers backend. Prints for each how many greedy tokens agree with
transformers in float32 before the first that does not, and tokens a second. In bfloat16 equally
likely tokens may change places, so the engines compute in float32 here. It was not run by the
project itself, for want of a GPU.
"""

import argparse
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

import sosp_hub
from tests.bench.serving.same_tokens import by_transformers

PROMPTS = ["The state of our union", "Once upon a time", "def add(a, b):", "1, 2, 3, 4,"]


def by_vllm(folder, tokens, steps, size, **options):
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), dtype="float32", tensor_parallel_size=size, enforce_eager=True, **options
    )
    ask = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    start = time.perf_counter()
    given = engine.generate([{"prompt_token_ids": each} for each in tokens], ask)
    return [list(each.outputs[0].token_ids) for each in given], time.perf_counter() - start


def by_sglang(folder, tokens, steps, size, **options):
    import sglang

    engine = sglang.Engine(model_path=str(folder), dtype="float32", tp_size=size, **options)
    ask = {"temperature": 0.0, "max_new_tokens": steps, "ignore_eos": True}
    start = time.perf_counter()
    given = engine.generate(input_ids=tokens, sampling_params=ask)
    seconds = time.perf_counter() - start
    engine.shutdown()
    return [each["output_ids"] for each in given], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=["vllm", "sglang"], required=True)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [by_transformers(args.folder, each, args.steps) for each in tokens]
    run = by_vllm if args.engine == "vllm" else by_sglang
    with tempfile.TemporaryDirectory() as place:
        deci = sosp_hub.export(
            args.folder, "deci", Path(place) / "deci", tensor_parallel=args.tensor_parallel
        )
        served = {"DeciLM folder": (deci, {"trust_remote_code": True})}
        if args.engine == "vllm":
            served["folder, through the plugin"] = (args.folder, {"model_impl": "transformers"})
        for name, (folder, options) in served.items():
            found, seconds = run(folder, tokens, args.steps, args.tensor_parallel, **options)
            same = [
                next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), args.steps)
                for x, y in zip(found, expected, strict=True)
            ]
            speed = len(tokens) * args.steps / seconds
            print(f"{args.engine}, {name}: {same} of {args.steps} tokens, {speed:.0f} a second")


if __name__ == "__main__":
    main()
