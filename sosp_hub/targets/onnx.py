"""ONNX, whatever the widths."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, Target


@TARGETS.declare
class Onnx(Target):
    """An ONNX file of one forward pass, for any number of samples."""

    reads: ClassVar[str] = "ONNX Runtime, OpenVINO, TensorRT"
    suffix: ClassVar[str] = ".onnx"

    name: Literal["onnx"] = "onnx"

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        from sosp_hub.targets.writers.forms import to_onnx

        return to_onnx(model, path)
