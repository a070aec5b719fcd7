"""What makes up for what a plan removes, whichever criterion chose it: gates, and constants."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sosp_hub.criteria.activations import ProcessSum, Seen, site_means
from sosp_hub.criteria.elimination import compensation
from sosp_hub.derivatives import Matrix, by_group
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group, Groups

if TYPE_CHECKING:
    from sosp_hub.types import Batches

Means = Mapping[str, Mapping[int, Tensor]]
"""Of each group, by the number of the site, the mean at each position."""


def compensated(
    plan: PruningPlan,
    groups: Groups,
    matrix: Matrix,
    damping: float = 0.01,
    *,
    fixed: Collection[str] = (),
) -> PruningPlan:
    """The plan with the gates of least damped quadratic loss; ``apply`` folds them into weights.

    With ``Q`` the Gauss-Newton matrix, ``R`` what the plan removes and ``K`` what it keeps:
    ``m_K = 1 + (Q_KK + lambda)^-1 Q_KR 1``, and then none under 0 (our choice; the closed form of
    Optimal Brain Surgeon's, over the gates of all layers at once). Groups that the plan leaves
    whole move too, and are then listed with all their structures.

    Args:
        plan: Any criterion's plan.
        groups: The groups that the matrix is of, in its order.
        matrix: The Gauss-Newton matrix.
        damping: ``lambda``, as a share of the mean of the matrix's diagonal.
        fixed: Groups whose gates stay at 1.
    """
    kept = {name: plan.kept.get(name, range(group.size)) for name, group in groups.items()}
    masks = [torch.zeros(group.size, dtype=torch.bool) for group in groups.values()]
    for name, mask in zip(groups, masks, strict=True):
        mask[list(kept[name])] = True
    still = [torch.full((g.size,), name in fixed) for name, g in groups.items()]
    gates = compensation(matrix, torch.cat(masks), damping, torch.cat(still))
    moved = {
        name: tuple(values[list(kept[name])].tolist())
        for name, values in by_group(groups, gates).items()
        if name not in fixed and bool((values[list(kept[name])] != 1).any())
    }
    whole = {name: tuple(kept[name]) for name in moved if name not in plan.kept}
    values = [value for gates in moved.values() for value in gates] or [1.0]
    range_ = {"least_gate": min(values), "largest_gate": max(values)}
    story = {"damping": damping, "groups": len(moved), **range_}
    return replace(
        plan,
        kept={**plan.kept, **whole},
        sizes={**plan.sizes, **{name: len(indices) for name, indices in whole.items()}},
        gates=moved,
        provenance={**plan.provenance, "compensation": story},
    )


def means_at_biases(
    model: nn.Module,
    graph: Graph,
    groups: Groups,
    batches: "Batches",
    process_sum: ProcessSum | None = None,
) -> Means:
    """The mean of every activation that goes into a layer with a bias: what ``shifted`` folds.

    Args:
        model: The dense model.
        graph: Its graph.
        groups: The groups that may be cut. A linear layer, or a convolution of one pixel, that
            reads one has to have a bias; wider convolutions pad with zeros, which is no constant.
        batches: Calibration data, gone through once.
        process_sum: Sum over processes.

    Returns:
        Nothing for groups that no such layer reads.
    """
    able = {
        name: group
        for name, group in groups.items()
        if group.exact and any(_biased(model, graph, group))
    }
    return site_means(model, able, batches, _sums, process_sum, per_position=1) if able else {}


def shifted(plan: PruningPlan, model: nn.Module, graph: Graph, means: Means) -> PruningPlan:
    """The plan with the mean of what it takes from a layer's input folded into that layer's bias.

    ``sum_s (1 - m_s) mean(x_s) W_s`` is added, with ``m_s`` the gate of structure ``s`` and 0 where
    it is removed, so that the layer's mean output stays what it was as far as its inputs do.

    Paper: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    AAAI 2024, arXiv 2312.11983.

    Differs from the paper: no bias is added to a layer that has none; gates take part.

    Args:
        plan: Any criterion's plan, gates included.
        model: The dense model.
        graph: Its graph.
        means: What ``means_at_biases`` found.
    """
    shifts: dict[str, Tensor] = {}
    for name in means.keys() & plan.kept.keys():
        group, kept = graph.groups[name], list(plan.kept[name])
        lost = torch.ones(group.size, dtype=torch.float64)
        lost[kept] = 1 - torch.tensor(plan.gates.get(name, [1.0] * len(kept)), dtype=torch.float64)
        for number, weight, bias in _biased(model, graph, group):
            if number not in means[name]:
                continue  # did not run
            index = torch.from_numpy(group.sites[number].index)
            less = torch.where(index >= 0, lost[index.clamp(min=0)], 0.0) * means[name][number][0]
            shifts[bias] = shifts.get(bias, 0.0) + weight @ less
    return replace(
        plan,
        shifts={bias: tuple(values.tolist()) for bias, values in shifts.items()},
        provenance={**plan.provenance, "shifted_biases": len(shifts)},
    )


def _biased(model: nn.Module, graph: Graph, group: Group) -> Iterator[tuple[int, Tensor, str]]:
    """Sites that a constant can be folded behind: number, weight (out x positions), bias."""
    parameters = dict(model.named_parameters())
    for number, site in enumerate(group.sites):
        weight, bias = f"{site.module}.weight", f"{site.module}.bias"
        for member in graph.readers(group.name):
            fits = member.tensor == weight and np.array_equal(member.index, site.index)
            if not fits or bias not in parameters or graph.aliases.get(bias):
                continue
            found = parameters[weight].detach().movedim(member.dim, -1)
            if found[..., 0].numel() == parameters[bias].numel():
                yield number, found.flatten(0, -2).to("cpu", torch.float64), bias


def _sums(seen: Seen) -> tuple[Tensor, Tensor]:
    return seen.rows.double().sum((0, 1)).unsqueeze(0), seen.places.sum()
