"""Magnitude that compares between layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor, nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.criteria.weights import filters, slices, sum_by_structure

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


@register
@final
@dataclass(frozen=True)
class Lamp:
    """Squared norm of a structure's weights over that of all in its group that are as large.

    ``||w_s||^2 / sum_{j: ||w_j|| >= ||w_s||} ||w_j||^2``: the largest of every group has 1, so no
    group goes whole while another has anything left to give.

    Paper: Lee et al., "Layer-adaptive sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv
    2010.07611.

    Differs from the paper: a structure takes the place of a single weight, a group that of a layer;
    structures of equal norm get equal scores.
    """

    name: ClassVar[str] = "lamp"
    paper: ClassVar[str] = "arXiv 2010.07611"
    needs: ClassVar[Needs] = "nothing"

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Looks at the weights alone."""
        del batches
        saliency = {}
        for name, group in graph.groups.items():
            rows = (slices(member, weight) for member, weight in filters(model, group))
            squares = ((row.square().sum(1), index) for row, index in rows)
            saliency[name] = _shares(sum_by_structure(group, squares))
        return saliency


def _shares(squares: Tensor) -> Tensor:
    ascending = squares.sort().values
    from_here = ascending.flip(0).cumsum(0).flip(0)
    as_large = from_here[torch.searchsorted(ascending, squares)]
    return torch.where(squares > 0, squares / as_large, squares)
