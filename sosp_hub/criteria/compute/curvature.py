"""The Gauss-Newton matrix of gates, and what is measured with it."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sosp_hub.derivatives import GaussNewton, Protocol, divergence, gauss_newton
from sosp_hub.derivatives.average import DEFAULT
from sosp_hub.errors import CriterionError
from sosp_hub.recipe.criteria import PerSampleCriterion
from sosp_hub.structure.groups import Groups
from sosp_hub.types import OutputLoss

logger = logging.getLogger("sosp_hub")

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


def measurable_groups(groups: Groups) -> Groups:
    """The measurable ones of some groups; a log line names the others.

    Raises:
        CriterionError: There is none.
    """
    able = {name: group for name, group in groups.items() if PerSampleCriterion.can_score(group)}
    left_out = [name for name in groups if name not in able]
    limit = "curvature is measured only of groups that layers read, each sample with its own gates"
    if not able:
        raise CriterionError(
            f"{limit}, and none of the {len(groups)} of this model is; leave out "
            "criterion.compensate, or use another criterion than sosp_i"
        )
    if left_out:
        shown = ", ".join(left_out[:4]) + ", ..." * (len(left_out) > 4)
        logger.info("%s; %d of %d are not: %s", limit, len(left_out), len(groups), shown)
    return able


@dataclass(frozen=True)
class CurvatureMeasure:
    """How the matrix, and the distance from the dense model's outputs, are measured.

    Attributes:
        protocol: How the loss is measured.
        loss: Which curvature by the outputs: the loss's own, or another whatever the loss.
        max_classes: Up to so many classes (times places) are summed over; above, labels are drawn.
        num_draws: Labels drawn per sample.
        seed: Of the drawn labels.
    """

    protocol: Protocol = DEFAULT
    loss: OutputLoss = "auto"
    max_classes: int = 32
    num_draws: int = 1
    seed: int = 0

    def measure(
        self, model: nn.Module, groups: Groups, batches: "Batches", at: "Saliency | None" = None
    ) -> GaussNewton:
        """The matrix, from which every order and ``compensated`` follow without more data.

        ``at`` other gates than 1 its gradient is that of ``divergence``.
        """
        return gauss_newton(
            model,
            groups,
            batches,
            self.protocol,
            loss=self.loss,
            max_classes=self.max_classes,
            num_draws=self.num_draws,
            seed=self.seed,
            at=at,
        )

    def divergence(
        self, model: nn.Module, groups: Groups, batches: "Batches", at: "Saliency"
    ) -> float:
        """How far the model's outputs are from the dense model's with other gates."""
        return divergence(model, groups, batches, at, self.protocol, loss=self.loss)
