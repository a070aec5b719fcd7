"""Which gates to close, given the matrix of their second derivatives: orders and compensation.

All structures of all groups are one row of gates, ``Q`` their Gauss-Newton matrix. An order lists
structures from the first to go to the last; no group falls under its floor. Where ``Q = B'B`` has
low rank, nothing of its size is held: what is solved with is as large as ``B`` has rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sosp_hub.derivatives import LowRank, Matrix

BLOCK = 64  # eliminations between two updates of a whole inverse
ROWS = 1024  # of a matrix of low rank, computed at once
Units = Float[Tensor, " structures"] | None


@dataclass(frozen=True)
class Floors:
    """How many structures each group can lose.

    Attributes:
        sizes: Structures of each group, in the order of the row.
        keep_at_least: Share of each group that stays; at least one structure does.
    """

    sizes: Sequence[int]
    keep_at_least: float = 0.1

    def removable(self) -> Int[Tensor, " groups"]:
        """The number that each group can lose."""
        return torch.tensor([n - max(1, math.ceil(self.keep_at_least * n)) for n in self.sizes])

    def group(self) -> Int[Tensor, " structures"]:
        """The group of each structure."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))


class _Open:
    """The structures that may still go, besides those that are gone."""

    def __init__(self, floors: Floors, units: Units, gone: Sequence[int] = ()) -> None:
        there = torch.ones(sum(floors.sizes), dtype=torch.bool)
        there[list(gone)] = False
        group = floors.group()
        lost = group[~there].bincount(minlength=len(floors.sizes))
        self._left, self._group = floors.removable().clamp(min=0) - lost, group[there]
        self._units = 1.0 if units is None else units[there]
        self.places = there.nonzero()[:, 0]
        self.blocked = self._left[self._group] <= 0
        self.num = int(self._left.sum())

    def take_cheapest(self, cost: Float[Tensor, " structures"]) -> int:
        """Closes the structure that costs least, and its group where that comes to its floor."""
        chosen = int((cost / self._units).masked_fill(self.blocked, torch.inf).argmin())
        group = self._group[chosen]
        self._left[group] -= 1
        self.blocked[chosen] = True
        if self._left[group] == 0:
            self.blocked |= self._group == group
        return chosen


def greedy_order(
    matrix: Matrix,
    floors: Floors,
    gradient: Float[Tensor, " structures"] | None = None,
    units: Units = None,
) -> list[int]:
    """Removes one structure after the other, each time the one that adds least.

    With ``gradient``, least ``abs(g_s) + 1/2 abs(Q_ss) + sum over removed s' of abs(Q_ss')``: the
    set saliency of SOSP-I. Without, least ``1/2 Q_ss + sum over removed s' of Q_ss'``, with signs:
    structures that make up for each other's loss go together. With ``units``, least per unit that
    is saved.
    """
    cost = matrix.diagonal() / 2 + (0 if gradient is None else gradient.abs())
    left, order = _Open(floors, units), []
    for _ in range(left.num):
        order.append(left.take_cheapest(cost))
        row = matrix[order[-1]]
        cost = cost + (row if gradient is None else row.abs())
    return order


def absolute_row_sums(matrix: Matrix) -> Float[Tensor, " structures"]:
    """``sum_s' abs(Q_ss')`` of each ``s``."""
    blocks = torch.arange(len(matrix)).split(ROWS)
    return torch.cat([matrix[block].abs().sum(1) for block in blocks])


def surgeon_order(
    matrix: Matrix,
    floors: Floors,
    damping: float = 0.01,
    units: Units = None,
    every: int | None = None,
    again: "Callable[[Tensor, Tensor], tuple[Matrix, Tensor]] | None" = None,
) -> list[int]:
    """Optimal Brain Surgeon over the gates of all layers: each removal moves all other gates.

    With ``A = (Q + lambda)^-1`` and gates ``m``, all 1: removes the ``s`` of least
    ``m_s^2 / A_ss``, moves the gates by ``- m_s / A_ss A[:, s]``, and takes ``s`` out of ``A``.

    Args:
        matrix: ``Q``.
        floors: What stays in each group.
        damping: ``lambda``, as a share of the mean of the diagonal.
        units: What each structure saves; least per unit goes then.
        every: So many removals go by one ``Q``; None = all.
        again: From the gates so far, and which of them are left, to ``Q`` there, and to the gates
            to go on from.
    """
    gates, order = torch.ones_like(matrix.diagonal()), list[int]()
    while (left := _Open(floors, units, order)).num:
        if order and again is not None:
            there = torch.zeros(len(gates), dtype=torch.bool).index_fill(0, left.places, True)
            matrix, gates = again(gates, there)
        removed, gates = _operate(matrix, gates, left, damping, every)
        order += removed
    return order


