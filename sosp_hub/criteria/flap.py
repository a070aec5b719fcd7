"""Weights times how much what they read fluctuates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
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
class Flap:
    """Variance of input ``j`` times the squared norm of the weights ``W_:j`` that read it.

    An input that hardly changes can be replaced by its mean, however large it is. Where a structure
    has several inputs ``j`` (a head) they are added up.

    Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    AAAI 2024, arXiv 2312.11983, which standardises scores within each layer, as here, and so finds
    the width of every layer in one ranking of all.

    Differs from the paper: bias compensation (the mean of what goes, times its weights, added to
    the bias of the layer that reads it) is ``criterion.compensate_bias``, off by default and there
    for every criterion; no layer gets a bias that had none, as in most language models. Where a
    BatchNorm follows, re-estimated statistics (``finetune.recalibrate_norm``) do the same;
    ``compensate`` makes up for the cut by factors. The variance is over all tokens, padding left
    out; weights that read the same group in several places are averaged.

    Attributes:
        standardize: Mean 0 and standard deviation 1 within each group.
        process_sum: Sum over processes.
    """

    standardize: bool = True
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "flap"
    paper: ClassVar[str] = "arXiv 2312.11983"
    needs: ClassVar[Needs] = "inputs"
    scores_only: ClassVar[str] = WATCHED
    able = staticmethod(is_watched)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch."""
        groups = graph.groups
        norms = {
            name: reading(model, group, lambda weight: weight.square().sum(1))
            for name, group in groups.items()
        }
        check_read(groups, norms, self.name)
        means = site_means(model, groups, batches, _moments, self.process_sum, per_position=2)
        scores = mean_of_sites(
            {
                name: {
                    i: by_structure(group, group.sites[i], norms[name][i] * _variance(*moments))
                    for i, moments in means[name].items()
                    if i in norms[name]
                }
                for name, group in groups.items()
            }
        )
        return standardized(scores, "fluctuation") if self.standardize else scores


def _moments(seen: Seen) -> tuple[Tensor, Tensor]:
    """Sums of x and of its square over samples and places."""
    rows = seen.rows.double()
    return torch.stack([rows.sum((0, 1)), rows.square().sum((0, 1))]), seen.places.sum()


def _variance(mean: Tensor, square: Tensor) -> Tensor:
    return (square - mean.square()).clamp(min=0)
