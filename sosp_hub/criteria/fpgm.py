"""Distance of filters to the other filters of their group."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.errors import CriterionError
from sosp_hub.recipe.criteria import CRITERIA, Needs, StandardizedCriterion

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.structure.groups import Group
    from sosp_hub.types import Saliency

_ROWS = 256  # distances of so many structures are in memory at once


@CRITERIA.declare
class Fpgm(StandardizedCriterion):
    """Sum of the distances from a structure's filters to those of all others in its group.

    ``sum_j ||w_s - w_j||_2``: the least is nearest to the geometric median, which the others can
    stand for, and goes first.

    Paper: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration", CVPR 2019, arXiv 1811.00250.

    Differs from the paper: the filters are all weights that are cut together, one behind the other;
    scores are standardised within each group, so that layers compare (our choice; the paper prunes
    every layer by the same ratio: ``uniform: true``).
    """

    paper: ClassVar[str] = "arXiv 1811.00250"
    needs: ClassVar[Needs] = "nothing"
    formula: ClassVar[str] = "sum over j of ||w_s - w_j||_2"
    words: ClassVar[str] = "w are the weights of the structure; no data is used"

    name: Literal["fpgm"] = "fpgm"

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at the weights alone."""
        from sosp_hub.criteria.compute.ranking import standardized

        scores = {name: _distances(context.model, group) for name, group in context.groups.items()}
        return standardized(scores, "the distance of filters") if self.standardize else scores


def _distances(model: "nn.Module", group: "Group") -> "Tensor":
    import torch

    from sosp_hub.criteria.compute.weights import filters, slices

    vectors = torch.cat(
        [_whole(group, *slices(member, weight)) for member, weight in filters(model, group)], 1
    )
    return torch.cat([torch.cdist(part, vectors).sum(1) for part in vectors.split(_ROWS)])


def _whole(group: "Group", rows: "Tensor", index: "Tensor") -> "Tensor":
    """One row per structure, of all its slices in order."""
    import torch

    order = index.argsort(stable=True)
    each, rest = divmod(len(index), group.size)
    if rest or not torch.equal(index[order], torch.arange(group.size).repeat_interleave(each)):
        raise CriterionError(
            f"group {group.name!r} ({group.kind}): its structures have filters of different "
            "shapes, which have no distance; use `magnitude`"
        )
    return rows[order].reshape(group.size, -1)
