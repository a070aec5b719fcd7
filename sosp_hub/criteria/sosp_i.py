"""SOSP-I: correlations between structures of all layers, from the Gauss-Newton matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sosp_hub.criteria.elimination import (
    Floors,
    absolute_row_sums,
    damped_step,
    greedy_order,
    surgeon_order,
)
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import (
    GaussNewton,
    Matrix,
    Protocol,
    by_group,
    divergence,
    gauss_newton,
)
from sosp_hub.errors import CriterionError
from sosp_hub.gates import GateKind
from sosp_hub.structure.groups import Group, Groups

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@register
@final
@dataclass(frozen=True)
class SospI:
    """Second order from ``Q = mean_n J' R J``, with ``J`` the Jacobian of the logits by the gates.

    Paper: Nonnenmacher et al., "SOSP: Efficiently Capturing Global Correlations by Second-Order
    Structured Pruning", ICLR 2022, arXiv 2110.11395, whose set saliency (our reading, there is no
    code) is ``sum abs(g_s) + 1/2 sum abs(Q_ss')`` over the removed ``s``, ``s'``.

    Differs from the paper: gates on activations; ``signed`` and ``surgeon`` drop the first-order
    term and keep the signs of ``Q`` (our choices, the latter the field's Optimal Brain Surgeon).

    Attributes:
        selection: ``row_sum``: ``abs(g) + 1/2 sum_s' abs(Q_ss')``; ``greedy``: one after the other,
            least set saliency first; ``signed``: greedy with the signs of ``Q``; ``surgeon``: the
            same where the other gates move to make up for each removal.
        damping: Of the surgeon: added to ``Q``'s diagonal, as a share of its mean. Where samples
            are few, the eigenvalues that are not 0 are larger than that mean, by structures over
            rows (of samples times classes or draws): 0.01 or 1 is then hardly any damping.
        rescore_every: Of the surgeon: after so many removals the matrix is measured again, at the
            gates so far, which first take a damped step toward the dense model's outputs where that
            brings them nearer; two more passes over the data each time. None = never.
        keep_at_least: Share of each group that no order removes.
        loss: Which curvature by the outputs: the loss's own, or another whatever the loss.
        max_classes: Up to so many classes (times places) are summed over; above, labels are drawn.
        num_draws: Labels drawn per sample.
        gate: What a gate multiplies.
        micro_batch_size: Most samples of one pass; None = whole batches.
        seed: Of the drawn labels.
        loss_fn: Loss of (outputs, targets).
        process_sum: Sum over processes.
        process_rows: Rows of all processes, where there are so few that they are exchanged.
        curvature: What ``measure`` returned for the same groups; no data is needed then.
        units: What each structure of each group costs; least loss per unit goes first then.
    """

    selection: Literal["row_sum", "greedy", "signed", "surgeon"] = "row_sum"
    damping: float = 0.01
    rescore_every: int | None = None
    keep_at_least: float = 0.1
    loss: Literal["auto", "cross_entropy", "squared"] = "auto"
    max_classes: int = 32
    num_draws: int = 1
    gate: GateKind = "activation"
    micro_batch_size: int | None = None
    seed: int = 0
    loss_fn: "LossFn | None" = None
    process_sum: Callable[[Tensor], Tensor] | None = None
    process_rows: Callable[[Tensor], Tensor] | None = None
    curvature: GaussNewton | None = None
    units: "Saliency | None" = None
    name: ClassVar[str] = "sosp_i"
    paper: ClassVar[str] = "arXiv 2110.11395"
    needs: ClassVar[Needs] = "labels"
    scores_only: ClassVar[str] = "read by layers, in front of which each sample has its own gates"

    @staticmethod
    def able(group: Group) -> bool:
        """Gates that scale a weight would be shared by all samples."""
        return bool(group.sites) and all(site.module is not None for site in group.sites)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Scores, or positions in the order of removal."""
        found = self.curvature or self.measure(model, graph.groups, batches)
        num = sum(group.size for group in graph.groups.values())
        if len(found.matrix) != num:
            raise CriterionError(
                f"criterion 'sosp_i': `curvature` is of {len(found.matrix)} structures, the groups "
                f"have {num}; give what `measure` returned for the same kinds"
            )

        def again(gates: Tensor, there: Tensor) -> tuple[Matrix, Tensor]:
            """Gates that come nearer to the dense model by a damped step start from there."""
            now = self.measure(model, graph.groups, batches, by_group(graph.groups, gates))
            pull = -torch.cat(list(now.gradient.values()))
            moved = (gates + damped_step(now.matrix, pull, there, self.damping)).clamp(min=0)
            far = self.divergence(model, graph.groups, batches, by_group(graph.groups, moved))
            return now.matrix, moved if far < now.loss else gates

        return by_group(graph.groups, self._scores(graph.groups, found, again))

    def measure(
        self, model: nn.Module, groups: Groups, batches: "Batches", at: "Saliency | None" = None
    ) -> GaussNewton:
        """The matrix, from which every selection and ``compensated`` follow without more data.

        ``at`` other gates than 1 its gradient is that of ``divergence``.
        """
        return gauss_newton(
            model,
            groups,
            batches,
            self._protocol,
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
        return divergence(model, groups, batches, at, self._protocol, loss=self.loss)

    @property
    def _protocol(self) -> Protocol:
        return Protocol(
            self.loss_fn, self.gate, self.micro_batch_size, self.process_sum, self.process_rows
        )

    def _scores(
        self,
        groups: Groups,
        found: GaussNewton,
        again: Callable[[Tensor, Tensor], tuple[Matrix, Tensor]],
    ) -> Tensor:
        gradient = torch.cat([found.gradient[name] for name in groups])
        units = torch.cat([self.units[name] for name in groups]) if self.units else None
        if self.selection == "row_sum":
            scores = gradient.abs() + absolute_row_sums(found.matrix) / 2
            return scores if units is None else scores / units
        floors = Floors([group.size for group in groups.values()], self.keep_at_least)
        if self.selection == "surgeon":
            how = self.damping, units, self.rescore_every, again
            order = surgeon_order(found.matrix, floors, *how)
        else:
            first = gradient if self.selection == "greedy" else None
            order = greedy_order(found.matrix, floors, first, units)
        scores = torch.full_like(gradient, len(order))
        scores[order] = torch.arange(len(order), dtype=scores.dtype)
        return scores
