"""How long a pruned checkpoint takes to load, against a dense one of as many bytes; and imports.

Run: ``python tests/bench/load.py [MB]``. Prints CPU seconds, and the ratio of pairs taken in turn.

Measured with 104 MB of float32 (a Llama of 12 unequal layers, one thread, beside other jobs on two
cores; 2026-11-22, e5487a3), median ratio of three runs of 9, 30 and 30 pairs:
`AutoModelForCausalLM` 1.04, 1.09, 1.07; `sosp_hub.from_pretrained` 1.07, 1.08, 1.10 (of the least
times 1.11, 1.14, 1.10). That is 3 to 5 ms more, of which reading the headers, parsing the delta and
applying it take 1.3 ms.
`timm.create_model` of a ViT-B with half of its neurons: 0.37, as no random numbers are drawn first.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import timm
import torch
import transformers

import sosp_hub

_PAIRS = 9
_IMPORTS = 3
_LAYERS = 12


def main() -> None:
    """Prints two tables: loading, and importing."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0
    with tempfile.TemporaryDirectory() as folder:
        _compare_loads(Path(folder), size)
        _compare_timm(Path(folder))
    _compare_imports()


def _compare_loads(root: Path, size_mb: float) -> None:
    """A model whose layers all differ, and one whose layers have their mean width."""
    hidden = 512
    width = max(64, int((size_mb * 1e6 / 4 / _LAYERS - 4 * hidden**2) / (3 * hidden)) // 16 * 16)
    widths = [width + 16 * (i - _LAYERS // 2) for i in range(_LAYERS)]
    widths[0] += _LAYERS * width - sum(widths)  # as many weights in all
    small = _llama(hidden, max(widths))
    for layer, kept in zip(small.model.layers, widths, strict=True):
        _cut(layer.mlp, kept)
    sosp_hub.save_pretrained(small, root / "pruned")
    _llama(hidden, width).save_pretrained(root / "dense")
    sizes = {each.name: _bytes(each) for each in (root / "dense", root / "pruned")}
    print(f"bytes: {sizes}, ratio {sizes['pruned'] / sizes['dense']:.4f}")
    auto = transformers.AutoModelForCausalLM.from_pretrained
    _print_ratio("AutoModelForCausalLM", auto, auto, root)
    _print_ratio("sosp_hub.from_pretrained", auto, sosp_hub.from_pretrained, root)


def _compare_timm(root: Path) -> None:
    """A ViT-B with half the neurons, and one that is built with half of them."""
    name, half = "vit_base_patch16_224", torch.arange(1536)
    small = timm.create_model(name, num_classes=7).eval()
    for block in small.blocks:
        _cut(block.mlp, len(half), rows=("fc1",), columns=("fc2",))
    sosp_hub.save_pretrained(small, root / "timm-pruned")
    dense = timm.create_model(name, num_classes=7, mlp_ratio=2.0).eval()
    sosp_hub.save_pretrained(dense, root / "timm-dense")
    load = partial(timm.create_model, pretrained=True)
    _print_ratio(
        "timm.create_model",
        lambda folder: load(f"local-dir:{folder.parent / 'timm-dense'}"),
        lambda folder: load(f"local-dir:{folder.parent / 'timm-pruned'}"),
        root,
    )


def _print_ratio(name: str, dense, pruned, root: Path) -> None:
    pairs = [
        (_seconds(dense, root / "dense"), _seconds(pruned, root / "pruned"))
        for _ in range(_PAIRS + 1)
    ]
    pairs = pairs[1:]  # the first reads the disk
    ratios = sorted(small / whole for whole, small in pairs)
    print(
        f"{name}: dense {min(p[0] for p in pairs):.3f} s, pruned {min(p[1] for p in pairs):.3f} s; "
        f"ratio of the least {min(p[1] for p in pairs) / min(p[0] for p in pairs):.3f}, "
        f"median {statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"{_PAIRS} pairs)"
    )


def _seconds(load, folder: Path) -> float:
    start = time.process_time()
    model = load(folder)
    sum(parameter.sum() for parameter in model.parameters())  # the file is mapped: read it all
    return time.process_time() - start


def _compare_imports() -> None:
    """``import sosp_hub`` before and after transformers, in new processes taken in turn."""
    codes = {
        "import transformers": "import transformers",
        "import sosp_hub, transformers": "import sosp_hub, transformers",
        "modeling_utils": "from transformers import modeling_utils",
        "sosp_hub, modeling_utils": "import sosp_hub; from transformers import modeling_utils",
    }
    found: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(_IMPORTS):
        for name, code in codes.items():
            timed = f"import time; s = time.process_time(); {code}; print(time.process_time() - s)"
            answer = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", timed],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[name].append(float(answer.stdout))
    for name, seconds in found.items():
        print(f"{name:<32}{min(seconds):.3f} s (median {statistics.median(seconds):.3f})")


def _llama(hidden: int, width: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=_LAYERS,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=1000,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def _cut(mlp: torch.nn.Module, kept: int, rows=("gate_proj", "up_proj"), columns=("down_proj",)):
    for name in (*rows, *columns):
        linear, whole = mlp.get_submodule(name), slice(None)
        index = (slice(kept), whole) if name in rows else (whole, slice(kept))
        linear.weight = torch.nn.Parameter(linear.weight.detach()[index].clone())
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias.detach()[index[0]].clone())
        linear.out_features, linear.in_features = linear.weight.shape
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = kept


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
