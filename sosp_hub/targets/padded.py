"""A plain checkpoint of any plan: zeros fill up narrow layers."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, Target


@TARGETS.declare
class Padded(Target):
    """A plain transformers checkpoint, each layer as wide as the widest: zeros fill up the rest."""

    reads: ClassVar[str] = "transformers and all that loads its checkpoints"

    name: Literal["padded"] = "padded"

    def check(self, model: Any) -> None:
        """A transformers model whose narrow layers zeros can fill up."""
        from sosp_hub.targets.writers.padded import filling

        filling(model)

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """A folder, as the library's own save makes it."""
        from sosp_hub.targets.writers.padded import padded

        wide: Any = padded(model)
        wide.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        return path
