"""OpenVINO, whatever the widths."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from sosp_hub.recipe.targets import TARGETS, StepTarget


@TARGETS.declare
class OpenVino(StepTarget):
    """OpenVINO's two files of one forward pass, or of one step of generation."""

    reads: ClassVar[str] = "OpenVINO"
    suffix: ClassVar[str] = ".xml"

    name: Literal["openvino"] = "openvino"

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """Two files; the path of the first."""
        from sosp_hub.targets.writers.runtimes import to_openvino

        return to_openvino(model, path, cache=self.cache)
