"""The diagonal of the Hessian in gate space, estimated with random vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor, nn

from sosp_hub.criteria.passes import several_passes
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.derivatives import Mode, Protocol, hessian_product
from sosp_hub.gates import GateKind
from sosp_hub.structure.groups import Groups

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency


@register
@final
@dataclass(frozen=True)
class Hap:
    """``1/2 H_ss``: the second-order change of the loss when one structure goes, with its sign.

    ``H_ss`` is the mean over random signs ``v`` of ``v_s (H v)_s`` (Hutchinson), one Hessian
    product each; what it misses is of the size of ``sqrt(sum_t H_st^2 / num_probes)``.

    Paper: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, arXiv
    2101.08940, which takes ``trace(H_ss) / (2 p_s) * ||w_s||^2`` of the Hessian by the weights.

    Differs from the paper: in gate space a structure is one number of size 1, so the change of the
    loss needs neither the mean of the trace nor the norm of the weights; no neural implant.

    Attributes:
        num_probes: Random vectors, each one pass over the data.
        mode: How second derivatives are taken.
        gate: What a gate multiplies.
        eps: Step of the differences; None = by the weights' dtype.
        micro_batch_size: Most samples of one pass; None = whole batches.
        loss_fn: Loss of (outputs, targets).
        seed: Of the random vectors.
        process_sum: Sum over processes.
    """

    num_probes: int = 8
    mode: Mode = "auto"
    gate: GateKind = "activation"
    eps: float | None = None
    micro_batch_size: int | None = None
    loss_fn: "LossFn | None" = None
    seed: int = 0
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "hap"
    paper: ClassVar[str] = "arXiv 2101.08940"
    needs: ClassVar[Needs] = "labels"
    signed: ClassVar[bool] = True

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """All processes draw the same vectors."""
        batches = several_passes(batches, self.name)
        protocol = Protocol(self.loss_fn, self.gate, self.micro_batch_size, self.process_sum)
        generator = torch.Generator().manual_seed(self.seed)
        total = {
            name: torch.zeros(group.size, dtype=torch.float64)
            for name, group in graph.groups.items()
        }
        for _ in range(self.num_probes):
            signs = _signs(graph.groups, generator)
            product = hessian_product(
                model, graph.groups, batches, protocol, vector=signs, mode=self.mode, eps=self.eps
            )
            for name, part in product.second.items():
                total[name] += signs[name] * part
        return {name: part / (2 * self.num_probes) for name, part in total.items()}


def _signs(groups: Groups, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: 2.0 * torch.randint(2, (group.size,), generator=generator) - 1
        for name, group in groups.items()
    }
