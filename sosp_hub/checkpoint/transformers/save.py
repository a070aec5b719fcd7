"""Writes a transformers model: config, weights, generation config; proves what they build."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from sosp_hub.checkpoint.format import proof
from sosp_hub.checkpoint.format.delta import store_in_state
from sosp_hub.checkpoint.format.record import KEY, Delta, Section
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.checkpoint.transformers import native
from sosp_hub.checkpoint.transformers.per_layer import describe_layers, held_in_cache
from sosp_hub.checkpoint.transformers.ship import ship
from sosp_hub.compat.transformers import no_init_weights, store_all
from sosp_hub.errors import CheckpointError
from sosp_hub.structure.isolation import isolated


class Described(NamedTuple):
    """What rebuilds a model.

    Attributes:
        config: The plain config.
        delta: What it does not say; empty where it says all.
        obstacle: Why no plain config says all; empty where one does.
    """

    config: Any
    delta: Delta
    obstacle: str


def write(
    model: PreTrainedModel, folder: Path, *, max_shard_size: int | str, ship_code: bool
) -> str:
    """Writes the model into a folder that holds no other weights.

    Returns:
        Why the plain config does not say all; empty where it does.

    Raises:
        CheckpointError: The files would not build the model again.
    """
    config, delta, obstacle = describe(model)
    state = _state(model, delta)
    _check_loud(model, config, delta, state)
    if not delta.empty:
        store_all(model)
    with adapter.not_pending(model):
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    _write_config(model, folder, config, delta)
    if ship_code and not delta.empty:
        ship(model, folder)
    return obstacle


def write_description(model: PreTrainedModel, folder: Path, inputs: Any) -> dict[str, Tensor]:
    """Writes the config of a cut model without weights; what goes into its files beside its state.

    Args:
        model: With its parameters on the meta device.
        folder: Where to.
        inputs: Of one forward pass.

    Raises:
        CheckpointError: The files would not build the model again.
    """
    config, delta, _ = describe(model, inputs)
    state = _state(model, delta)
    _check_loud(model, config, delta, state)
    _write_config(model, folder, config, delta)
    own = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in own}


def _write_config(model: PreTrainedModel, folder: Path, config: Any, delta: Delta) -> None:
    config.architectures, config.dtype = model.config.architectures, model.config.dtype
    if not delta.empty:
        setattr(config, KEY, delta.to_json())
        describe_layers(model, config, held_in_cache(model, config))
    config.save_pretrained(folder)


def attach(model: PreTrainedModel) -> None:
    """Writes the delta of a pruned model into its own config.

    Then whatever saves the model by itself, as ``Trainer`` does, writes a checkpoint that loads.
    Buffers that cannot be computed again become part of the model's state.

    Raises:
        CheckpointError: What the delta builds differs from the model, which is then left as it was.
    """
    with isolated(model, type(model)):  # once for all that is run and built within
        config = adapter.plain_config(model.config)
        delta = _proved(model, config, adapter.delta_of(model, config), made_up_inputs(model))
        _check_loud(model, config, delta, _state(model, delta))
        held = None if delta.empty else held_in_cache(model, config)
    for section, name in ((delta.base, adapter.base_name(model)), (delta.head, "")):
        if section is not None:
            store_in_state(model.get_submodule(name), section)
    adapter.forget(model.config)
    if not delta.empty:
        store_all(model)
        setattr(model.config, KEY, delta.to_json())
        describe_layers(model, model.config, held)


def describe(model: PreTrainedModel, traced: Any = None) -> Described:
    """The config and the delta that build this model again; no delta where a config can say all.

    Args:
        model: The pruned model.
        traced: Of a model without weights the inputs of one forward pass: steps are compared, not
            outputs.

    Raises:
        CheckpointError: What they build differs from the model.
    """
    config, delta = native.best_skeleton(model)
    inputs = made_up_inputs(model)
    compare = proof.same_output if traced is None else proof.same_steps
    inputs = inputs if traced is None else traced
    obstacle = "its config does not say how its inputs look, so no config could be compared"
    if inputs is not None:
        plain = dataclasses.replace(delta, base=Section(delta.base.cls), head=None)
        native_config, obstacle = native.uniform_config(model, config, delta)
        rebuilt = None if native_config is None else _rebuild(model, native_config, plain)
        if rebuilt is not None and not _lasting_buffers(rebuilt, model, plain):
            proof.adopt(rebuilt, model)
            same = compare(rebuilt, model, inputs)
            if same:
                return Described(native_config, plain, "")
            if same is None:
                obstacle = "it does not run on inputs that its config tells, so no config could be "
                obstacle += "compared"
        obstacle = obstacle or "the model that a plain config builds computes something else"
    return Described(config, _proved(model, config, delta, inputs, traced is None), obstacle)


def _proved(
    model: PreTrainedModel, config: Any, delta: Delta, inputs: Any, has_data: bool = True
) -> Delta:
    """The delta, with the buffers that have to be stored, after it was seen to build the model."""
    delta = parse_delta(json.loads(json.dumps(delta.to_json())))  # what a reader will see
    rebuilt = _rebuild(model, config, delta)
    if buffers := _lasting_buffers(rebuilt, model, delta):
        delta = _with_buffers(model, delta, buffers)
        rebuilt = _rebuild(model, config, delta)
    proof.check_tensors(rebuilt, _state(model, delta))
    proof.adopt(rebuilt, model)
    compare = proof.same_output if has_data else proof.same_steps
    if inputs is not None and compare(rebuilt, model, inputs) is False:
        raise CheckpointError(proof.OTHER_OUTPUT.format(type(model).__name__))
    if has_data:
        proof.check_cache(rebuilt, inputs)
    return delta


def _lasting_buffers(rebuilt: PreTrainedModel, model: PreTrainedModel, delta: Delta) -> list[str]:
    """Buffers that a reader computes differently or, as an older delta asked, not at all.

    Those whose size no attribute tells it would fill as they were before the cut.
    """
    kept, buffers = model.state_dict(keep_vars=True).keys(), dict(model.named_buffers())
    resized = [name for name in _sized(model, delta) if name in buffers and name not in kept]
    changed = proof.changed_buffers(rebuilt, model)
    return [*dict.fromkeys([*changed, *resized, *proof.stored_buffers(rebuilt, model)])]


def _sized(model: PreTrainedModel, delta: Delta) -> list[str]:
    """Names in the model of the tensors whose shapes a delta tells."""
    sections = ((delta.base, adapter.base_name(model)), (delta.head, ""))
    return [
        f"{prefix}.{name}".lstrip(".")
        for section, prefix in sections
        if section is not None
        for name in section.tensors
    ]


def _rebuild(model: PreTrainedModel, config: Any, delta: Delta) -> PreTrainedModel:
    config = adapter.plain_config(config)
    if not delta.empty:
        setattr(config, KEY, delta.to_json())
    with isolated(type(model)), proof.without_data(), no_init_weights(), adapter.enabled():
        return type(model)(config)


def _state(model: PreTrainedModel, delta: Delta) -> dict[str, Tensor]:
    """The model's tensors, changed buffers, and an empty tensor for modules that were taken out."""
    state = dict(model.state_dict())
    base = adapter.base_name(model)
    buffers = dict(model.named_buffers())
    for section, prefix in ((delta.base, base), (delta.head, "")):
        if section is None:
            continue
        for name in section.buffers:
            full = f"{prefix}.{name}".lstrip(".")
            state[full] = buffers[full]
        for name, one in section.replaced.items():
            if one.tombstone is not None:
                state[f"{prefix}.{name}.{one.tombstone}".lstrip(".")] = torch.empty(0)
    return state


def _with_buffers(model: PreTrainedModel, delta: Delta, buffers: list[str]) -> Delta:
    prefix = adapter.base_name(model)
    prefix = f"{prefix}." if prefix else ""
    inner = tuple(name.removeprefix(prefix) for name in buffers if name.startswith(prefix))
    outer = tuple(name for name in buffers if not name.startswith(prefix))
    head = delta.head and dataclasses.replace(delta.head, buffers=outer)
    return dataclasses.replace(
        delta, base=dataclasses.replace(delta.base, buffers=inner), head=head
    )


def _check_loud(
    model: PreTrainedModel, config: Any, delta: Delta, state: dict[str, Tensor]
) -> None:
    """A loader that does not know the delta must meet a tensor of another shape, and stop."""
    if delta.empty:
        return
    skeleton = adapter.build_meta(type(model), adapter.plain_config(config)).state_dict()
    if all(
        name not in skeleton or skeleton[name].shape == tensor.shape
        for name, tensor in state.items()
    ):
        raise CheckpointError(
            f"{type(model).__name__}: the delta changes numbers but no size, so a loader without "
            f"sosp_hub would load the model wrongly and silently; it cannot be saved"
        )
