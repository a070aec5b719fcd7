"""An archive of torch.export, whatever the widths."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, Target


@TARGETS.declare
class TorchExport(Target):
    """A ``torch.export`` archive of one forward pass, for any number of samples."""

    reads: ClassVar[str] = "torch.export.load, and what starts from it: AOTInductor, ExecuTorch"
    suffix: ClassVar[str] = ".pt2"

    name: Literal["torch_export"] = "torch_export"

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        from sosp_hub.targets.writers.forms import to_archive

        return to_archive(model, path)
