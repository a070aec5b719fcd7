"""Weights times the size of what they read."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, Needs, WatchedCriterion

if TYPE_CHECKING:
    from torch import Tensor

    from sosp_hub.criteria.compute.activations import Seen
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class WandaSp(WatchedCriterion):
    """Mean over rows of ``abs(W_ij)`` times the root mean square of input ``j``.

    ``W`` are the weights that read the structure (``down_proj``, the output projection of heads,
    the next convolution); where a structure has several inputs ``j`` they are added up.

    Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    AAAI 2024, arXiv 2312.11983, where Wanda-sp is a baseline, after Sun et al., arXiv 2306.11695.

    Differs from the paper: root mean square over tokens for L2, which changes no order; a mean over
    the kernel of a convolution; padding does not count; scores are standardised within each group;
    weights that read the same group in several places are averaged.
    """

    paper: ClassVar[str] = "arXiv 2312.11983"
    needs: ClassVar[Needs] = "inputs"
    formula: ClassVar[str] = (
        "sum over inputs j of s of (mean over rows i of |W_ij|) * sqrt(mean of x_j^2)"
    )
    words: ClassVar[str] = "W are the weights that read the structure, x what they read"

    name: Literal["wanda_sp"] = "wanda_sp"

    def saliency(self, context: "Context") -> "Saliency":
        """One forward pass per batch."""
        from sosp_hub.criteria.compute.activations import weighted_inputs
        from sosp_hub.criteria.compute.ranking import standardized

        scores = weighted_inputs(
            context,
            self.name,
            of_weights=lambda weight: weight.abs().mean(1),
            moments=_squares,
            of_inputs=lambda mean: mean[0].sqrt(),
            num_moments=1,
        )
        return standardized(scores, "weights times activations") if self.standardize else scores


def _squares(seen: "Seen") -> "tuple[Tensor, Tensor]":
    return seen.rows.square().sum((0, 1))[None], seen.places.sum()