def _operate(
    matrix: Matrix, gates: Tensor, left: _Open, damping: float, most: int | None
) -> tuple[list[int], Tensor]:
    """The next removals, and where all gates are then: none under 0."""
    places = left.places
    if isinstance(matrix, LowRank):
        matrix = LowRank(matrix.factor[:, places])
        inverse = _LowRankInverse(matrix, _damping(matrix, damping))
    else:
        matrix = matrix[places][:, places]
        inverse = _Inverse(matrix, _damping(matrix, damping))
    moved, diagonal, removed = gates[places].clamp(min=0), inverse.diagonal(), list[int]()
    for _ in range(left.num if most is None else min(left.num, most)):
        s = left.take_cheapest(moved.square() / diagonal)
        column = inverse.remove(s)
        moved -= moved[s] / column[s] * column
        diagonal -= column.square() / column[s]
        moved[s], diagonal[s] = 0.0, 1.0
        removed.append(int(places[s]))
    gates = torch.zeros_like(gates).index_copy_(0, places, moved.clamp(min=0))
    gates[removed] = 0.0  # but for rounding they are
    return removed, gates


class _Inverse:
    """``(Q + lambda)^-1`` without the structures that are gone."""

    def __init__(self, matrix: Tensor, damping: float) -> None:
        self._inverse = (matrix + damping * torch.eye(len(matrix)).to(matrix)).inverse()
        self._pending = self._inverse.new_empty(BLOCK, len(matrix))  # minus pending' pending
        self._num = 0

    def diagonal(self) -> Tensor:
        return self._inverse.diagonal().clone()

    def remove(self, s: int) -> Tensor:
        """The column of a structure, which is then gone."""
        before = self._pending[: self._num]
        column = self._inverse[s] - before[:, s] @ before
        self._pending[self._num] = column / column[s].sqrt()
        self._num += 1
        if self._num == BLOCK:
            self._inverse.addmm_(self._pending.T, self._pending, alpha=-1)
            self._num = 0
        return column


class _LowRankInverse:
    """The same for ``Q = B'B``: ``(1 - B' (lambda + B B')^-1 B) / lambda`` by Woodbury."""

    def __init__(self, matrix: LowRank, damping: float) -> None:
        self._factor, self._damping = matrix.factor.clone(), damping
        small = self._factor @ self._factor.T
        small.diagonal().add_(damping)
        self._small_inverse = torch.cholesky_inverse(torch.linalg.cholesky(small))

    def diagonal(self) -> Tensor:
        inner = (self._factor * (self._small_inverse @ self._factor)).sum(0)
        return (1 - inner) / self._damping

    def remove(self, s: int) -> Tensor:
        """The column of a structure, which is then gone."""
        own = self._factor[:, s].clone()
        moved = self._small_inverse @ own
        left = 1 - own @ moved
        column = -(moved @ self._factor)
        column[s] = left
        self._small_inverse.addr_(moved, moved, alpha=1 / left.item())
        self._factor[:, s] = 0.0
        return column / self._damping


def compensation(
    matrix: Matrix,
    kept: Bool[Tensor, " structures"],
    damping: float = 0.01,
    fixed: Bool[Tensor, " structures"] | None = None,
) -> Float[Tensor, " structures"]:
    """The gates of the kept structures that make up best for those that went; 0 for the latter.

    ``1 + (Q_KK + lambda)^-1 Q_KR 1``, the least ``(m - 1)' (Q + lambda) (m - 1)`` with the removed
    gates at 0, and then none under 0. Kept gates that are ``fixed`` are 1.
    """
    free = kept if fixed is None else kept & ~fixed
    if isinstance(matrix, LowRank):
        pull = matrix.factor.T @ matrix.factor[:, ~kept].sum(1)
    else:
        pull = matrix[:, ~kept].sum(1)
    return (kept + damped_step(matrix, pull, free, damping)).clamp(min=0)


def damped_step(
    matrix: Matrix,
    pull: Float[Tensor, " structures"],
    free: Bool[Tensor, " structures"],
    damping: float,
) -> Float[Tensor, " structures"]:
    """``(Q + lambda)^-1 pull`` within the ``free`` structures; 0 for the others."""
    size, step = _damping(matrix, damping), torch.zeros_like(pull)
    if isinstance(matrix, LowRank):  # Woodbury, as in the surgeon
        factor = matrix.factor[:, free]
        small = factor @ factor.T + size * torch.eye(len(factor)).to(factor)
        inside = factor.T @ torch.linalg.solve(small, factor @ pull[free])
        step[free] = (pull[free] - inside) / size
    else:
        damped = matrix[free][:, free] + size * torch.eye(int(free.sum())).to(matrix)
        step[free] = torch.linalg.solve(damped, pull[free])
    return step


def _damping(matrix: Matrix, share: float) -> float:
    diagonal = matrix.diagonal()
    return max(share * diagonal.mean().item(), torch.finfo(diagonal.dtype).tiny)
