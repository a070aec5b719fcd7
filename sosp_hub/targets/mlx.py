"""mlx-lm reads DeciLM checkpoints."""

from typing import ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS
from sosp_hub.targets.deci import Deci


@TARGETS.declare
class Mlx(Deci):
    """The same files as ``deci``, for mlx-lm on Apple's chips."""

    reads: ClassVar[str] = "mlx-lm"

    name: Literal["mlx"] = "mlx"
