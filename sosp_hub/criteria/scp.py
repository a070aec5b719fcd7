"""SCP: masks that are trained with the model say which channels go."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, MaskTrainedCriterion, Needs

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Scp(MaskTrainedCriterion):
    """``c0 - CDF`` once masks were trained: below 0 where a channel is off for good.

    A recipe with this criterion trains the model with differentiable masks before it is scored
    (``criterion.train``; `sosp_hub.soft_masks`), silences the channels whose ``CDF`` is above
    ``c0``, and cuts them: its default budget is ``threshold: 0``, and the cut changes nothing. Here
    a model is scored that was trained so; for any other this is ``scp_score``.

    Paper: Kang and Han, "Operation-Aware Soft Channel Pruning using Differentiable Masks", ICML
    2020, arXiv 2007.03938.

    Differs from the paper: the epoch is selected on a held-out part of the training data, among the
    last (early ones are the best because nothing is cut yet); the learning rate falls along a
    cosine; groups that anything reads otherwise than through a BatchNorm and its ReLU have no
    masks.
    """

    paper: ClassVar[str] = "arXiv 2007.03938"
    needs: ClassVar[Needs] = "labels"
    words: ClassVar[str] = (
        "beta and gamma are of the BatchNorm in front of the structure's ReLU, so Phi is the "
        "probability that it is off; the model was trained with masks."
    )
    decides_budget: ClassVar[bool] = True
    untrained: ClassVar[str] = "scp_score"

    name: Literal["scp"] = "scp"

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at the BatchNorms alone."""
        from sosp_hub.soft_masks import off_probabilities

        return {
            name: self.c0 - off_probabilities(context.model, group, self.t)
            for name, group in context.groups.items()
        }
