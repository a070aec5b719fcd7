"""SOSP-H: first-order term and full Hessian row sums of the loss in gate space."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, SOSP, Method, Needs, SecondOrderCriterion

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class SospH(SecondOrderCriterion):
    """``abs(g) + 1/2 abs(r)`` with ``g`` the gate gradient and ``r`` the row sums of the Hessian.

    Paper: Nonnenmacher et al., "SOSP: Efficiently Capturing Global Correlations by Second-Order
    Structured Pruning", ICLR 2022, arXiv 2110.11395. The authors published no code; the absolute
    values are our reading.

    Differs from the paper: a structure is the activation that disappears, one linear gate for all
    that is cut together (``gate: weight`` is the paper's: the filter's own weights).
    """

    paper: ClassVar[str] = "arXiv 2110.11395"
    needs: ClassVar[Needs] = "labels"

    name: Literal["sosp_h"] = "sosp_h"

    def saliency(self, context: "Context") -> "Saliency":
        """Absolute values are taken after the mean over all batches and processes."""
        from sosp_hub.derivatives import hessian_product

        protocol = context.protocol(self.gate, self.micro_batch_size)
        derivatives = hessian_product(
            context.model,
            context.groups,
            context.batches,
            protocol,
            mode=self.mode,
            eps=self.eps,
        )
        return {
            name: g.abs() + 0.5 * derivatives.second[name].abs()
            for name, g in derivatives.gradient.items()
        }

    def method(self) -> Method:
        """With its gates."""
        return Method(
            "|g_s| + 1/2 |r_s|,   r = H 1",
            f"{self.gate_words()}, H the Hessian of that loss in the same gates, so that r_s also "
            f"counts how s interacts with every other structure in every layer. {SOSP}",
        )
