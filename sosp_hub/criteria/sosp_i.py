"""SOSP-I: correlations between structures of all layers, from the Gauss-Newton matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from sosp_hub.criteria.elimination import Floors, compensation, greedy_order, surgeon_order
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import GaussNewton, Protocol, gauss_newton
from sosp_hub.errors import CriterionError
from sosp_hub.gates import GateKind
from sosp_hub.structure.groups import Groups

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency

MAX_STRUCTURES = 20_000  # a matrix of float64 that fits into 3.2 GB


class Selection(NamedTuple):
    """What was found, as plain data; cuts at any budget follow from it without more data.

    Attributes:
        saliency: Position in the order, or the scores, of each group; higher = keep.
        curvature: The Gauss-Newton matrix and what was seen.
    """

    saliency: "Saliency"
    curvature: GaussNewton


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
        damping: Of the surgeon: added to ``Q``'s diagonal, as a share of its mean.
        keep_at_least: Share of each group that no order removes.
        loss: Which curvature of the loss by the logits.
        max_classes: Up to so many classes are summed over; above, labels are drawn from the model.
        num_draws: Labels drawn per sample.
        gate: What a gate multiplies.
        micro_batch_size: Most samples of one pass; None = whole batches.
        seed: Of the drawn labels.
        loss_fn: Loss of (logits, labels).
        process_sum: Sum over processes.
    """

    selection: Literal["row_sum", "greedy", "signed", "surgeon"] = "row_sum"
    damping: float = 0.01
    keep_at_least: float = 0.1
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    max_classes: int = 32
    num_draws: int = 1
    gate: GateKind = "activation"
    micro_batch_size: int | None = None
    seed: int = 0
    loss_fn: "LossFn | None" = None
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "sosp_i"
    paper: ClassVar[str] = "arXiv 2110.11395"
    needs: ClassVar[Needs] = "labels"

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """Scores, or positions in the order of removal."""
        return self.select(model, graph, batches).saliency

    def select(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> Selection:
        """Scores and the matrix they come from, for other selections and for ``compensate``."""
        num = sum(group.size for group in graph.groups.values())
        if num > MAX_STRUCTURES:
            raise CriterionError(
                f"criterion 'sosp_i': {num} structures need a matrix of {num**2 * 8 / 1e9:.0f} GB; "
                f"score fewer kinds (`kinds=`, up to {MAX_STRUCTURES} structures), or use `sosp_h`"
            )
        found = gauss_newton(
            model,
            graph.groups,
            batches,
            Protocol(self.loss_fn, self.gate, self.micro_batch_size, self.process_sum),
            loss=self.loss,
            max_classes=self.max_classes,
            num_draws=self.num_draws,
            seed=self.seed,
        )
        return Selection(_by_group(graph.groups, self._scores(graph.groups, found)), found)

    def _scores(self, groups: Groups, found: GaussNewton) -> Tensor:
        gradient = torch.cat([found.gradient[name] for name in groups])
        if self.selection == "row_sum":
            return gradient.abs() + found.matrix.abs().sum(1) / 2
        floors = Floors([group.size for group in groups.values()], self.keep_at_least)
        if self.selection == "surgeon":
            order = surgeon_order(found.matrix, floors, self.damping)
        else:
            order = greedy_order(
                found.matrix, floors, gradient if self.selection == "greedy" else None
            )
        scores = torch.full_like(gradient, len(order))
        scores[order] = torch.arange(len(order), dtype=scores.dtype)
        return scores


def compensate(
    groups: Groups, matrix: Tensor, kept: dict[str, tuple[int, ...]], damping: float = 0.01
) -> dict[str, Tensor]:
    """Gates of all structures that make up for what a plan removes: 0 where it removes.

    Any criterion's plan will do. ``gates.fold_`` writes them into the weights.

    Args:
        groups: The groups that were scored.
        matrix: Their Gauss-Newton matrix.
        kept: Kept indices of each group; a group that is not listed is kept whole.
        damping: Added to the matrix's diagonal, as a share of its mean.
    """
    masks = [torch.ones(group.size, dtype=torch.bool) for group in groups.values()]
    for name, mask in zip(groups, masks, strict=True):
        if name in kept:
            mask.fill_(False)[list(kept[name])] = True
    kept_mask = torch.cat(masks)
    return _by_group(groups, compensation(matrix, kept_mask, damping))


def _by_group(groups: Groups, row: Tensor) -> dict[str, Tensor]:
    parts = row.split([group.size for group in groups.values()])
    return {name: part.clone() for name, part in zip(groups, parts, strict=True)}
