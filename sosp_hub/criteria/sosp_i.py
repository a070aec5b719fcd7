"""SOSP-I: correlations between structures of all layers, from the Gauss-Newton matrix."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.errors import CriterionError
from sosp_hub.recipe.criteria import (
    CRITERIA,
    SOSP,
    CurvatureSection,
    GateCriterion,
    Method,
    Needs,
    PerSampleCriterion,
)
from sosp_hub.recipe.section import Count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.criteria.compute.curvature import CurvatureMeasure
    from sosp_hub.derivatives import Matrix
    from sosp_hub.types import Saliency


@CRITERIA.declare
class SospI(GateCriterion, PerSampleCriterion, CurvatureSection):
    """Second order from ``Q = mean_n J' R J``, with ``J`` the Jacobian of the logits by the gates.

    Paper: Nonnenmacher et al., "SOSP: Efficiently Capturing Global Correlations by Second-Order
    Structured Pruning", ICLR 2022, arXiv 2110.11395, whose set saliency (our reading, there is no
    code) is ``sum abs(g_s) + 1/2 sum abs(Q_ss')`` over the removed ``s``, ``s'``.

    Differs from the paper: gates on activations; ``signed`` and ``surgeon`` drop the first-order
    term and keep the signs of ``Q`` (our choices, the latter the field's Optimal Brain Surgeon).

    ``selection``: ``row_sum`` is ``abs(g) + 1/2 sum_s' abs(Q_ss')``; ``greedy`` removes one after
    the other, least set saliency first; ``signed`` is greedy with the signs of ``Q``; ``surgeon``
    the same where the other gates move to make up for each removal.

    ``damping``, of the surgeon, is added to ``Q``'s diagonal, as a share of its mean. Where samples
    are few, the eigenvalues that are not 0 are larger than that mean, by structures over rows (of
    samples times classes or draws): 0.01 or 1 is then hardly any damping.

    With ``rescore_every`` the matrix is measured again after so many removals, at the gates so far,
    which first take a damped step toward the dense model's outputs where that brings them nearer;
    two more passes over the data each time.
    """

    paper: ClassVar[str] = "arXiv 2110.11395"
    needs: ClassVar[Needs] = "labels"
    uses_units: ClassVar[bool] = True
    uses_curvature: ClassVar[bool] = True
    shared_options: ClassVar[tuple[str, ...]] = ("damping",)

    name: Literal["sosp_i"] = "sosp_i"
    selection: Literal["row_sum", "greedy", "signed", "surgeon"] = Field(
        default="row_sum", description="scores, or an order of removal (see the criterion)"
    )
    rescore_every: Count | None = Field(
        default=None,
        description="of the surgeon: removals between two measurements of the matrix; null = one",
    )
    keep_at_least: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of each group that no order removes"
    )

    def compensates(self) -> bool:
        """By default where the order of removal counts on it."""
        return self.selection == "surgeon" if self.compensate is None else self.compensate

    def by_damping(self) -> bool:
        """The order of a surgeon does."""
        return self.selection == "surgeon"

    def curvature(self) -> dict[str, Any]:
        """As this section says."""
        return self.model_dump(include=set(CurvatureSection.model_fields))

    def training_passes(self, num_outputs: int | None = None) -> float:
        """A forward pass, and a backward pass for each output or drawn label."""
        few = num_outputs is not None and num_outputs <= self.max_classes
        return (1 + 2 * (num_outputs if few and num_outputs else self.num_draws)) / 3

    def conflicts(self) -> "Iterator[tuple[str, str]]":
        """What only the surgeon does."""
        if self.rescore_every and self.selection != "surgeon":
            yield (
                "rescore_every",
                "only the surgeon's gates move on the way; write selection: surgeon, or leave it "
                "out",
            )
        if self.rescore_every and self.damping == "auto":
            yield (
                "rescore_every",
                "with damping: auto the matrix would be measured anew for every damping; write a "
                "number, or leave one of them out",
            )
        yield from super().conflicts()

    def method(self) -> Method:
        """By its selection."""
        if self.selection == "row_sum":
            return Method(
                "|g_s| + 1/2 sum over s' of |Q_ss'|,   Q = mean over samples of J' R J",
                f"{self.gate_words()}, J the Jacobian of the outputs by all gates, R the curvature "
                f"of the loss by the outputs. {SOSP}",
            )
        return Method(
            "position in the order of removal",
            "Q is the Gauss-Newton matrix of the loss in all gates; "
            f"`{self.selection}` removes one structure after the other, least first. {SOSP}",
        )

    def saliency(self, context: "Context") -> "Saliency":
        """Scores, or positions in the order of removal."""
        import torch

        from sosp_hub.derivatives import by_group

        groups, measure = context.groups, self.measure(context)
        curvature = context.curvature or measure.measure(context.model, groups, context.batches)
        context.unused.update(curvature.unused)
        num = sum(group.size for group in groups.values())
        if len(curvature.matrix) != num:
            raise CriterionError(
                f"criterion 'sosp_i': `curvature` is of {len(curvature.matrix)} structures, the "
                f"groups have {num}; give what was measured for the same kinds"
            )
        gradient = torch.cat([curvature.gradient[name] for name in groups])
        units = torch.cat([context.units[name] for name in groups]) if context.units else None
        return by_group(groups, self._scores(context, curvature.matrix, gradient, units))

    def measure(self, context: "Context") -> "CurvatureMeasure":
        """How the matrix is measured."""
        from sosp_hub.criteria.compute.curvature import CurvatureMeasure

        protocol = context.protocol(self.gate, self.micro_batch_size)
        return CurvatureMeasure(
            protocol,
            loss=self.loss,
            max_classes=self.max_classes,
            num_draws=self.num_draws,
            seed=context.seed,
        )

    def _scores(
        self, context: "Context", matrix: "Matrix", gradient: "Tensor", units: "Tensor | None"
    ) -> "Tensor":
        import torch

        from sosp_hub.criteria.compute.elimination import (
            Floors,
            absolute_row_sums,
            greedy_order,
            surgeon_order,
        )

        if self.selection == "row_sum":
            scores = gradient.abs() + absolute_row_sums(matrix) / 2
            return scores if units is None else scores / units
        first = gradient if self.selection == "greedy" else None
        if not matrix.diagonal().any() and (first is None or not first.any()):
            return torch.zeros_like(gradient)  # an order of what changes nothing ranks nothing
        floors = Floors([group.size for group in context.groups.values()], self.keep_at_least)
        if self.selection == "surgeon":
            order = surgeon_order(
                matrix, floors, self._share(), units, self.rescore_every, self._remeasure(context)
            )
        else:
            order = greedy_order(matrix, floors, first, units)
        scores = torch.full_like(gradient, len(order))
        scores[order] = torch.arange(len(order), dtype=scores.dtype)
        return scores

    def _remeasure(self, context: "Context") -> "Callable[[Tensor, Tensor], tuple[Matrix, Tensor]]":
        """From the gates so far, and which are left, to the matrix there and the gates to go on."""
        import torch

        from sosp_hub.criteria.compute.elimination import damped_step
        from sosp_hub.derivatives import by_group

        model, groups, batches = context.model, context.groups, context.batches
        measure = self.measure(context)

        def remeasure(gates: "Tensor", left: "Tensor") -> "tuple[Matrix, Tensor]":
            """Gates that come nearer to the dense model by a damped step start from there."""
            curvature = measure.measure(model, groups, batches, by_group(groups, gates))
            descent = -torch.cat(list(curvature.gradient.values()))
            step = damped_step(curvature.matrix, descent, left, self._share())
            moved = (gates + step).clamp(min=0)
            divergence = measure.divergence(model, groups, batches, by_group(groups, moved))
            return curvature.matrix, moved if divergence < curvature.loss else gates

        return remeasure

    def _share(self) -> float:
        if self.damping == "auto":
            raise CriterionError(
                "criterion 'sosp_i': damping: auto is chosen in a run of a recipe; write a number"
            )
        return self.damping
