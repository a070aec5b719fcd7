"""SOSP-H: first-order term and full Hessian row sums of the loss in gate space."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor, nn

from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import Mode, Protocol, hessian_product
from sosp_hub.gates import GateKind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@register
@final
@dataclass(frozen=True)
class SospH:
    """``abs(g) + 1/2 abs(r)`` with ``g`` the gate gradient and ``r`` the row sums of the Hessian.

    Paper: Nonnenmacher et al., "SOSP: Efficiently Capturing Global Correlations by Second-Order
    Structured Pruning", ICLR 2022, arXiv 2110.11395. The authors published no code; the absolute
    values are our reading.

    Differs from the paper: a structure is the activation that disappears, one linear gate for all
    that is cut together (``gate="weight"`` is the paper's: the filter's own weights).

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
    name: ClassVar[str] = "sosp_h"
    paper: ClassVar[str] = "arXiv 2110.11395"
    needs: ClassVar[Needs] = "labels"

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Absolute values are taken after the mean over all batches and processes."""
        protocol = Protocol(self.loss_fn, self.gate, self.micro_batch_size, self.process_sum)
        found = hessian_product(
            model, graph.groups, batches, protocol, mode=self.mode, eps=self.eps
        )
        return {
            name: g.abs() + 0.5 * found.second[name].abs() for name, g in found.gradient.items()
        }
