"""Gradual schedules: how much is kept after each of several cuts."""

from typing import Annotated, Literal

from pydantic import Field

from sosp_hub.recipe.section import Section

Curve = Literal["cubic", "linear"]
"""How the shares of rounds go."""


class ScheduleSection(Section):
    """Several cuts, each scored and rebuilt anew, with training between them or without."""

    rounds: Annotated[int, Field(ge=2, le=100)] = Field(default=5, description="cuts")
    share: Curve = Field(
        default="cubic",
        description="cubic cuts most in the first rounds, linear the same in each",
    )
    epochs: Annotated[int, Field(ge=0)] = Field(
        default=1,
        description="of training after each cut but the last, which is followed by `finetune`; 0 = "
        "scored anew on what the rebuild has made of it, without training",
    )


def kept_after(kept: float, number: int, rounds: int, share: str) -> float:
    """The share that is left after so many of the rounds.

    >>> [round(kept_after(0.5, n, 4, "linear"), 3) for n in range(5)]
    [1.0, 0.875, 0.75, 0.625, 0.5]
    >>> [round(kept_after(0.5, n, 4, "cubic"), 3) for n in range(5)]
    [1.0, 0.711, 0.562, 0.508, 0.5]
    """
    left = 1 - number / rounds
    return kept + (1 - kept) * (left**3 if share == "cubic" else left)
