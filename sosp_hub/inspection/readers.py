"""Who can load a checkpoint without this package, and which layer keeps the others from it.

Rules of the others: vLLM gives each process of tensor parallelism an equal share of the heads, the
KV heads (or a copy, where there are fewer than processes) and the neurons. llama.cpp quantises the
rows of a matrix in blocks of 32 values, K-quants in blocks of 256, and a row that is no multiple
falls back to a larger type. An ONNX file of its own, without others beside it, ends at 2 GiB.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sosp_hub.checkpoint.format.standins import StandIn
from sosp_hub.errors import CheckpointError, SospHubError
from sosp_hub.recipe.targets import make_target
from sosp_hub.targets.writers import deci, gguf, padded

PARALLEL = (2, 4, 8)
BLOCKS = {"K-quants": 256, "Q8_0, Q5_0, Q4_0": 32}
"""Values of a row that GGUF's quantised types pack together."""
_EXPORT = "python -m sosp_hub.export"
_LARGEST_ONNX = 2**31 - 1
_FEED_FORWARD = re.compile(r"\b(mlp|ffn?|feed_forward|fc\d|DenseReluDense|experts?)\b")


@dataclass(frozen=True)
class Reader:
    """Something that could load the checkpoint without this package.

    Attributes:
        name: What.
        loads: Whether it does; None = it cannot be said from here.
        why: The constraint that breaks with the first layer where it does, or what to mind.
        target: The target of ``export`` that this is said of; empty where it is of the files as
            they are.
    """

    name: str
    loads: bool | None
    why: str
    target: str = ""


def readers(
    model: nn.Module,
    dense: nn.Module | None,
    *,
    library: Literal["transformers", "timm"],
    num_bytes: int,
    obstacle: str | None,
) -> Iterator[Reader]:
    """What can be said from shapes alone.

    Args:
        model: The model without data.
        dense: What the plain config builds; None where that is the model.
        library: Who builds it.
        num_bytes: Of the weights.
        obstacle: Why the model cannot be followed without data; None where it can.
    """
    if dense is None:
        yield Reader(library, True, "a plain config says all")
    else:
        yield Reader(library, False, "stops at the delta; `import sosp_hub` first")
        if library == "transformers":
            yield _padded(model)
    yield from _exports(model, num_bytes, obstacle)
    if library != "transformers":
        return
    if model.can_generate():  # pyright: ignore[reportCallIssue]
        yield from _vllm(model, dense)
    else:
        yield Reader("vLLM", None, "checked for models that generate text")
    yield from _gguf(model, dense)
    yield _deci(model)


def _padded(model: nn.Module) -> Reader:
    name, made = "transformers, padded", f"{_EXPORT} --to padded"
    try:
        share = padded.filling(model).share
    except SospHubError as error:
        return Reader(name, False, _reason(error, type(model).__name__), "padded")
    why = f"zeros fill up to one width for all layers: {share:+.1%} parameters: {made}"
    return Reader(name, True, why, "padded")


def _exports(model: nn.Module, num_bytes: int, obstacle: str | None) -> Iterator[Reader]:
    """Those that take any widths; whether torch's exporter takes the code is seen by writing."""
    for name, target in (
        ("torch.export", "torch_export"), ("ONNX", "onnx"), ("OpenVINO", "openvino"),
        ("ExecuTorch", "executorch"),
    ):  # fmt: skip
        try:
            make_target(target, CheckpointError).check(model)
        except SospHubError as error:
            yield Reader(name, False, _reason(error, name), target)
            continue
        if obstacle:
            yield Reader(
                name, None, f"the model cannot be followed without data: {obstacle}", target
            )
        elif target in ("onnx", "openvino") and num_bytes > _LARGEST_ONNX:
            why = f"one ONNX file holds 2 GiB at most, the weights are {num_bytes}"
            yield Reader(name, False, why, target)
        else:
            made = f"{_EXPORT} --to {target.replace('_', '-')}"
            yield Reader(name, None, f"any widths: {made}", target)


def _reason(error: SospHubError, ahead: str) -> str:
    return str(error).removeprefix(f"{ahead}: ")


def _vllm(model: Any, dense: nn.Module | None) -> Iterator[Reader]:
    uneven = None if dense is None else first_uneven(model, dense)
    if uneven is not None:
        why = f"one width for all layers (budget.uniform: true): {uneven}"
        yield Reader("vLLM", False, why)
    else:
        yield Reader("vLLM", None, f"as transformers does, if it knows {model.config.model_type}")
    for size in PARALLEL:
        broken = first_undivided(model, size)
        if broken is not None:
            yield Reader(f"vLLM, tensor parallel {size}", False, broken)
        elif uneven is None:
            yield Reader(f"vLLM, tensor parallel {size}", None, "heads and neurons divide")


