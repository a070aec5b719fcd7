"""ONNX, whatever the widths."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, StepTarget


@TARGETS.declare
class Onnx(StepTarget):
    """An ONNX file of one forward pass, or of one step of generation, for any number of samples."""

    reads: ClassVar[str] = "ONNX Runtime, OpenVINO, TensorRT"
    suffix: ClassVar[str] = ".onnx"

    name: Literal["onnx"] = "onnx"

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        if self.cache:
            from sosp_hub.targets.writers.cached import to_onnx_with_cache

            return to_onnx_with_cache(model, path)
        from sosp_hub.targets.writers.forms import to_onnx

        return to_onnx(model, path)
