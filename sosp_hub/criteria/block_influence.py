"""How much a layer turns what goes through it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sosp_hub.criteria.activations import check_data, run, sum_over_processes, unpadded
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.errors import CriterionError
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


@register
@final
@dataclass(frozen=True)
class BlockInfluence:
    """``1 - E cos(input, output)`` of a whole layer: the least changes its stream least.

    The mean runs over tokens; over samples where a layer works on maps.

    Paper: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv 2403.03853.

    Differs from the paper: padding does not count; any stack of layers with one stream, vision
    included.

    Attributes:
        process_sum: Sum over processes.
    """

    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "block_influence"
    paper: ClassVar[str] = "arXiv 2403.03853"
    needs: ClassVar[Needs] = "inputs"
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch."""
        layers = [layer for group in graph.groups.values() for layer in group.layers]
        totals = torch.zeros(2, len(layers), dtype=torch.float64)

        def see(number: int, entry: Tensor, result: Any, mask: Tensor | None) -> None:
            turned, count = _turned(entry, _first_tensor(result), mask)
            totals[:, number] += torch.stack([turned, count]).to("cpu", torch.float64)

        seen = run(model, batches, [(layer, i) for i, layer in enumerate(layers)], see)
        samples, turned, counts = sum_over_processes(
            [torch.tensor([float(seen)]), *totals], self.process_sum
        )
        check_data(samples)
        if not counts.all():
            raise CriterionError(
                f"layer {layers[int(counts.argmin())]!r} did not run on the calibration data, so "
                "its influence is not known; score other kinds (`kinds=`)"
            )
        parts = (turned / counts).split([group.size for group in graph.groups.values()])
        return {name: part.clone() for name, part in zip(graph.groups, parts, strict=True)}


def _turned(entry: Tensor, result: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of ``1 - cos`` and the number of vectors."""
    wide = torch.promote_types(entry.dtype, torch.float32)
    entry, result = (x.detach().to(wide) for x in (entry, result))
    if entry.ndim != 3:
        entry, result = entry.flatten(1), result.flatten(1)
    turned = 1 - cosine_similarity(entry, result, dim=-1)
    mask = unpadded(mask, tuple(turned.shape))
    weight = torch.ones_like(turned) if mask is None else mask.to(turned)
    return (turned * weight).sum(), weight.sum()


def _first_tensor(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
