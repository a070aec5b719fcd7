"""How much gradient is left when a structure goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor, nn

from sosp_hub.criteria.passes import several_passes
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import Mode, Protocol, gate_gradient, hessian_product
from sosp_hub.gates import GateKind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@register
@final
@dataclass(frozen=True)
class Grasp:
    """``(H g)_s``: how much the squared gate gradient falls, to first order, when a structure goes.

    The squared norm of the gradient has the gradient ``2 H g``, so that what has the least ``H g``
    leaves the most gradient to learn with and goes first. The sign counts.

    Paper: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR
    2020, arXiv 2002.07376, which removes the weights with the largest ``-w (H g)``.

    Differs from the paper: gates, which are 1, take the place of weights; the model is trained.

    Attributes:
        mode: How second derivatives are taken.
        gate: What a gate multiplies.
        eps: Step of the differences; None = by the weights' dtype.
        micro_batch_size: Most samples of one pass; None = whole batches.
        loss_fn: Loss of (outputs, targets).
        process_sum: Sum over processes.
    """

    mode: Mode = "auto"
    gate: GateKind = "activation"
    eps: float | None = None
    micro_batch_size: int | None = None
    loss_fn: "LossFn | None" = None
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "grasp"
    paper: ClassVar[str] = "arXiv 2002.07376"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """The data is gone through twice: ``g`` is the gradient of the mean over all of it."""
        batches = several_passes(batches, self.name)
        protocol = Protocol(self.loss_fn, self.gate, self.micro_batch_size, self.process_sum)
        gradient = gate_gradient(model, graph.groups, batches, protocol).gradient
        largest = max(float(g.abs().max()) for g in gradient.values()) or 1.0
        direction = {name: g / largest for name, g in gradient.items()}  # the size of a step
        product = hessian_product(
            model, graph.groups, batches, protocol, vector=direction, mode=self.mode, eps=self.eps
        )
        return {name: part * largest for name, part in product.second.items()}
