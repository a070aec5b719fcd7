"""Writes a model of no library: the delta against the uncut model, and its weights."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

import sosp_hub
from sosp_hub.checkpoint.format import headers, proof
from sosp_hub.checkpoint.format.delta import apply_section, diff
from sosp_hub.checkpoint.format.record import KEY, Delta
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.torch import check
from sosp_hub.checkpoint.torch.skeleton import outline_of, skeleton_of, torch_version
from sosp_hub.compat.huggingface_hub import mixin_config
from sosp_hub.errors import CheckpointError
from sosp_hub.structure.copies import copy_model

_NO_LIMIT = 2**62


PENDING = "_sosp_hub_obstacle"
"""Set on a cut model that cannot be saved; says why."""


def write(model: nn.Module, folder: Path, *, max_shard_size: int | str) -> str:
    """Writes config and weights; in one file where ``PyTorchModelHubMixin`` may have to read it.

    Returns:
        Why no plain config says all; empty where nothing was cut.

    Raises:
        CheckpointError: The files would not rebuild the model.
    """
    check_saveable(model)
    delta = describe(model)
    config = mixin_config(model)
    state = {name: tensor.contiguous() for name, tensor in _state(model, delta).items()}
    limit = max_shard_size if config is None else _NO_LIMIT
    save_torch_state_dict(state, folder, max_shard_size=limit)
    write_config(folder, config or {}, delta, model)
    return "" if delta.empty else "no library builds it from a config"


def check_saveable(model: nn.Module) -> None:
    """Refuses a cut model that its delta failed to rebuild.

    Raises:
        CheckpointError: Says why.
    """
    if (reason := vars(model).get(PENDING)) is not None:
        raise CheckpointError(f"{type(model).__name__} was cut, and cannot be saved: {reason}")


def write_config(folder: Path, config: Mapping[str, Any], delta: Delta, model: nn.Module) -> None:
    """Writes ``config.json``: the class's own config, the delta, and some of its outputs."""
    record = {key: value for key, value in config.items() if key != check.KEY}
    record[KEY] = delta.to_json()
    if (told := check.check_of(model)) is not None:
        record[check.KEY] = told
    text = json.dumps(record, indent=2, sort_keys=True)
    (folder / headers.CONFIG).write_text(text + "\n", encoding="utf-8")


def describe(model: nn.Module, skeleton: nn.Module | None = None) -> Delta:
    """What changed since the model was built, after it was seen to build the model.

    Args:
        model: The model.
        skeleton: What it was; None = what it carries of that, or itself.

    Raises:
        CheckpointError: A change that the format cannot say.
    """
    skeleton = skeleton_of(model) if skeleton is None else skeleton
    outline = outline_of(skeleton)
    base = diff(skeleton, model)
    delta = Delta("torch", torch_version(), sosp_hub.__version__, base, outline=outline)
    rebuilt = _rebuild(skeleton, delta)
    buffers = (*proof.changed_buffers(rebuilt, model), *proof.stored_buffers(rebuilt, model))
    if buffers:
        delta = dataclasses.replace(delta, base=dataclasses.replace(base, buffers=buffers))
        rebuilt = _rebuild(skeleton, delta)
    proof.check_tensors(rebuilt, _state(model, delta))
    return delta


def same_output(model: nn.Module, delta: Delta, inputs: Any) -> bool | None:
    """Whether what a delta builds computes what a cut model does; None where it does not run.

    Args:
        model: The cut model.
        delta: What `describe` says of it.
        inputs: Arguments of a forward pass.
    """
    rebuilt = _rebuild(skeleton_of(model), delta)
    proof.adopt(rebuilt, model)
    return proof.same_output(rebuilt, model, inputs)


def _rebuild(skeleton: nn.Module, delta: Delta) -> nn.Module:
    rebuilt = copy_model(skeleton)
    read = parse_delta(json.loads(json.dumps(delta.to_json())))  # what a reader will see
    apply_section(rebuilt, read.base, f"{KEY}.base")
    return rebuilt


def _state(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """The model's tensors, changed buffers, and an empty tensor for modules that were taken out."""
    kept = model.state_dict(keep_vars=True).items()
    strange = [name for name, value in kept if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{type(model).__name__}: its state holds {strange[0]!r}, which is no tensor "
            "(get_extra_state); safetensors hold tensors alone"
        )
    state = {name: tensor.detach() for name, tensor in kept}
    buffers = dict(model.named_buffers())
    state |= {name: buffers[name] for name in delta.base.buffers}
    for name, one in delta.base.replaced.items():
        if one.tombstone is not None:
            state[f"{name}.{one.tombstone}"] = torch.empty(0)
    return state
