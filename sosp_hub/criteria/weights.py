"""The weights of structures, for criteria that look at them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sosp_hub.errors import CriterionError
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
    rows = _plain(tensor.detach(), member.tensor).movedim(member.dim, 0).flatten(1)
    rows = rows.to("cpu", torch.float64)
    index = torch.from_numpy(member.index)
    return rows[index >= 0], index[index >= 0]


def _plain(tensor: Tensor, name: str) -> Tensor:
    """The values of a weight that is quantised or spread over processes."""
    if tensor.is_meta:
        raise CriterionError(
            f"{name}: its values are not in memory (offloaded); keep it there (device_map), or "
            "choose a criterion that looks at the loss, such as `taylor` or `sosp_h`"
        )
    for whole in ("full_tensor", "dequantize"):
        if type(tensor) is not Tensor and hasattr(tensor, whole):
            tensor = getattr(tensor, whole)()
    return tensor


def sum_by_structure(group: Group, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Adds up values per row, given with the structure of each row."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for values, index in parts:
        total.index_add_(0, index, values)
    return total
