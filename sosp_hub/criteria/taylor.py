"""First-order Taylor saliency."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

from torch import Tensor, nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import Protocol, batch_squares, gate_gradient
from sosp_hub.gates import GateKind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@register
@final
@dataclass(frozen=True)
class Taylor:
    """How much the loss changes to first order when a structure goes.

    Paper: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv
    1906.10771, whose gate form this is.

    Attributes:
        form: ``abs``: ``abs(g)`` of the mean gate gradient ``g``; ``squared``: mean over batches of
            the squared gradient of each batch, which depends on the batch size.
        gate: What a gate multiplies.
        micro_batch_size: Most samples of one pass; None = whole batches.
        loss_fn: Loss of (outputs, targets).
        process_sum: Sum over processes.
    """

    form: Literal["abs", "squared"] = "abs"
    gate: GateKind = "activation"
    micro_batch_size: int | None = None
    loss_fn: "LossFn | None" = None
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "arXiv 1906.10771"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One backward pass per batch."""
        protocol = Protocol(self.loss_fn, self.gate, self.micro_batch_size, self.process_sum)
        if self.form == "squared":
            return batch_squares(model, graph.groups, batches, protocol).second
        found = gate_gradient(model, graph.groups, batches, protocol)
        return {name: g.abs() for name, g in found.gradient.items()}
