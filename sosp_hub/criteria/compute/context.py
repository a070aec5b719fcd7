"""What a criterion is given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sosp_hub.derivatives import GaussNewton, Protocol
from sosp_hub.errors import CriterionError
from sosp_hub.structure.groups import Groups
from sosp_hub.types import GateKind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@dataclass(frozen=True)
class Context:
    """What is scored, and what every criterion may need for that.

    Attributes:
        model: The model; it comes back exactly as it was.
        groups: The groups to score.
        batches: Calibration data.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        seed: Of everything random.
        process_sum: Sum of a tensor over all processes; None = this is the only one.
        process_rows: The rows of all processes, one behind the other.
        curvature: The Gauss-Newton matrix of these groups, where it was measured before.
        units: What each structure costs, where least per unit is to go first.
        unused: Is told the groups that the loss does not depend on; they get no score.
    """

    model: nn.Module
    groups: Groups
    batches: "Batches" = ()
    loss_fn: "LossFn | None" = None
    seed: int = 0
    process_sum: Callable[[Tensor], Tensor] | None = None
    process_rows: Callable[[Tensor], Tensor] | None = None
    curvature: GaussNewton | None = None
    units: "Saliency | None" = None
    unused: set[str] = field(default_factory=set)

    def protocol(
        self, gate: GateKind = "activation", micro_batch_size: int | None = None
    ) -> Protocol:
        """How derivatives by gates are measured here."""
        return Protocol(
            self.loss_fn,
            gate,
            micro_batch_size,
            self.process_sum,
            self.process_rows,
            self.unused,
        )

    def several_passes(self, criterion: str) -> "Batches":
        """The batches; raises CriterionError where they can be gone through only once."""
        if isinstance(self.batches, Iterator):
            given = getattr(self.batches, "given", type(self.batches).__name__)
            raise CriterionError(
                f"criterion {criterion!r} goes through the data more than once and was given a "
                f"{given}; give a list of batches or a data loader"
            )
        return self.batches
