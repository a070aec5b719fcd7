"""DeciLM: one width and one number of KV heads for each layer."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.section import Count
from sosp_hub.recipe.targets import TARGETS, Target, multiples
from sosp_hub.targets.writers.widths import DECI_STEP

if TYPE_CHECKING:
    from sosp_hub.structure.groups import Group


@TARGETS.declare
class Deci(Target):
    """A DeciLM checkpoint (``nemotron-nas``), for Llama and Mistral.

    A plan that meets it wastes nothing: widths are multiples of 256, and KV heads divide the query
    heads. Any other plan is filled up with zeros.
    """

    reads: ClassVar[str] = "mlx-lm, TensorRT-LLM, llama.cpp's converter, vLLM and SGLang"

    name: Literal["deci"] = "deci"
    tensor_parallel: Count = Field(
        default=1, description="processes that share each layer's heads and neurons"
    )

    def counts(self, group: "Group") -> Collection[int] | None:
        """Widths in steps, KV heads that divide; a stream that all layers share stays whole."""
        if group.kind == "layer":
            return None
        if group.kind == "neuron":
            return [n for n in multiples(group, DECI_STEP) if n % self.tensor_parallel == 0]
        if group.kind in ("head", "kv_group"):
            num_heads = group.size * _queries_per_kv(group)
            return [n for n in range(1, group.size) if num_heads % n == 0 and self._shared_out(n)]
        return ()

    def _shared_out(self, num_kv: int) -> bool:
        """Whether each process gets as many KV heads, or a copy of one."""
        return num_kv % self.tensor_parallel == 0 or self.tensor_parallel % num_kv == 0

    def check(self, model: Any) -> None:
        """Llama or Mistral, attending to everything."""
        from sosp_hub.targets.writers.deci import check

        check(model)

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """A folder with config, weights and the class of the config."""
        from sosp_hub.targets.writers.deci import to_deci

        return to_deci(model, path, tokenizer)


def _queries_per_kv(group: "Group") -> int:
    """Query heads that share one KV head, from the sizes of what makes them."""
    made = [int((member.index >= 0).sum()) for member in group.members if not member.reads]
    return max(made) // min(made)
