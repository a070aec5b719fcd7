"""Weights times how much what they read fluctuates."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, Needs, WatchedCriterion

if TYPE_CHECKING:
    from torch import Tensor

    from sosp_hub.criteria.compute.activations import Seen
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Flap(WatchedCriterion):
    """Variance of input ``j`` times the squared norm of the weights ``W_:j`` that read it.

    An input that hardly changes can be replaced by its mean, however large it is. Where a structure
    has several inputs ``j`` (a head) they are added up.

    Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    AAAI 2024, arXiv 2312.11983, which standardises scores within each layer, as here, and so finds
    the width of every layer in one ranking of all.

    Differs from the paper: bias compensation (the mean of what goes, times its weights, added to
    the bias of the layer that reads it) is ``criterion.compensate_bias``, off by default and there
    for every criterion; no layer gets a bias that had none, as in most language models. Where a
    BatchNorm follows, re-estimated statistics (``finetune.recalibrate_norm``) do the same;
    ``compensate`` makes up for the cut by factors. The variance is over all tokens, padding left
    out; weights that read the same group in several places are averaged.
    """

    paper: ClassVar[str] = "arXiv 2312.11983"
    needs: ClassVar[Needs] = "inputs"
    formula: ClassVar[str] = "sum over inputs j of s of Var(x_j) * ||W_:j||^2"
    words: ClassVar[str] = "W are the weights that read the structure, x what they read"

    name: Literal["flap"] = "flap"

    def saliency(self, context: "Context") -> "Saliency":
        """One forward pass per batch."""
        from sosp_hub.criteria.compute.activations import weighted_inputs
        from sosp_hub.criteria.compute.ranking import standardized

        scores = weighted_inputs(
            context,
            self.name,
            of_weights=lambda weight: weight.square().sum(1),
            moments=_moments,
            of_inputs=lambda moments: _variance(*moments),
            num_moments=2,
        )
        return standardized(scores, "fluctuation") if self.standardize else scores


def _moments(seen: "Seen") -> "tuple[Tensor, Tensor]":
    """Sums of x and of its square over samples and places."""
    import torch

    rows = seen.rows.double()
    return torch.stack([rows.sum((0, 1)), rows.square().sum((0, 1))]), seen.places.sum()


def _variance(mean: "Tensor", square: "Tensor") -> "Tensor":
    return (square - mean.square()).clamp(min=0)
