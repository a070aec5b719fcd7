"""Loads a model of no library: what the caller built, cut by the delta, with the files' tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sosp_hub.checkpoint.format.delta import apply_section, versions_said
from sosp_hub.checkpoint.format.headers import TensorHeader
from sosp_hub.checkpoint.format.record import KEY, Delta
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.torch import check
from sosp_hub.checkpoint.torch.skeleton import SKELETON, outline_of, skeleton_of, torch_version
from sosp_hub.compat.huggingface_hub import is_mixin
from sosp_hub.compat.torch import put_in, unwrapped, with_marks
from sosp_hub.errors import CheckpointError

_SHOWN = 4
_SAME = "build model= with the arguments that it had before it was cut"


def read(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorHeader],
    kwargs: dict[str, Any],
    name: str,
) -> nn.Module:
    """The model of a folder, in eval mode; what the caller gave stays as it is.

    Args:
        folder: Holds the weights.
        config: What ``config.json`` says.
        tensors: Headers of the weights.
        kwargs: ``model``, built as it was before the cut, and ``dtype``.
        name: What the caller calls the folder.

    Raises:
        CheckpointError: No model, one that the delta is not about, or other tensors than the
            files'.
    """
    delta = parse_delta(config[KEY])
    model, dtype = kwargs.pop("model", None), kwargs.pop("dtype", None)
    if kwargs:
        raise CheckpointError(
            f"{name}: a {delta.base.cls} is a module of no library, for which there is no "
            f"{', '.join(kwargs)}; from_pretrained takes model= and dtype="
        )
    if isinstance(model, type) and is_mixin(model):
        return model.from_pretrained(folder)  # the hook on it comes back here with an object
    if not isinstance(model, nn.Module):
        given = f"model= is {model.__name__} itself" if isinstance(model, type) else ""
        given = given or ("model= is missing" if model is None else f"a {type(model).__name__}")
        raise CheckpointError(
            f"{name}: holds a {delta.base.cls}, a module of no library, whose code is yours, and "
            f"{given}. Build it as it was before it was cut, and write\n"
            f"    sosp_hub.from_pretrained({name!r}, model={delta.base.cls}(...))"
        )
    loaded = fill(unwrapped(model), delta, folder, tensors).eval()
    check.compare(loaded, config.get(check.KEY))
    return loaded if dtype is None else loaded.to(dtype)


def fill(
    model: nn.Module, delta: Delta, folder: Path, tensors: Mapping[str, TensorHeader]
) -> nn.Module:
    """A cut copy of a model with the tensors of the files; makes none before all was compared.

    Raises:
        CheckpointError: Another model than the delta's, or tensors that do not fit it.
    """
    devices = {name: tensor.device for name, tensor in named_tensors(model)}
    skeleton, built = cut_without_data(model, delta)
    faults = list(misfits(built, tensors))
    if faults:
        more = f" ({len(faults)} in all)" if len(faults) > 1 else ""
        raise CheckpointError(f"{'; '.join(faults[:_SHOWN])}{more}; {_SAME}")
    state: dict[str, Tensor] = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        state |= load_file(folder / file)
    _put(built, state, devices)
    vars(built)[SKELETON] = skeleton
    return built


def cut_without_data(model: nn.Module, delta: Delta) -> tuple[nn.Module, nn.Module]:
    """The skeleton of what a caller built, and the cut model; neither has data.

    Raises:
        CheckpointError: Another model than the delta's.
    """
    if type(model).__name__ != delta.base.cls:
        raise CheckpointError(
            f"model= is a {type(model).__name__}, the folder holds a {delta.base.cls}"
        )
    skeleton, built = skeleton_of(model), skeleton_of(model)
    if delta.outline and outline_of(skeleton) != delta.outline:
        raise CheckpointError(
            f"model= is a {delta.base.cls} of other modules than the one that was saved; {_SAME}"
        )
    with versions_said(delta, torch_version()):
        try:
            apply_section(built, delta.base, f"config.json: {KEY}.base")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_SAME}") from None
    return skeleton, built


def stray(delta: Delta, tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    """Disagreements between delta and weight files that can be seen without the model."""
    base = delta.base
    where = f"config.json: {KEY}.base"
    for name in base.buffers:
        if name not in tensors:
            yield f"{where}.buffers: {name!r}, no file holds it"
    for name, shape in base.tensors.items():
        held = tensors[name].shape if name in tensors else None
        if held is not None and (
            len(held) != len(shape)
            or any(n not in (None, h) for n, h in zip(shape, held, strict=True))
        ):
            file = tensors[name].file
            yield f"{where}.tensors[{name!r}]: {list(shape)}, {file} holds {list(held)}"


def misfits(model: nn.Module, tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    """Where the tensors of the files are not those of a cut model without data."""
    built = model.state_dict(keep_vars=True)
    held = {id(built[name]) for name in tensors.keys() & built.keys()}
    for name in sorted(built.keys() | tensors.keys()):
        if name not in tensors:
            if id(built[name]) not in held:  # not tied to another either
                yield f"tensor {name!r}: the model has {list(built[name].shape)}, no file holds it"
        elif name not in built:
            yield f"tensor {name!r}: {tensors[name].file} holds it, the model has none"
        elif tensors[name].shape != tuple(built[name].shape):
            yield (
                f"tensor {name!r}: {tensors[name].file} holds {list(tensors[name].shape)}, "
                f"the cut model {list(built[name].shape)}"
            )
        elif _kind(tensors[name].dtype) != _kind_of(built[name]):
            yield (
                f"tensor {name!r}: {tensors[name].file} holds {tensors[name].dtype}, the model "
                f"{str(built[name].dtype).removeprefix('torch.')}"
            )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _put(model: nn.Module, state: Mapping[str, Tensor], devices: Mapping[str, Any]) -> None:
    """Puts tensors where a model has none; what was one tensor under two names stays one."""
    made: dict[int, Tensor] = {}
    for name, old in named_tensors(model):
        if name in state and id(old) not in made:
            device = devices.get(name, torch.device("cpu"))
            new = state[name].to("cpu" if device.type == "meta" else device)
            is_parameter = isinstance(old, nn.Parameter)
            made[id(old)] = (
                with_marks(nn.Parameter(new, old.requires_grad), old) if is_parameter else new
            )
    for name, old in list(named_tensors(model)):
        if id(old) in made:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            put_in(module, key, made[id(old)])


def _kind(dtype: str) -> str:
    """Of the name that safetensors has for a type: yes and no, real, complex or whole."""
    if dtype == "BOOL":
        return dtype
    return "F" if dtype.startswith(("F", "BF")) else "C" if dtype.startswith("C") else "I"


def _kind_of(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "BOOL"
    return "C" if tensor.is_complex() else "F" if tensor.is_floating_point() else "I"
