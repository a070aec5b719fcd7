"""Writes a timm model: config and one weight file; proves that they build it again."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import _hub
from torch import nn

from sosp_hub.checkpoint import proof
from sosp_hub.checkpoint import timm as adapter
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.record import Delta, parse_delta
from sosp_hub.errors import CheckpointError


def write(model: nn.Module, folder: Path) -> None:
    """Writes the model into a folder.

    Raises:
        CheckpointError: The files would not build the model again.
    """
    args, delta = describe(model)
    path = folder / "config.json"
    _hub.save_config_for_hf(model, str(path))
    config = json.loads(path.read_text())
    config["architecture"] = adapter.base_architecture(model)
    config["model_args"] = args
    if not delta.empty:
        config["architecture"] = adapter.ARCHITECTURE
        own = {"base_architecture": adapter.base_architecture(model), "delta": delta.to_json()}
        config["model_args"] = own | args
    path.write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    state |= {name: buffers[name].contiguous() for name in delta.base.buffers}
    for name, one in delta.base.replaced.items():
        if one.tombstone is not None:
            state[f"{name}.{one.tombstone}"] = torch.empty(0)
    save_file(_untied(state), folder / "model.safetensors", metadata={"format": "pt"})


def describe(model: nn.Module) -> tuple[dict[str, Any], Delta]:
    """The architecture's arguments and the delta that build this model again.

    Raises:
        CheckpointError: What they build differs from the model.
    """
    args = adapter.model_args(model)
    delta = adapter.delta_of(model, args)
    delta = parse_delta(json.loads(json.dumps(delta.to_json())))
    rebuilt = _rebuild(model, args, delta)
    if buffers := proof.changed_buffers(rebuilt, model):
        delta = dataclasses.replace(
            delta, base=dataclasses.replace(delta.base, buffers=tuple(buffers))
        )
        rebuilt = _rebuild(model, args, delta)
    inputs = made_up_inputs(model)
    if inputs is not None and proof.same_output(rebuilt, model, inputs) is False:
        raise CheckpointError(
            f"{type(model).__name__}: the config and the delta build a model of the same shapes that computes "
            f"something else; an attribute was changed that is no number"
        )
    return args, delta


def _rebuild(model: nn.Module, args: dict[str, Any], delta: Delta) -> nn.Module:
    name = adapter.base_architecture(model)
    kwargs = (
        dict(args, num_classes=model.num_classes) if hasattr(model, "num_classes") else dict(args)
    )
    if not delta.empty:
        kwargs |= {"base_architecture": name, "delta": delta.to_json()}
        name = adapter.ARCHITECTURE
    with adapter.enabled():
        with contextlib.suppress(RuntimeError), proof.without_data():
            model = timm.create_model(name, **kwargs)
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        return timm.create_model(name, **kwargs)  # its code reads values while it builds


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies what shares memory with another tensor: timm reads every name from the file."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    return state
