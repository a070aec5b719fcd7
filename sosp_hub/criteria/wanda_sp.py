"""Weights times the size of what they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor, nn

from sosp_hub.criteria.activations import (
    WATCHED,
    Seen,
    is_watched,
    mean_of_sites,
    site_means,
)
from sosp_hub.criteria.ranking import standardized
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.criteria.weights import by_structure, check_read, reading

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


@register
@final
@dataclass(frozen=True)
class WandaSp:
    """Mean over rows of ``abs(W_ij)`` times the root mean square of input ``j``.

    ``W`` are the weights that read the structure (``down_proj``, the output projection of heads,
    the next convolution); where a structure has several inputs ``j`` they are added up.

    Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    AAAI 2024, arXiv 2312.11983, where Wanda-sp is a baseline, after Sun et al., arXiv 2306.11695.

    Differs from the paper: root mean square over tokens for L2, which changes no order; a mean over
    the kernel of a convolution; padding does not count; scores are standardised within each group;
    weights that read the same group in several places are averaged.

    Attributes:
        standardize: Mean 0 and standard deviation 1 within each group.
        process_sum: Sum over processes.
    """

    standardize: bool = True
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "wanda_sp"
    paper: ClassVar[str] = "arXiv 2312.11983"
    needs: ClassVar[Needs] = "inputs"
    scores_only: ClassVar[str] = WATCHED
    able = staticmethod(is_watched)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch."""
        groups = graph.groups
        readers = {
            name: reading(model, group, lambda weight: weight.abs().mean(1))
            for name, group in groups.items()
        }
        check_read(groups, readers, self.name)
        means = site_means(model, groups, batches, _squares, self.process_sum, per_position=1)
        scores = mean_of_sites(
            {
                name: {
                    i: by_structure(group, group.sites[i], readers[name][i] * mean[0].sqrt())
                    for i, mean in means[name].items()
                    if i in readers[name]
                }
                for name, group in groups.items()
            }
        )
        return standardized(scores, "weights times activations") if self.standardize else scores


def _squares(seen: Seen) -> tuple[Tensor, Tensor]:
    return seen.rows.square().sum((0, 1))[None], seen.places.sum()
