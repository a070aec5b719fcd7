"""Python attributes that must follow the tensors: traced ones, configs, standard layers."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from sosp_hub.plan import Plan
from sosp_hub.standard_layers import standard_layer
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.constraint_solver import attribute_values
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.traced_int import Attribute
from sosp_hub.surgery.experts import recount_experts


def rewrite(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Sets every attribute the cut changes; a module that needs it gets its own config."""
    kept = plan.num_kept()
    values = dict(attribute_values(graph.constraints, graph.count(kept)))
    for route in graph.routes.known:
        others = attribute_values(route.graph.constraints, route.graph.count(kept))
        values = {**others, **values}
    configs: dict[tuple[str, str], Any] = {}
    for attribute, value in values.items():
        _set(model, attribute, value, configs)
    follow_scales(model, graph, plan)
    recount_experts(model, graph, plan)
    for module in model.modules():
        _follow_shapes(module)


def follow_scales(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Sets the factors by which attention that is not fused is scaled.

    A fused kernel that is given no factor takes 1/sqrt of the width that it finds, and the module
    keeps the same number for when it runs without that kernel. So does one that was traced without
    it, where it can run with it.
    """
    after = scales_after(graph, plan)
    for name in {name for name, *_ in _scaled_widths(graph, plan)}:
        values = vars(model.get_submodule(name))
        for key, value in values.items():
            if isinstance(value, float) and "drop" not in key:
                values[key] = after(name, value)


def scales_after(graph: Graph, plan: Plan) -> Callable[[str, float], float]:
    """What becomes of a number in a module of this name: of such a factor, another one."""
    widths = [*_scaled_widths(graph, plan)]

    def scaled(module: str, value: float) -> float:
        for name, before, after in widths:
            if name == module and math.isclose(value, before**-0.5, rel_tol=1e-9):
                return value if before == after else after**-0.5
        return value

    return scaled


def _scaled_widths(graph: Graph, plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Module and width, before and after, of attention that a fused kernel scales by its width."""
    kept = plan.num_kept()
    for traced in (graph, *(route.graph for route in graph.routes.known)):
        count = traced.count(kept)
        for name, axis in traced.scales:
            yield name, size_of(axis), size_of(axis, count)


def _set(
    model: nn.Module, attribute: Attribute, value: int, configs: dict[tuple[str, str], Any]
) -> None:
    module = model.get_submodule(attribute.module)
    *path, name = attribute.name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    old = vars(owner).get(name)
    new = _with_item(old, attribute.item, value)
    if old is None or new == old:
        return
    if not path:
        module.__dict__[name] = new
        return
    holder: Any = module
    for depth, part in enumerate(path):
        key = (attribute.module, ".".join(path[: depth + 1]))
        if key not in configs:
            configs[key] = copy.copy(vars(holder)[part])
            vars(holder)[part] = configs[key]
        holder = configs[key]
    vars(holder)[name] = new


def _with_item(old: Any, item: int | None, value: int) -> Any:
    if item is None or old is None:
        return value
    return type(old)(value if i == item else entry for i, entry in enumerate(old))


def _follow_shapes(module: nn.Module) -> None:
    """Sizes that standard layers repeat beside their weights."""
    if isinstance(module, nn.MultiheadAttention):
        _follow_attention(module)
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(module, "running_mean", None)  # a norm without scales
    if not hasattr(weight, "shape") or weight is None:
        return
    layer = standard_layer(module)
    sizes = layer.sizes(module, tuple(weight.shape)) if layer else {}
    for name, value in sizes.items():
        if name in vars(module) and vars(module)[name] != value:
            module.__dict__[name] = value


def _follow_attention(module: nn.MultiheadAttention) -> None:
    """Its widths; the number of heads and the width are read while it runs, the rest is not."""
    module.head_dim = module.embed_dim // module.num_heads
    module.kdim = module.vdim = module.embed_dim
    if module.k_proj_weight is not None and module.v_proj_weight is not None:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