def _gguf(model: nn.Module, dense: nn.Module | None) -> Iterator[Reader]:
    name = "GGUF (llama.cpp)"
    try:
        form = gguf.check(model)
        how = "one width a layer" if form.per_layer else "zeros fill up to one width"
        yield Reader(name, True, f"arch {form.architecture}, {how}: {_EXPORT} --to gguf", "gguf")
        loads = True
    except SospHubError as error:
        yield Reader(name, False, _reason(error, "GGUF"), "gguf")
        if dense is not None or not model.can_generate():  # pyright: ignore[reportCallIssue]
            return
        why = "a plain config: if llama.cpp's own script knows its family"
        yield Reader("GGUF by llama.cpp's script", None, why)
        loads = False
    for kind, block in BLOCKS.items():
        broken = first_ragged(model, block)
        why = broken or f"rows are multiples of {block}"
        if broken and loads:
            share, layers = gguf.filling(model, block)
            if layers:
                why += f"; fill=true rounds the neurons of {layers} up: {share:+.1%} parameters"
            else:
                why += "; such a row stays in 16 bits, or falls back to a larger type"
        yield Reader(f"GGUF {kind}", broken is None, why)


def _deci(model: nn.Module) -> Reader:
    name, made = "DeciLM (mlx-lm, TensorRT-LLM, vLLM, SGLang)", f"{_EXPORT} --to deci"
    try:
        share, first = deci.filling(model)
    except SospHubError as error:
        return Reader(name, False, _reason(error, "DeciLM"), "deci")
    why = "one width and number of KV heads a layer"
    why = f"zeros fill up {first}, ...: {share:+.1%} parameters" if first else why
    return Reader(name, True, f"{why}: {made}", "deci")


def first_uneven(model: nn.Module, dense: nn.Module) -> str | None:
    """The first layer that a runtime with one width for all layers cannot hold."""
    first: dict[str, tuple[str, tuple[int, ...], bool]] = {}
    before = {name: tuple(tensor.shape) for name, tensor in dense.named_parameters()}
    alone = None
    for name, module in model.named_modules():
        if isinstance(module, StandIn):
            return f"{name} was taken out"
        for key, tensor in module.named_parameters(recurse=False):
            full, shape = f"{name}.{key}", tuple(tensor.shape)
            cut = before.get(full, shape) != shape
            kind = re.sub(r"\.\d+\.", ".N.", full)
            known, other, other_cut = first.setdefault(kind, (name, shape, cut))
            if other != shape and (cut or other_cut):
                return f"{name} is {_shown(shape)}, {known} is {_shown(other)}"
            if cut and alone is None:
                alone = f"{name} is {_shown(shape)}, the plain config says {_shown(before[full])}"
    return alone or "no plain config says which layers are left"


def first_undivided(model: nn.Module, size: int) -> str | None:
    """The first layer whose heads or neurons do not go evenly into so many processes."""
    for name, module in model.named_modules():
        for unit, number in _shared_out(name, module, model):
            copied = unit == "KV heads" and 0 < number < size and size % number == 0
            if number % size and not copied:
                return f"{name} has {number} {unit}"
    return None


def _shared_out(name: str, module: Any, model: Any) -> Iterator[tuple[str, int]]:
    """What a layer gives to each process in equal shares."""
    config = model.config.get_text_config()
    last = name.rpartition(".")[2]
    size = getattr(module, "head_dim", None)
    if isinstance(size, int) and isinstance(getattr(module, "q_proj", None), nn.Linear):
        yield "heads", module.q_proj.out_features // size
        yield "KV heads", module.k_proj.out_features // size
    elif last in ("attn", "attention", "self_attn", "self_attention") and not isinstance(
        module, StandIn
    ):  # one matrix for query, key and value
        for key, unit in (("num_attention_heads", "heads"), ("num_key_value_heads", "KV heads")):
            number = getattr(module, "num_heads", None) if unit == "heads" else None
            if number := number or getattr(module, key, None) or getattr(config, key, None):
                yield unit, number
    elif _FEED_FORWARD.search(name) and last not in ("gate", "router"):
        for shape in _matrices(module):
            yield from (("neurons", each) for each in shape if each != config.hidden_size)


def first_ragged(model: nn.Module, block: int) -> str | None:
    """The first matrix whose rows are no multiple of a block."""
    for name, module in model.named_modules():
        for *_, row in _matrices(module):
            if row % block:
                return f"rows of {name} have {row} values, no multiple of {block}"
    return None


def _matrices(module: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of a layer's matrices, inputs last."""
    if isinstance(module, nn.Linear | nn.Embedding):
        yield tuple(module.weight.shape)
    elif type(module).__name__ == "Conv1D":  # of transformers: the inputs come first
        yield tuple(reversed(module.weight.shape))
    else:  # experts, all in one tensor
        stacked = (tensor for tensor in module.parameters(recurse=False) if tensor.dim() == 3)
        yield from (tuple(tensor.shape[1:]) for tensor in stacked)


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
