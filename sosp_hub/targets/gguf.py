"""GGUF: llama.cpp and what is built on it."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.targets import TARGETS, Target, rows_in_steps

if TYPE_CHECKING:
    from sosp_hub.structure.groups import Group

Quantization = Literal[
    "none", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "k",
]  # fmt: skip


def block_of(quantization: str) -> int:
    """Values of a row that a quantised type packs together."""
    return 1 if quantization == "none" else 256 if "k" in quantization else 32


@TARGETS.declare
class Gguf(Target):
    """A GGUF file: one width a layer for Llama, Mistral, Qwen2 and Phi-3, one for Qwen3 and Gemma.

    The first are written as llama.cpp's architecture ``deci``, the others filled up with zeros.
    """

    reads: ClassVar[str] = "llama.cpp, Ollama, LM Studio"
    suffix: ClassVar[str] = ".gguf"

    name: Literal["gguf"] = "gguf"
    quantization: Quantization = Field(
        default="none",
        description="type of the matrices; those with k are mixtures that the package llama_cpp "
        "makes, k alone leaves that to llama.cpp's own llama-quantize",
    )

    fill: bool = Field(
        default=False, description="zeros fill up neurons until the type can pack their rows"
    )

    def counts(self, group: "Group", others: "Sequence[Group]" = ()) -> Collection[int] | None:
        """Rows that the type can pack."""
        step = block_of(self.quantization)
        return None if step == 1 or group.kind == "layer" else rows_in_steps(group, step, others)

    def check(self, model: Any) -> None:
        """A family that llama.cpp computes alike."""
        from sosp_hub.targets.writers.gguf import check

        check(model)

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """One file."""
        from sosp_hub.targets.writers.gguf import to_gguf

        kind = None if self.quantization in ("none", "k") else self.quantization
        return to_gguf(model, path, tokenizer, quantization=kind, fill=self.fill)
