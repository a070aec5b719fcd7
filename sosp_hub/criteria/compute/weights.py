"""The weights of structures, for criteria that look at them."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sosp_hub.errors import CriterionError
from sosp_hub.structure.groups import Group, Groups, Member, Site


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
    """The slices of a tensor as rows, float64 on the CPU, and the structure of each row.

    A complex number counts as two, so that norms and distances are its own.
    """
    rows = _plain(member, tensor.detach()).movedim(member.dim, 0).flatten(1)
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    rows = rows.to("cpu", torch.float64)
    index = torch.from_numpy(member.index)
    return rows[index >= 0], index[index >= 0]


def _plain(member: Member, tensor: Tensor) -> Tensor:
    """The values of a weight that is quantised or spread over processes."""
    otherwise = "choose a criterion that looks at the loss, such as `taylor` or `sosp_h`"
    if tensor.is_meta:
        raise CriterionError(
            f"{member.tensor}: its values are not in memory (offloaded); keep it there "
            f"(device_map), or {otherwise}"
        )
    for whole in ("full_tensor", "dequantize"):
        if type(tensor) is not Tensor and hasattr(tensor, whole):
            tensor = getattr(tensor, whole)()
    if member.dim >= tensor.ndim or tensor.shape[member.dim] != len(member.index):
        raise CriterionError(
            f"{member.tensor}: its shape is {list(tensor.shape)}, and the graph has "
            f"{len(member.index)} in dimension {member.dim}; give the model that was traced, or, "
            f"where weights are packed (quantised), {otherwise}"
        )
    return tensor


def sum_by_structure(group: Group, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Adds up values per row, given with the structure of each row."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for values, index in parts:
        total.index_add_(0, index, values)
    return total


def squared_norms(model: nn.Module, group: Group) -> Tensor:
    """The squared L2 norm of the weights that make each structure's slices."""
    rows = (slices(member, weight) for member, weight in filters(model, group))
    return sum_by_structure(group, ((row.square().sum(1), index) for row, index in rows))


def reading(
    model: nn.Module, group: Group, measure: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """What is measured of the weights that read a group, for each site whose module has some.

    Args:
        model: The model.
        group: The group.
        measure: From the weights of each position, ``(positions, weights)``, to one number each.

    Returns:
        By the number of the site, float64 on the CPU.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    measured = {}
    for number, site in enumerate(group.sites):
        for member in group.members:
            fits = member.reads and np.array_equal(member.index, site.index)
            if fits and member.tensor == f"{site.module}.weight":
                weight = _plain(member, parameters[member.tensor].detach())
                rows = weight.movedim(member.dim, 0).flatten(1)
                rows = rows.abs() if rows.is_complex() else rows
                measured[number] = measure(rows.double()).cpu()
    return measured


def check_read(
    groups: Groups, measured: Mapping[str, Mapping[int, Tensor]], criterion: str
) -> None:
    """Refuses groups that no weight reads.

    Raises:
        CriterionError: Names them.
    """
    if unread := [group for name, group in groups.items() if not measured[name]]:
        shown = ", ".join(f"{group.name!r} ({group.kind})" for group in unread[:8])
        raise CriterionError(
            f"criterion {criterion!r}: no linear layer or ungrouped convolution reads {shown}; "
            "score other kinds (`kinds=`), or use `magnitude` or `activation`"
        )


def by_structure(group: Group, site: Site, values: Tensor) -> Tensor:
    """Adds up values of the positions at a site."""
    index = torch.from_numpy(site.index)
    return sum_by_structure(group, iter([(values[index >= 0], index[index >= 0])]))
