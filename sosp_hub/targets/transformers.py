"""transformers and timm themselves."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, Target


@TARGETS.declare
class Transformers(Target):
    """A checkpoint of transformers or timm: plain where layers are alike, else with a delta."""

    reads: ClassVar[str] = "transformers, timm and, without a delta, all that loads their files"
    uniform: ClassVar[bool] = True

    name: Literal["transformers"] = "transformers"

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """A folder; with a delta where a plain config does not say all."""
        from sosp_hub.checkpoint.io import save_pretrained

        return save_pretrained(model, path, tokenizer=tokenizer)
