"""The diagonal of the empirical Fisher matrix in gate space."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, Criterion, Method, Needs, gate_words
from sosp_hub.recipe.section import Count

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Fisher(Criterion):
    """Mean over samples of the squared gate gradient of each sample's own loss.

    ``F_s = E_n (dL_n / dm_s)^2``: how much the loss of a sample moves with a structure, whichever
    way. The loss of a sample of a causal language model is the sum over its label tokens.

    ``per_token`` squares each token's share of that gradient by itself, ``E_n sum_t (dL_n /
    dm_st)^2``: what one token needs a structure for is not taken off by what another one would
    rather be without. On SmolLM2-135M, rebuilt, it is ahead in each of three draws, on
    other texts in two of them (tests/bench/results/rebuild.md).

    Paper: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv
    1801.05787, whose gates on feature maps these are; the labels are the data's (empirical Fisher).

    Differs from the paper: the factor 1/2 is left out, which changes no order, and costs are left
    to the budget. ``per_token`` is ours.
    """

    paper: ClassVar[str] = "arXiv 1801.05787"
    needs: ClassVar[Needs] = "labels"
    formula: ClassVar[str] = "mean over samples of (g_n,s)^2"
    first_order: ClassVar[bool] = True
    scores_only: ClassVar[str] = "read where a gate can stand"
    words: ClassVar[str] = f"{gate_words()}, g_n of one sample's loss."

    name: Literal["fisher"] = "fisher"
    per_token: bool = Field(
        default=False,
        description="square each token's share by itself: texts alone, and layers that see all of "
        "their tokens, which experts do not",
    )
    micro_batch_size: Count | None = Field(
        default=None,
        description="most samples of one pass; null = whole batches; one where experts' weights "
        "hold the gates",
    )

    def method(self) -> Method:
        """Of whole samples, or token by token."""
        if self.per_token:
            words = f"{gate_words()}, g_nt token t's share of that of one sample's loss."
            return Method("mean over samples n of sum over tokens t of (g_nt,s)^2", words)
        return super().method()

    def of_tokens(self) -> str | None:
        """Token by token."""
        return "per_token" if self.per_token else None

    @staticmethod
    def can_score(group: Any) -> bool:
        """Whether a gate has a place."""
        return bool(group.sites)

    def saliency(self, context: "Context") -> "Saliency":
        """One backward pass per batch, with gates of their own for every sample or token."""
        from sosp_hub.derivatives import sample_squares

        protocol = context.protocol(micro_batch_size=self.micro_batch_size)
        found = sample_squares(
            context.model, context.groups, context.batches, protocol, per_token=self.per_token
        )
        return found.second
