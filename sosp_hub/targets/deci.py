"""DeciLM: one width and one number of KV heads for each layer."""

from collections.abc import Collection, Sequence
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.section import Count
from sosp_hub.recipe.targets import TARGETS, Target, multiples
from sosp_hub.targets.writers.widths import DECI_STEP, shared_out

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

    def counts(self, group: "Group", others: "Sequence[Group]" = ()) -> Collection[int] | None:
        """Widths in steps, KV heads that divide; a stream that all layers share stays whole."""
        del others
        if group.kind == "layer":
            return None
        if group.kind == "neuron":
            return multiples(group, lcm(DECI_STEP, self.tensor_parallel))
        if group.kind in ("head", "kv_group"):
            num_heads = group.size * _queries_per_kv(group)
            divide = (n for n in range(1, group.size) if num_heads % n == 0)
            return [n for n in divide if shared_out(n, self.tensor_parallel)]
        return ()

    def check(self, model: Any) -> None:
        """Llama or Mistral, attending to everything, whose heads the processes share."""
        from sosp_hub.targets.writers.deci import filling

        filling(model, self.tensor_parallel)

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """A folder with config, weights and the class of the config."""
        from sosp_hub.targets.writers.deci import to_deci

        return to_deci(model, path, tokenizer, tensor_parallel=self.tensor_parallel)


def _queries_per_kv(group: "Group") -> int:
    """Query heads that share one KV head, from the sizes of what makes them."""
    made = [int((member.index >= 0).sum()) for member in group.members if not member.reads]
    return max(made) // min(made)
