"""The diagonal of the empirical Fisher matrix in gate space."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor, nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import Protocol, sample_squares
from sosp_hub.structure.groups import Group

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@register
@final
@dataclass(frozen=True)
class Fisher:
    """Mean over samples of the squared gate gradient of each sample's own loss.

    ``F_s = E_n (dL_n / dm_s)^2``: how much the loss of a sample moves with a structure, whichever
    way. The loss of a sample of a causal language model is the sum over its label tokens.

    Paper: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv
    1801.05787, whose gates on feature maps these are; the labels are the data's (empirical Fisher).

    Differs from the paper: the factor 1/2 is left out, which changes no order, and costs are left
    to the budget. A group that is read by a weight outside of its module stays whole, since all
    samples share the gate of such a weight.

    Attributes:
        micro_batch_size: Most samples of one pass; None = whole batches.
        loss_fn: Loss of (outputs, targets).
        process_sum: Sum over processes.
    """

    micro_batch_size: int | None = None
    loss_fn: "LossFn | None" = None
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "arXiv 1801.05787"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True
    scores_only: ClassVar[str] = "read by layers, in front of which each sample has its own gates"

    @staticmethod
    def able(group: Group) -> bool:
        """Gates that scale a weight would be shared by all samples."""
        return bool(group.sites) and all(site.module is not None for site in group.sites)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One backward pass per batch, with gates of their own for every sample."""
        protocol = Protocol(self.loss_fn, "activation", self.micro_batch_size, self.process_sum)
        return sample_squares(model, graph.groups, batches, protocol).second
