"""GGUF: llama.cpp and what is built on it."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.targets import TARGETS, Target, rows_in_steps

if TYPE_CHECKING:
    from sosp_hub.structure.groups import Group

Quantization = Literal["none", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "k"]
BLOCKS = {"none": 1, "k": 256}
"""Values of a row that a quantised type packs together; 32 where it is not listed."""


@TARGETS.declare
class Gguf(Target):
    """A GGUF file of llama.cpp's architecture ``deci``, for Llama, Mistral and Qwen2."""

    reads: ClassVar[str] = "llama.cpp, Ollama, LM Studio"
    suffix: ClassVar[str] = ".gguf"

    name: Literal["gguf"] = "gguf"
    quantization: Quantization = Field(
        default="none",
        description="type of the matrices; k: rows that K-quants can pack, which llama.cpp's own "
        "llama-quantize makes of the file",
    )

    def counts(self, group: "Group") -> Collection[int] | None:
        """Rows that the type can pack."""
        step = BLOCKS.get(self.quantization, 32)
        return None if step == 1 or group.kind == "layer" else rows_in_steps(group, step)

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        from sosp_hub.targets.writers.gguf import to_gguf

        kind = None if self.quantization in ("none", "k") else self.quantization
        return to_gguf(model, path, tokenizer, quantization=kind)
