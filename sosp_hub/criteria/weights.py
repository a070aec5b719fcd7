"""The weights of structures, for criteria that look at them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sosp_hub.structure.groups import Group, Member


def filters(model: nn.Module, group: Group) -> list[tuple[Member, Tensor]]:
    """The weights that make a group's slices, or else all its weights; no biases, no norms."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    members = [
        (member, parameters[member.tensor].detach())
        for member in group.members
        if member.tensor in parameters and parameters[member.tensor].ndim > 1
    ]
    return [(member, weight) for member, weight in members if not member.reads] or members


def slices(member: Member, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The slices of a tensor as rows, float64 on the CPU, and the structure of each row."""
    rows = tensor.detach().movedim(member.dim, 0).flatten(1).to("cpu", torch.float64)
    index = torch.from_numpy(member.index)
    return rows[index >= 0], index[index >= 0]


def sum_by_structure(group: Group, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Adds up values per row, given with the structure of each row."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for values, index in parts:
        total.index_add_(0, index, values)
    return total
