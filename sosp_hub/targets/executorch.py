"""ExecuTorch, whatever the widths."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.section import Count
from sosp_hub.recipe.targets import TARGETS, Target


@TARGETS.declare
class ExecuTorch(Target):
    """An ExecuTorch program: a token at a time with a cache inside, or one forward pass."""

    reads: ClassVar[str] = "ExecuTorch"
    suffix: ClassVar[str] = ".pte"

    name: Literal["executorch"] = "executorch"
    max_tokens: Count = Field(
        default=1024, description="room in the cache of a model that generates text"
    )

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        from sosp_hub.targets.writers.runtimes import to_executorch

        return to_executorch(model, path, max_tokens=self.max_tokens)
