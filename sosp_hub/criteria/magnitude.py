"""Weight magnitude."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, Criterion, Method, Needs

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Magnitude(Criterion):
    """The L2 norm of the weights that make a structure's slices.

    Paper: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710, which
    takes the L1 norm of a filter; ours is the L2 norm, over all filters that are cut together.

    ``normalize: mean`` divides the norms of a group by their mean, so that layers of larger weights
    are not spared for that alone where all are ranked together (the paper ranks within a layer).
    """

    paper: ClassVar[str] = "arXiv 1608.08710"
    needs: ClassVar[Needs] = "nothing"
    formula: ClassVar[str] = "||w_s||_2"
    words: ClassVar[str] = "w are the weights of the structure; no data is used."

    name: Literal["magnitude"] = "magnitude"
    normalize: Literal["none", "mean"] = Field(
        default="none", description="mean = over the mean of the norms in the same group"
    )

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at the weights alone."""
        import torch

        from sosp_hub.criteria.compute.weights import squared_norms

        saliency = {}
        for name, group in context.groups.items():
            norms = squared_norms(context.model, group).sqrt()
            if self.normalize == "mean":
                norms = norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
            saliency[name] = norms
        return saliency

    def method(self) -> Method:
        """With its division."""
        over = " / mean over the group" * (self.normalize == "mean")
        return Method(f"{self.formula}{over}", self.words)
