"""The probability that a ReLU lets a channel through, from the BatchNorm in front of it."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, Needs, RectifiedCriterion

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class ScpScore(RectifiedCriterion):
    """``c0 - CDF``: how much more probably a channel passes its ReLU than a dead one would.

    Behind a BatchNorm a channel is taken for normal with mean ``beta`` and deviation ``|gamma|``;
    ``CDF = Phi((t - beta) / (|gamma| + 1e-8))`` is the probability that it stays below ``t``, and
    so leaves nothing behind the ReLU. Below 0 the paper would cut: ``budget: {threshold: 0}``.

    Paper: Kang and Han, "Operation-Aware Soft Channel Pruning using Differentiable Masks", ICML
    2020, arXiv 2007.03938.

    Differs from the paper: a trained net is scored once, without training masks (that is ``scp``).
    A channel that several pairs read counts by the one where it is most probably on. Groups that
    anything reads otherwise, such as a residual stream, have no score and stay whole.
    """

    paper: ClassVar[str] = "arXiv 2007.03938"
    needs: ClassVar[Needs] = "nothing"
    words: ClassVar[str] = (
        "beta and gamma are of the BatchNorm in front of the structure's ReLU, so Phi is the "
        "probability that it is off; no data is used."
    )

    name: Literal["scp_score"] = "scp_score"

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at the BatchNorms alone."""
        from sosp_hub.soft_masks import margins

        return margins(context.model, context.groups, self.t, self.c0)
