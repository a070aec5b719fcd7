"""Weight magnitude."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.criteria.weights import filters, slices, sum_by_structure

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


@register
@final
@dataclass(frozen=True)
class Magnitude:
    """The L2 norm of the weights that make a structure's slices.

    Paper: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710, which
    takes the L1 norm of a filter; ours is the L2 norm, over all filters that are cut together.

    Attributes:
        normalize: ``mean`` divides the norms of a group by their mean, so that layers of larger
            weights are not spared for that alone where all are ranked together (the paper ranks
            within a layer).
    """

    normalize: Literal["none", "mean"] = "none"
    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "arXiv 1608.08710"
    needs: ClassVar[Needs] = "nothing"

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Looks at the weights alone."""
        del batches
        saliency = {}
        for name, group in graph.groups.items():
            rows = (slices(member, weight) for member, weight in filters(model, group))
            squares = ((row.square().sum(1), index) for row, index in rows)
            norms = sum_by_structure(group, squares).sqrt()
            if self.normalize == "mean":
                norms = norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
            saliency[name] = norms
        return saliency
