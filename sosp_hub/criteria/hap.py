"""The diagonal of the Hessian in gate space, estimated with random vectors."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, Needs, SecondOrderCriterion
from sosp_hub.recipe.section import Count

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Hap(SecondOrderCriterion):
    """``1/2 H_ss``: the second-order change of the loss when one structure goes, with its sign.

    ``H_ss`` is the mean over random signs ``v`` of ``v_s (H v)_s`` (Hutchinson), one Hessian
    product each; what it misses is of the size of ``sqrt(sum_t H_st^2 / num_probes)``.

    Paper: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, arXiv
    2101.08940, which takes ``trace(H_ss) / (2 p_s) * ||w_s||^2`` of the Hessian by the weights.

    Differs from the paper: in gate space a structure is one number of size 1, so the change of the
    loss needs neither the mean of the trace nor the norm of the weights; no neural implant.
    """

    paper: ClassVar[str] = "arXiv 2101.08940"
    needs: ClassVar[Needs] = "labels"
    formula: ClassVar[str] = "1/2 H_ss"
    words: ClassVar[str] = (
        "H is the Hessian of the mean loss by the gates of structures; its diagonal is estimated "
        "with random signs (Hutchinson)."
    )
    signed: ClassVar[bool] = True

    name: Literal["hap"] = "hap"
    num_probes: Count = Field(default=8, description="random vectors, each one pass over the data")

    def saliency(self, context: "Context") -> "Saliency":
        """All processes draw the same vectors."""
        import torch

        from sosp_hub.derivatives import hessian_product

        measured = context.model, context.groups, context.several_passes(self.name)
        protocol = context.protocol(self.gate, self.micro_batch_size)
        generator = torch.Generator().manual_seed(context.seed)
        total = {
            name: torch.zeros(group.size, dtype=torch.float64)
            for name, group in context.groups.items()
        }
        for _ in range(self.num_probes):
            signs = {
                name: 2.0 * torch.randint(2, (group.size,), generator=generator) - 1
                for name, group in context.groups.items()
            }
            product = hessian_product(
                *measured, protocol, vector=signs, mode=self.mode, eps=self.eps
            )
            for name, part in product.second.items():
                total[name] += signs[name] * part
        return {name: part / (2 * self.num_probes) for name, part in total.items()}
