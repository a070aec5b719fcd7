"""Weights times the size of what they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from sosp_hub.criteria.activations import Seen, mean_of_sites, site_means
from sosp_hub.criteria.ranking import standardized
from sosp_hub.criteria.registry import HasGroups, Needs, register
from sosp_hub.errors import CriterionError
from sosp_hub.structure.groups import Group, Site

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

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch."""
        groups = graph.groups
        readers = {name: _readers(model, group) for name, group in groups.items()}
        if unread := [group for name, group in groups.items() if not readers[name]]:
            shown = ", ".join(f"{group.name!r} ({group.kind})" for group in unread[:8])
            raise CriterionError(
                f"criterion 'wanda_sp': no linear layer or ungrouped convolution reads {shown}; "
                "score other kinds (`kinds=`), or use `magnitude` or `activation`"
            )
        means = site_means(model, groups, batches, _squares, self.process_sum, by_position=True)
        scores = mean_of_sites(
            {
                name: {
                    i: _by_structure(group, group.sites[i], readers[name][i] * mean.sqrt())
                    for i, mean in means[name].items()
                    if i in readers[name]
                }
                for name, group in groups.items()
            }
        )
        return standardized(scores, "weights times activations") if self.standardize else scores


def _readers(model: nn.Module, group: Group) -> dict[int, Tensor]:
    """For the sites whose module has such weights: the mean of ``abs(W)`` of each position."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    readers = {}
    for number, site in enumerate(group.sites):
        for member in group.members:
            fits = member.reads and np.array_equal(member.index, site.index)
            if fits and member.tensor == f"{site.module}.weight":
                weight = parameters[member.tensor].detach().movedim(member.dim, 0)
                readers[number] = weight.flatten(1).abs().mean(1).to("cpu", torch.float64)
    return readers


def _squares(seen: Seen) -> tuple[Tensor, Tensor]:
    return seen.rows.square().sum((0, 1)), seen.places.sum()


def _by_structure(group: Group, site: Site, values: Tensor) -> Tensor:
    index = torch.from_numpy(site.index)
    total = torch.zeros(group.size, dtype=torch.float64)
    return total.index_add_(0, index[index >= 0], values[index >= 0])
