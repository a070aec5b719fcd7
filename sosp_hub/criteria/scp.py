"""SCP: masks that are trained with the model say which channels go."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.soft_masks import off_probabilities
from sosp_hub.structure.groups import Group

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


@register
@final
@dataclass(frozen=True)
class Scp:
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

    Attributes:
        t: Below this a channel counts as off.
        c0: Probability of being off above which a channel goes.
    """

    t: float = 0.05
    c0: float = 0.95
    name: ClassVar[str] = "scp"
    paper: ClassVar[str] = "arXiv 2007.03938"
    needs: ClassVar[Needs] = "labels"
    signed: ClassVar[bool] = True
    scores_only: ClassVar[str] = "read through a BatchNorm and the ReLU directly behind it"

    @staticmethod
    def able(group: Group) -> bool:
        """Whether the group is behind such pairs alone."""
        return bool(group.rectified)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Looks at the BatchNorms alone."""
        del batches
        return {
            name: self.c0 - off_probabilities(model, group, self.t)
            for name, group in graph.groups.items()
        }
