"""``widen``: more structures of a kind, in a new model that computes what the old one computed."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sosp_hub.errors import PlanError
from sosp_hub.plan import GrowthPlan
from sosp_hub.structure.copies import copy_model
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.apply import Verify, check_model, cut
from sosp_hub.surgery.tensors import get_tensor
from sosp_hub.surgery.verification.growth import verify_growth

Init = Literal["net2net", "fresh"]
SPREAD = 0.5


def widen(
    model: nn.Module,
    graph: Graph,
    copies: GrowthPlan | Mapping[str, Sequence[int]],
    *,
    init: Init = "net2net",
    spread: float = SPREAD,
    seed: int = 0,
    verify: Verify = "thorough",
) -> nn.Module:
    """A new, wider model of the same class with the same outputs; the given one stays as it is.

    A widened group is a cut with indices that repeat. Net2WiderNet (arXiv 1511.05641, eq. 3-5):
    copies of a structure share the weights that read it. Differs from the paper: structures are
    repeated by choice, not at random; and where the paper adds noise so that copies do not stay
    alike in training, here each weight is shared out unevenly, which leaves the function exact.

    Args:
        model: The model that ``graph`` was traced from.
        graph: What ``trace`` found.
        copies: How often each structure of a group is there, by group.
        init: ``net2net``: new structures are copies. ``fresh``: their matrices are drawn from a
            normal distribution with the standard deviation of the old values, vectors (biases,
            norms) are copied, and what reads them starts at zero.
        spread: How unevenly copies share a weight; 0 = each takes an equal part, and copies then
            get equal gradients for ever.
        seed: Of the shares, and of what is drawn.
        verify: As for ``apply``: the outputs are compared with the old ones, or shapes alone.

    Raises:
        PlanError: A group that cannot be widened exactly (says why), that the model does not have,
            or that breaks a tie.
        VerificationError: The wider model does not compute what the model computes.
    """
    growth = copies if isinstance(copies, GrowthPlan) else GrowthPlan(copies)  # type: ignore[arg-type]
    if init not in get_args(Init):
        raise PlanError(f"init: got {init!r}, expected {' or '.join(get_args(Init))}")
    if not 0 <= spread < 1:
        raise PlanError(f"spread: got {spread!r}, expected a number from 0 to below 1")
    graph.check(growth)
    check_model(model, graph)
    for name, numbers in growth.copies.items():
        reason = why_not(graph, name, equal=init == "net2net" and len(set(numbers)) == 1)
        if reason and max(numbers) > 1:
            raise PlanError(f"growth: group {name!r} cannot be widened exactly: {reason}")
    if verify == "thorough" and any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError("the model has no weights (meta device): give verify='fast', or load them")

    def grow(model: nn.Module, graph: Graph, growth: GrowthPlan) -> nn.Module:
        wide = cut(copy_model(model), graph, growth)
        _set_new_weights(wide, graph, growth, init, spread, torch.Generator().manual_seed(seed))
        return wide

    wide = grow(model, graph, growth)
    verify_growth(model, wide, graph, growth, thorough=verify == "thorough", grow=grow)
    return wide


def why_not(graph: Graph, name: str, *, equal: bool = False) -> str | None:
    """Why a group cannot be widened without a change of the function; None where it can.

    Args:
        graph: What ``trace`` found.
        name: The group.
        equal: All its structures are copied equally often, which leaves means and variances.
    """
    group = graph.groups[name]
    readers = [member.tensor for member in group.members if member.reads]
    tied = next((tensor for tensor in readers if graph.aliases.get(tensor)), None)
    if group.kind == "layer":
        return "layers are taken out, not added"
    if group.kind == "expert":
        return "a router chooses between experts, and would choose between their copies"
    if tied:
        return f"{tied!r} reads it and is tied to another weight"
    if not readers or not group.sites:
        return "not only weights read it"
    for tensor in readers:
        if tensor in graph.normalised:
            return f"{tensor!r} is normalised before it reads"
    if group.reasons and not equal:
        return f"{group.reasons[0]}; copy all its structures equally often, with init='net2net'"
    return None


def _set_new_weights(
    wide: nn.Module,
    graph: Graph,
    growth: GrowthPlan,
    init: Init,
    spread: float,
    chance: torch.Generator,
) -> None:
    """Draws what is fresh, then shares out what reads the copies, in place."""
    members = [member for name in growth.copies for member in graph.groups[name].members]
    reads = {(member.tensor, member.dim): member.reads for member in members}
    with torch.no_grad():
        for (tensor, dim), is_read in sorted(reads.items(), key=lambda place: place[1]):
            origin = graph.kept_positions(tensor, growth)[dim]
            weight = get_tensor(wide, tensor)
            if origin is None or weight.is_meta:
                continue
            if is_read:
                weight.mul_(_shares(weight, dim, origin, init, spread, chance).to(weight))
            elif init == "fresh" and weight.dim() > 1 and tensor in graph.parameters:
                drawn = torch.randn(weight.shape, generator=chance) * weight.float().std().cpu()
                weight.copy_(torch.where(_first(weight, dim, origin), weight, drawn.to(weight)))


def _shares(
    weight: Tensor,
    dim: int,
    origin: NDArray[np.int64],
    init: Init,
    spread: float,
    chance: torch.Generator,
) -> Tensor:
    """What each copy gets of a weight: factors that sum to one over its copies."""
    if init == "fresh":
        return _first(weight, dim, origin).float()
    index = torch.as_tensor(origin)
    number = torch.bincount(index)[index].view(_along(weight, dim)).double()
    uneven = spread * (2 * torch.rand(weight.shape, generator=chance, dtype=torch.float64) - 1)
    sums = torch.zeros_like(uneven).index_add_(dim, index, uneven).index_select(dim, index)
    return ((1 + uneven - sums / number) / number).to(weight.device)


def _first(weight: Tensor, dim: int, origin: NDArray[np.int64]) -> Tensor:
    """Whether a position is the first copy of its origin."""
    first = np.zeros(len(origin), bool)
    first[np.unique(origin, return_index=True)[1]] = True
    return torch.as_tensor(first, device=weight.device).view(_along(weight, dim))


def _along(weight: Tensor, dim: int) -> list[int]:
    return [-1 if i == dim else 1 for i in range(weight.dim())]
