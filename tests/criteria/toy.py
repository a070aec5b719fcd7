"""A criterion that only the tests know: all that a new one needs stands in this one file."""

from typing import ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, Criterion, Needs


@CRITERIA.declare
class Toy(Criterion):
    """The place of a structure in its group, so that the last ones stay.

    Paper: none.
    """

    paper: ClassVar[str] = "a test"
    needs: ClassVar[Needs] = "nothing"
    formula: ClassVar[str] = "the place of s in its group"
    words: ClassVar[str] = "Neither weights nor data are looked at."

    name: Literal["toy"] = "toy"
    slope: float = Field(default=1.0, description="how much a place counts")

    def saliency(self, context):
        """Looks at the sizes of groups."""
        import torch

        return {
            name: self.slope * torch.arange(group.size, dtype=torch.float64)
            for name, group in context.groups.items()
        }
