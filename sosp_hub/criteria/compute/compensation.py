"""What makes up for what a plan removes, whichever criterion chose it: gates, and constants."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sosp_hub.criteria.compute.activations import ProcessSum, Seen, site_means
from sosp_hub.criteria.compute.elimination import compensation, damped_step
from sosp_hub.derivatives import GaussNewton, Matrix, by_group
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group, Groups

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

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
    kept, _ = _in_a_row(plan, groups)
    gates = compensation(matrix, kept, damping, _rows_of(fixed, groups))
    return _with_gates(plan, groups, gates, fixed, {"damping": damping})


def refined(
    plan: PruningPlan,
    groups: Groups,
    measure: "Callable[[Saliency], GaussNewton]",
    divergence: "Callable[[Saliency], float]",
    num_steps: int = 1,
    dampings: Collection[float] = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0),
    *,
    fixed: Collection[str] = (),
) -> PruningPlan:
    """The plan with gates moved on toward the dense model's outputs, where its own gates leave off.

    Levenberg-Marquardt on ``KL(dense || pruned)`` over the kept gates: with ``g`` and ``Q`` its
    gradient and Gauss-Newton matrix *at the plan's gates*, each step is ``-(Q_KK + lambda)^-1 g_K``
    (and then no gate under 0). ``lambda`` is the one of least divergence on held-out samples; where
    none lowers that, the gates stay and the steps end. Labels take no part (ours).

    Args:
        plan: Any criterion's plan, with gates or without.
        groups: The groups whose gates move; among them all that the plan cuts.
        measure: From gates to the gradient and the matrix there, on calibration data.
        divergence: From gates to the divergence, on data that is held out.
        num_steps: Most steps.
        dampings: What is tried for ``lambda``, as shares of the mean of the matrix's diagonal.
        fixed: Groups whose gates stay as they are.
    """
    kept, gates = _in_a_row(plan, groups)
    free = kept & ~_rows_of(fixed, groups)
    distance = divergence(by_group(groups, gates))
    steps = [{"divergence": distance}]
    for _ in range(num_steps):
        curvature = measure(by_group(groups, gates))
        descent = -torch.cat([curvature.gradient[name] for name in groups])
        tried = {}
        for damping in dampings:
            moved = (gates + damped_step(curvature.matrix, descent, free, damping)).clamp(min=0)
            distance = divergence(by_group(groups, moved))
            tried[damping] = distance, moved
        damping = min(tried, key=lambda damping: tried[damping][0])
        distance, moved = tried[damping]
        if not distance < steps[-1]["divergence"]:
            break
        gates = moved
        steps.append({"divergence": distance, "damping": damping})
    return _with_gates(plan, groups, gates, fixed, {"steps": steps})


def _in_a_row(plan: PruningPlan, groups: Groups) -> tuple[Tensor, Tensor]:
    """Of all structures of the groups: whether the plan keeps them, and their gates."""
    kept, gates = [], []
    for name, group in groups.items():
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[list(plan.kept.get(name, range(group.size)))] = True
        values = mask.double()
        values[mask] = torch.tensor(
            plan.gates.get(name, [1.0] * int(mask.sum())), dtype=torch.double
        )
        kept.append(mask)
        gates.append(values)
    return torch.cat(kept), torch.cat(gates)


def _rows_of(names: Collection[str], groups: Groups) -> Tensor:
    """Whether each structure is of these groups."""
    return torch.cat([torch.full((g.size,), name in names) for name, g in groups.items()])


def _with_gates(
    plan: PruningPlan,
    groups: Groups,
    gates: Tensor,
    fixed: Collection[str],
    details: Mapping[str, Any],
) -> PruningPlan:
    kept = {name: plan.kept.get(name, tuple(range(group.size))) for name, group in groups.items()}
    values = {name: row[list(kept[name])] for name, row in by_group(groups, gates).items()}
    moved = {
        name: tuple(row.tolist())
        for name, row in values.items()
        if name not in fixed and bool((row != 1).any())
    }
    whole = {name: tuple(kept[name]) for name in moved if name not in plan.kept}
    every = [value for row in moved.values() for value in row] or [1.0]
    record = dict(plan.provenance.get("compensation") or {}) | dict(details)
    record |= {"groups": len(moved), "least_gate": min(every), "largest_gate": max(every)}
    return replace(
        plan,
        kept={**plan.kept, **whole},
        sizes={**plan.sizes, **{name: len(indices) for name, indices in whole.items()}},
        gates=moved,
        provenance={**plan.provenance, "compensation": record},
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
            rows = parameters[weight].detach().movedim(member.dim, -1)
            if rows[..., 0].numel() == parameters[bias].numel():
                yield number, rows.flatten(0, -2).to("cpu", torch.float64), bias


def _sums(seen: Seen) -> tuple[Tensor, Tensor]:
    return seen.rows.double().sum((0, 1)).unsqueeze(0), seen.places.sum()
