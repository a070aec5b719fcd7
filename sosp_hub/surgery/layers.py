"""Taking whole layers out of a stack, and what counts them."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sosp_hub.plan import Plan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.shadow import is_config

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBERS = ("layer_idx", "layer_id", "layer_number")


def drop_layers(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Removes in place the layers that a plan does not keep.

    The rest moves up: positions, ``layer_idx`` and the config's layer count and per-layer lists
    follow, so that caches of key and value tensors stay in step.
    """
    for name, kept in plan.kept.items():
        group = graph.groups[name]
        if group.kind != "layer":
            continue
        gone = {layer for i, layer in enumerate(group.layers) if i not in kept}
        stack_name = name.rpartition(":")[0]
        stack = model.get_submodule(stack_name)
        inside = f"{stack_name}." if stack_name else ""
        children = list(stack.named_children())
        stays = [i for i, (child, _) in enumerate(children) if f"{inside}{child}" not in gone]
        for position in reversed(range(len(children))):
            if position not in stays:
                del stack[position]  # type: ignore[attr-defined]
        for position, old in enumerate(stays):
            _renumber(children[old][1], position)
        _rewrite_configs(model, len(children), stays)


def bypassed(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Makes the layers that a plan does not keep hand on their input: the masked model."""
    for name, kept in plan.kept.items():
        group = graph.groups[name]
        for i, layer in enumerate(group.layers):
            if i not in kept:
                model.get_submodule(layer).register_forward_hook(_hand_on)


def _hand_on(_: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    return args[0] if isinstance(result, Tensor) else type(result)((args[0], *result[1:]))


def _renumber(layer: nn.Module, position: int) -> None:
    for module in layer.modules():
        for name in _NUMBERS:
            if type(vars(module).get(name)) is int:
                vars(module)[name] = position


def _rewrite_configs(model: nn.Module, before: int, stays: list[int]) -> None:
    """Layer counts and per-layer lists of every config that described the whole stack."""
    done: dict[int, Any] = {}
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if is_config(value):
                if id(value) not in done:
                    done[id(value)] = _shortened(value, before, stays)
                vars(module)[key] = done[id(value)]


def _shortened(config: Any, before: int, stays: list[int]) -> Any:
    values: Mapping[str, Any] = vars(config)
    new: dict[str, Any] = {}
    for key, value in values.items():
        if key in _COUNTS and value == before:
            new[key] = len(stays)
        elif isinstance(value, list) and len(value) == before and key.startswith("layer"):
            new[key] = [value[i] for i in stays]
    if not new:
        return config
    twin = copy.copy(config)
    vars(twin).update(new)
    return twin
