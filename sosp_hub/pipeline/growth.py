"""Which layers are bottlenecks, and by how much what grows."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch

from sosp_hub.cost import CostModel
from sosp_hub.plan import GrowthPlan, PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Groups

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


def ratios(groups: Groups, plan: PruningPlan) -> dict[str, float]:
    """Share of each group that a plan removes."""
    kept = plan.num_kept()
    return {name: 1 - kept.get(name, group.size) / group.size for name, group in groups.items()}


def global_ratio(groups: Groups, plan: PruningPlan) -> float:
    """Share of all structures that a plan removes."""
    total = sum(group.size for group in groups.values())
    return sum(groups[name].size - num for name, num in plan.num_kept().items()) / total


def bottlenecks(groups: Groups, plan: PruningPlan, threshold: float) -> list[str]:
    """Groups of which a plan removes less than ``threshold`` times the share of all structures.

    Expand-pruning of Nonnenmacher et al. (arXiv 2110.11395). What counts as low is not told in the
    paper; a share of the global ratio is our choice.
    """
    limit = threshold * global_ratio(groups, plan)
    return [name for name, ratio in ratios(groups, plan).items() if ratio < limit]


def widened(graph: Graph, names: Sequence[str], factor: float, saliency: "Saliency") -> GrowthPlan:
    """So many times the structures of each group; of a fraction the most salient are copied."""
    copies: dict[str, tuple[int, ...]] = {}
    for name, count in _counts(graph, names, factor).items():
        size = graph.groups[name].size
        each, more = divmod(count, size)
        numbers = torch.full((size,), each)
        numbers[saliency[name].argsort(descending=True, stable=True)[:more]] += 1
        copies[name] = tuple(numbers.tolist())
    return GrowthPlan(copies)


def factor_of_equal_size(
    graph: Graph, growth: GrowthPlan, names: Sequence[str], most: float
) -> float:
    """By which all ``names`` have to grow to make as many parameters as ``growth``."""
    cost = CostModel(graph)
    wanted = cost(growth.num_kept()).params
    low, high = 1.0, most
    for _ in range(40):
        middle = (low + high) / 2
        params = cost(_counts(graph, names, middle)).params
        low, high = (middle, high) if params < wanted else (low, middle)

    def miss(factor: float) -> int:
        return abs(cost(_counts(graph, names, factor)).params - wanted)

    return min(low, high, key=miss)


def _counts(graph: Graph, names: Sequence[str], factor: float) -> Mapping[str, int]:
    counts = {}
    for name in names:
        group = graph.groups[name]
        step = group.multiple
        counts[name] = max(group.size, ceil(round(factor * group.size) / step) * step)
    return counts
