"""SCP: masks that are trained with the model say which channels go."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, WIDTH_KINDS, MaskTrainedCriterion, Needs
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Scp(MaskTrainedCriterion):
    """``c0 - CDF`` once masks were trained: below 0 where a channel is off for good.

    A recipe with this criterion trains the model with differentiable masks before it is scored
    (``criterion.train``; `sosp_hub.soft_masks`), silences the channels whose ``CDF`` is above
    ``c0``, and cuts them: what scores below 0 always goes (``threshold: 0``), and the cut changes
    nothing. Here a model is scored that was trained so; for any other this is ``scp_score``.

    How much goes follows from the penalty, ``criterion.train.sparsity`` times the steps of the
    training (and the learning rate). With a budget (``macs``, ``params``, ``memory_bytes`` or
    ``structures``) the penalty is on while the masks leave more than that, and off once they do
    not, so that one training meets it; what is missing at its end is cut by score.

    With ``structure.kinds: [channel, layer]`` a layer all of whose channels are off is left out,
    in training too; else one channel of each group stays.

    Paper: Kang and Han, "Operation-Aware Soft Channel Pruning using Differentiable Masks", ICML
    2020, arXiv 2007.03938.

    Differs from the paper: budgets, and layers that go, are ours; the epoch is selected on a
    held-out part of the training data, among the last (early ones are the best because nothing is
    cut yet); the learning rate falls along a cosine; groups that anything reads otherwise than
    through a BatchNorm and its ReLU have no masks.
    """

    paper: ClassVar[str] = "arXiv 2007.03938"
    needs: ClassVar[Needs] = "labels"
    words: ClassVar[str] = (
        "beta and gamma are of the BatchNorm in front of the structure's ReLU, so Phi is the "
        "probability that it is off; the model was trained with masks."
    )
    kinds: ClassVar[tuple[Kind, ...]] = (*WIDTH_KINDS, "layer")
    decides_budget: ClassVar[bool] = True
    silences: ClassVar[bool] = True
    untrained: ClassVar[str] = "scp_score"

    name: Literal["scp"] = "scp"

    @staticmethod
    def can_score(group: Any) -> bool:
        """Layers too; one without channels behind such pairs is never off."""
        return bool(group.layers) or MaskTrainedCriterion.can_score(group)

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at the BatchNorms alone."""
        from sosp_hub.soft_masks import margins

        return margins(context.model, context.groups, self.t, self.c0)
