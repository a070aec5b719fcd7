"""How much gradient is left when a structure goes."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, Method, Needs, SecondOrderCriterion

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Grasp(SecondOrderCriterion):
    """``(H g)_s``: how much the squared gate gradient falls, to first order, when a structure goes.

    The squared norm of the gradient has the gradient ``2 H g``, so that what has the least ``H g``
    leaves the most gradient to learn with and goes first. The sign counts.

    Paper: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR
    2020, arXiv 2002.07376, which removes the weights with the largest ``-w (H g)``.

    Differs from the paper: gates, which are 1, take the place of weights; the model is trained.
    """

    paper: ClassVar[str] = "arXiv 2002.07376"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    name: Literal["grasp"] = "grasp"

    def saliency(self, context: "Context") -> "Saliency":
        """The data is gone through twice: ``g`` is the gradient of the mean over all of it."""
        from sosp_hub.derivatives import gate_gradient, hessian_product

        measured = context.model, context.groups, context.several_passes(self.name)
        protocol = context.protocol(self.gate, self.micro_batch_size)
        gradient = gate_gradient(*measured, protocol).gradient
        largest = max(float(g.abs().max()) for g in gradient.values()) or 1.0
        direction = {name: g / largest for name, g in gradient.items()}  # the size of a step
        product = hessian_product(
            *measured, protocol, vector=direction, mode=self.mode, eps=self.eps
        )
        return {name: part * largest for name, part in product.second.items()}

    def method(self) -> Method:
        """With its gates."""
        words = f"{self.gate_words()}, H the Hessian of that loss in the same gates."
        return Method("(H g)_s", words)
