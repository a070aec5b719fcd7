"""What lives beside a model, cut by the same plan: averages of its weights, optimizer state.

LoRA adapters need nothing of this: trace the model with its adapters, and they are cut with it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph


def carry_tensors(
    tensors: Mapping[str, Tensor], graph: Graph, plan: PruningPlan
) -> dict[str, Tensor]:
    """Cuts tensors that are named and shaped like the model's, such as an EMA copy's state dict.

    Names that the model does not have (counters) are handed on as they are.

    Raises:
        PlanError: A tensor whose shape is not that of the dense model's tensor of its name.
    """
    names = {alias: name for name, others in graph.aliases.items() for alias in others}
    carried: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known = names.get(name, name)
        carried[name] = _cut(tensor, known, graph, plan) if known in graph.tensors else tensor
    return carried


def carry_optimizer(
    optimizer: Optimizer, model: nn.Module, pruned: nn.Module, graph: Graph, plan: PruningPlan
) -> None:
    """Points an optimizer of ``model`` at ``pruned`` in place, its moments cut like the weights.

    Raises:
        PlanError: The optimizer holds a parameter that is not the model's; it is left as it was.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    smaller = dict(pruned.named_parameters())
    groups: list[list[nn.Parameter]] = []
    state: dict[Tensor, Any] = {}
    for group in optimizer.param_groups:
        groups.append([])
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                shape = list(parameter.shape)
                raise PlanError(f"optimizer: a parameter of shape {shape} is none of the model's")
            if name not in smaller:  # its layer is gone
                continue
            groups[-1].append(smaller[name])
            if parameter in optimizer.state:
                state[smaller[name]] = {
                    key: _cut(value, name, graph, plan)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for key, value in optimizer.state[parameter].items()
                }
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters


def _cut(tensor: Tensor, name: str, graph: Graph, plan: PruningPlan) -> Tensor:
    positions = graph.kept_positions(name, plan) if name in graph.tensors else ()
    if positions and len(positions) != tensor.dim():
        raise PlanError(f"{name}: expected {len(positions)} dimensions, got {list(tensor.shape)}")
    for dim, kept in enumerate(positions):
        if kept is not None:
            if kept[-1] >= tensor.shape[dim]:
                raise PlanError(f"{name}: dimension {dim} is {tensor.shape[dim]}, already cut?")
            tensor = tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return tensor
