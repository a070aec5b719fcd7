"""The control: random scores."""

from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from sosp_hub.recipe.criteria import CRITERIA, Criterion, Needs
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Random(Criterion):
    """Uniform in [0, 1), the same for the same seed."""

    paper: ClassVar[str] = "control"
    needs: ClassVar[Needs] = "nothing"
    kinds: ClassVar[tuple[Kind, ...]] = get_args(Kind)
    formula: ClassVar[str] = "uniform"
    words: ClassVar[str] = "The control: neither data nor weights are looked at."

    name: Literal["random"] = "random"

    def saliency(self, context: "Context") -> "Saliency":
        """Looks at nothing."""
        import torch

        generator = torch.Generator().manual_seed(context.seed)
        return {
            name: torch.rand(group.size, generator=generator)
            for name, group in context.groups.items()
        }
