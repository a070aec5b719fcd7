"""What counts the experts of a model beside their tensors."""

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from sosp_hub.plan import Plan
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.shadow import is_config

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")


def recount_experts(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Sets the numbers of experts that the traced code did not read.

    Routers and blocks say how many experts their own layer has; a config says it for all layers,
    and is left alone where they differ, as where a table chooses the experts of some layers.
    """
    count = graph.count(plan.num_kept())
    layers: dict[str, tuple[int, int]] = {}
    for group in graph.groups.values():
        weight = group.sites[0].weight if group.kind == "expert" and group.sites else None
        if weight is not None:
            axis = graph.tensors[weight][group.sites[0].dim]
            experts = weight.rpartition(".")[0]
            layers[experts.rpartition(".")[0]] = size_of(axis), size_of(axis, count)
    for block, sizes in layers.items():
        for module in model.get_submodule(block).modules():
            _recount(vars(module), sizes)
    if len(set(layers.values())) == 1:
        sizes = next(iter(layers.values()))
        if _others_stay(model, layers, sizes):
            return
        configs: dict[int, Any] = {}
        for module in model.modules():
            _recount(vars(module), sizes)
            _recount_configs(vars(module), sizes, configs)


def _others_stay(model: nn.Module, blocks: Collection[str], sizes: tuple[int, int]) -> bool:
    """Whether a module outside of these blocks counts experts whose tensors were left whole."""
    before, after = sizes
    inside = tuple(f"{block}." for block in blocks)
    return before != after and any(
        _counts(module, before)
        and any(parameter.shape[:1] == (before,) for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if not f"{name}.".startswith(inside)
    )


def _counts(module: nn.Module, before: int) -> bool:
    return any(vars(module).get(name) == before for name in _COUNTS)


def _recount(values: dict[str, Any], sizes: tuple[int, int]) -> None:
    before, after = sizes
    values.update({name: after for name in _COUNTS if values.get(name) == before})


def _recount_configs(
    values: dict[str, Any], sizes: tuple[int, int], configs: dict[int, Any]
) -> None:
    """Gives every config a twin, those inside others too; modules that share one keep sharing."""
    for key, value in list(values.items()):
        if not is_config(value):
            continue
        if id(value) not in configs:
            twin = copy.copy(value)
            _recount(vars(twin), sizes)
            _recount_configs(vars(twin), sizes, configs)
            configs |= {id(value): twin, id(twin): twin}
        values[key] = configs[id(value)]
