"""Magnitude that compares between layers."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, Criterion, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Lamp(Criterion):
    """Squared norm of a structure's weights over that of all in its group that are as large.

    ``||w_s||^2 / sum_{j: ||w_j|| >= ||w_s||} ||w_j||^2``: the largest of every group has 1, so no
    group goes whole while another has anything left to give.

    Paper: Lee et al., "Layer-adaptive sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv
    2010.07611.

    Differs from the paper: a structure takes the place of a single weight, a group that of a layer;
    structures of equal norm get equal scores.
    """

    paper: ClassVar[str] = "arXiv 2010.07611"
    needs: ClassVar[Needs] = "nothing"
    formula: ClassVar[str] = (
        "||w_s||^2 / (sum over j of the group with ||w_j|| >= ||w_s|| of ||w_j||^2)"
    )
    words: ClassVar[str] = "w are the weights of the structure; no data is used."

    name: Literal["lamp"] = "lamp"

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at the weights alone."""
        from sosp_hub.criteria.compute.weights import squared_norms

        return {
            name: _shares(squared_norms(context.model, group))
            for name, group in context.groups.items()
        }


def _shares(squares: "Tensor") -> "Tensor":
    import torch

    ascending = squares.sort().values
    from_here = ascending.flip(0).cumsum(0).flip(0)
    as_large = from_here[torch.searchsorted(ascending, squares)]
    return torch.where(squares > 0, squares / as_large, squares)
