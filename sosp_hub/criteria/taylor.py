"""First-order Taylor saliency."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, GateCriterion, Method, Needs

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Taylor(GateCriterion):
    """How much the loss changes to first order when a structure goes.

    Paper: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv
    1906.10771, whose gate form this is. ``form: squared`` depends on the batch size.
    """

    paper: ClassVar[str] = "arXiv 1906.10771"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True

    name: Literal["taylor"] = "taylor"
    form: Literal["abs", "squared"] = Field(
        default="abs", description="abs(g) of the mean, or the mean over batches of g^2"
    )

    def saliency(self, context: "Context") -> "Saliency":
        """One backward pass per batch."""
        from sosp_hub.derivatives import batch_squares, gate_gradient

        protocol = context.protocol(self.gate, self.micro_batch_size)
        if self.form == "squared":
            return batch_squares(context.model, context.groups, context.batches, protocol).second
        derivatives = gate_gradient(context.model, context.groups, context.batches, protocol)
        return {name: g.abs() for name, g in derivatives.gradient.items()}

    def method(self) -> Method:
        """By its form."""
        if self.form == "squared":
            words = f"{self.gate_words()}, one batch at a time."
            return Method("mean over batches of (g_s)^2", words)
        return Method("|g_s|", f"{self.gate_words()}; first order.")
