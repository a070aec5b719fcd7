"""Writes a timm model: config and weights; proves that they build it again."""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from sosp_hub.checkpoint.format import headers, proof
from sosp_hub.checkpoint.format.record import Delta
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.timm import load as adapter
from sosp_hub.compat.timm import write_config
from sosp_hub.errors import CheckpointError

_NO_LIMIT = 2**62
_CLASSES = ("label_names", "label_descriptions")
"""Of a model's ``pretrained_cfg``: readers beside timm look for them in the root of its config."""


def write(model: nn.Module, folder: Path, *, max_shard_size: int | str) -> str:
    """Writes the model into a folder; in one file where timm alone may have to read it.

    Returns:
        Why the architecture's arguments do not say all; empty where they do.

    Raises:
        CheckpointError: The files would not build the model again.
    """
    args, delta = describe(model)
    _write_config(model, folder, args, delta)
    save_torch_state_dict(
        _untied(_state(model, delta)),
        folder,
        max_shard_size=_NO_LIMIT if delta.empty else max_shard_size,
    )
    return "" if delta.empty else f"{adapter.base_architecture(model)} has no arguments for widths"


def write_description(model: nn.Module, folder: Path, inputs: Any) -> dict[str, Tensor]:
    """Writes the config of a cut model without weights; what goes into its files beside its state.

    Args:
        model: With its parameters on the meta device.
        folder: Where to.
        inputs: Of one forward pass.

    Raises:
        CheckpointError: The files would not build the model again.
    """
    args, delta = describe(model)
    if not proof.same_steps(_rebuild(model, args, delta), model, inputs):
        raise CheckpointError(proof.OTHER_OUTPUT.format(type(model).__name__))
    _write_config(model, folder, args, delta)
    return proof.with_data(_state(model, delta))


def describe(model: nn.Module) -> tuple[dict[str, Any], Delta]:
    """The arguments of the architecture and the delta that build this model again.

    Raises:
        CheckpointError: What they build differs from the model.
    """
    args = adapter.model_args(model)
    delta = adapter.delta_of(model, args)
    rebuilt = _rebuild(model, args, delta)
    if getattr(rebuilt, "num_classes", None) != getattr(model, "num_classes", None):
        # An architecture that sets the number itself. transformers' TimmWrapper will refuse this.
        args["num_classes"] = model.num_classes
        rebuilt = _rebuild(model, args, delta)
    buffers = (*proof.changed_buffers(rebuilt, model), *proof.stored_buffers(rebuilt, model))
    if buffers:
        base = dataclasses.replace(delta.base, buffers=buffers)
        delta = dataclasses.replace(delta, base=base)
        rebuilt = _rebuild(model, args, delta)
    proof.check_tensors(rebuilt, _state(model, delta))
    inputs = made_up_inputs(model)
    proof.adopt(rebuilt, model)
    if inputs is not None and proof.same_output(rebuilt, model, inputs) is False:
        raise CheckpointError(proof.OTHER_OUTPUT.format(type(model).__name__))
    return args, delta


def complete_config(model: nn.Module, path: Path, args: dict[str, Any], delta: Delta) -> None:
    """Adds to a config that timm wrote how the model is built."""
    config = json.loads(path.read_text())
    config["architecture"] = adapter.base_architecture(model)
    config["model_args"] = args
    if not delta.empty:
        config["architecture"] = adapter.ARCHITECTURE
        own = {"base_architecture": adapter.base_architecture(model), "delta": delta.to_json()}
        config["model_args"] = own | args
    for key in _CLASSES:
        if key in config["pretrained_cfg"]:
            config.setdefault(key, config["pretrained_cfg"].pop(key))
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_config(model: nn.Module, folder: Path, args: dict[str, Any], delta: Delta) -> None:
    path = folder / headers.CONFIG
    try:
        write_config(model, path)
    except ValueError as error:  # an argument that is no JSON data
        raise CheckpointError(f"{type(model).__name__}: {error}") from error
    complete_config(model, path, args, delta)


def _rebuild(model: nn.Module, args: dict[str, Any], delta: Delta) -> nn.Module:
    """What `timm.create_model` builds from the config, before it loads weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_config(model, folder, args, delta)
        with contextlib.suppress(RuntimeError), proof.without_data():
            rebuilt = adapter.build_from_folder(folder)
            if not any(buffer.is_meta for buffer in rebuilt.buffers()):
                return rebuilt
        return adapter.build_from_folder(folder)  # its code reads values while it builds


def _state(model: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """The model's tensors, changed buffers, and an empty tensor for modules that were taken out."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    state |= {name: buffers[name] for name in delta.base.buffers}
    for name, one in delta.base.replaced.items():
        if one.tombstone is not None:
            state[f"{name}.{one.tombstone}"] = torch.empty(0)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies what shares memory with another tensor: timm reads every name from the file."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        untied[name] = tensor.clone() if memory in seen and tensor.numel() else tensor
        seen.add(memory)
    return untied
