"""The probability that a ReLU lets a channel through, from the BatchNorm in front of it."""

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
class ScpScore:
    """``c0 - CDF``: how much more probably a channel passes its ReLU than a dead one would.

    Behind a BatchNorm a channel is taken for normal with mean ``beta`` and deviation ``|gamma|``;
    ``CDF = Phi((t - beta) / (|gamma| + 1e-8))`` is the probability that it stays below ``t``, and
    so leaves nothing behind the ReLU. Below 0 the paper would cut: ``budget: {threshold: 0}``.

    Paper: Kang and Han, "Operation-Aware Soft Channel Pruning using Differentiable Masks", ICML
    2020, arXiv 2007.03938.

    Differs from the paper: a trained net is scored once, without training masks (that is ``scp``).
    A channel that several pairs read counts by the one where it is most probably on. Groups that
    anything reads otherwise, such as a residual stream, have no score and stay whole.

    Attributes:
        t: Below this a channel counts as off.
        c0: Probability of being off above which a channel goes.
    """

    t: float = 0.05
    c0: float = 0.95
    name: ClassVar[str] = "scp_score"
    paper: ClassVar[str] = "arXiv 2007.03938"
    needs: ClassVar[Needs] = "nothing"
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
