"""Gates of what is kept that make up for what a plan removes, whichever criterion chose it."""

from collections.abc import Collection
from dataclasses import replace

import torch

from sosp_hub.criteria.elimination import compensation
from sosp_hub.derivatives import Matrix, by_group
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.groups import Groups


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
