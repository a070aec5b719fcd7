"""How much a layer turns what goes through it."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sosp_hub.errors import CriterionError
from sosp_hub.recipe.criteria import CRITERIA, Criterion, Needs
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class BlockInfluence(Criterion):
    """``1 - E cos(input, output)`` of a whole layer: the least changes its stream least.

    The mean runs over tokens; over samples where a layer works on maps.

    Paper: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect", arXiv 2403.03853.

    Differs from the paper: padding does not count; any stack of layers with one stream, vision
    included.
    """

    paper: ClassVar[str] = "arXiv 2403.03853"
    needs: ClassVar[Needs] = "inputs"
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)
    formula: ClassVar[str] = "1 - mean of cos(x_s, y_s)"
    words: ClassVar[str] = "x goes into the layer and y comes out of it; the mean is over tokens."

    name: Literal["block_influence"] = "block_influence"

    def saliency(self, context: "Context") -> "Saliency":
        """One forward pass per batch."""
        import torch

        from sosp_hub.criteria.compute.activations import check_data, run, sum_over_processes

        groups = context.groups
        layers = [layer for group in groups.values() for layer in group.layers]
        totals = torch.zeros(2, len(layers), dtype=torch.float64)

        def see(number: int, entry: "Tensor", result: Any, mask: "Tensor | None") -> None:
            turned, count = _turned(entry, _first_tensor(result), mask)
            totals[:, number] += torch.stack([turned, count]).to("cpu", torch.float64)

        watched = [(layer, i) for i, layer in enumerate(layers)]
        seen = run(context.model, context.batches, watched, see)
        samples, turned, counts = sum_over_processes(
            [torch.tensor([float(seen)]), *totals], context.process_sum
        )
        check_data(samples)
        if not counts.all():
            raise CriterionError(
                f"layer {layers[int(counts.argmin())]!r} did not run on the calibration data, so "
                "its influence is not known; score other kinds (`kinds=`)"
            )
        parts = (turned / counts).split([group.size for group in groups.values()])
        return {name: part.clone() for name, part in zip(groups, parts, strict=True)}


def _turned(entry: "Tensor", result: "Tensor", mask: "Tensor | None") -> "tuple[Tensor, Tensor]":
    """Sum of ``1 - cos`` and the number of vectors."""
    import torch
    from torch.nn.functional import cosine_similarity

    from sosp_hub.criteria.compute.activations import unpadded

    wide = torch.promote_types(entry.dtype, torch.float32)
    entry, result = (x.detach().to(wide) for x in (entry, result))
    if entry.ndim != 3:
        entry, result = entry.flatten(1), result.flatten(1)
    turned = 1 - cosine_similarity(entry, result, dim=-1)
    mask = unpadded(mask, tuple(turned.shape))
    weight = torch.ones_like(turned) if mask is None else mask.to(turned)
    return (turned * weight).sum(), weight.sum()


def _first_tensor(result: Any) -> "Tensor":
    from torch import Tensor

    return result if isinstance(result, Tensor) else result[0]
