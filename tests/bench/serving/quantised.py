"""Perplexity and bytes of quantised models: a pruned one beside a dense one.

    python -m tests.bench.serving.quantised DENSE PRUNED TEXT_FOLDER [--num-test 16]

Matrices are quantised by ``gguf`` as our GGUF files hold them and computed in float32. Of the
texts (``*.txt``) every fifth file is read, which `prepare` leaves out. Prints one line for each
model and type.
"""

import argparse
from pathlib import Path

import gguf
import torch
from transformers import AutoTokenizer

import sosp_hub
from tests.bench.rebuild import perplexity, windows

KINDS = ("F16", "Q8_0", "Q5_0", "Q4_0")


def quantised_(model, kind):
    """Rounds every matrix in place; the bytes of the file."""
    kind, size, seen = gguf.GGMLQuantizationType[kind], 0, set()
    for tensor in model.parameters():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        used = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        block, _ = gguf.GGML_QUANT_SIZES[used]
        used = gguf.GGMLQuantizationType.F16 if tensor.shape[-1] % block else used
        packed = gguf.quants.quantize(tensor.detach().numpy(), used)
        size += packed.nbytes
        tensor.data = torch.from_numpy(gguf.quants.dequantize(packed, used).copy())
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("dense", "pruned", "texts"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--num-test", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    tokenizer.model_max_length = 10**9
    files = sorted(args.texts.glob("*.txt"))[::5]
    texts = [path.read_text("utf8", "ignore") for path in files]
    tokens = windows(tokenizer, texts, args.num_test, 128, 1)
    for name in ("dense", "pruned"):
        for kind in KINDS:
            model = sosp_hub.from_pretrained(getattr(args, name), dtype=torch.float32)
            size = quantised_(model, kind)
            print(
                f"{name} {kind}: {size / 1e6:.0f} MB, {perplexity(model, tokens):.2f}", flush=True
            )


if __name__ == "__main__":
    main()
