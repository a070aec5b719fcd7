"""ExecuTorch, whatever the widths."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, Target


@TARGETS.declare
class ExecuTorch(Target):
    """An ExecuTorch program of one forward pass, for models that do not generate text."""

    reads: ClassVar[str] = "ExecuTorch"
    suffix: ClassVar[str] = ".pte"

    name: Literal["executorch"] = "executorch"

    def check(self, model: Any) -> None:
        """No text: its programs hold no cache."""
        from sosp_hub.targets.writers.runtimes import check_generates_no_text

        check_generates_no_text(model)

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        from sosp_hub.targets.writers.runtimes import to_executorch

        return to_executorch(model, path)
