"""Which gates to close, given the matrix of their second derivatives: orders and compensation.

All structures of all groups are one row of gates, ``Q`` their Gauss-Newton matrix. An order lists
structures from the first to go to the last; no group falls under its floor. Where ``Q = B'B`` has
low rank, nothing of its size is held: what is solved with is as large as ``B`` has rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sosp_hub.derivatives import LowRank, Matrix

BLOCK = 64  # structures whose rows are computed at once


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
    """The structures that may still go."""

    def __init__(self, floors: Floors) -> None:
        self._left, self._group = floors.removable(), floors.group()
        self.blocked = self._left[self._group] <= 0
        self.num = int(self._left.clamp(min=0).sum())

    def cheapest(self, cost: Float[Tensor, " structures"], num: int = 1) -> list[int]:
        """The structures that cost least, in that order."""
        return cost.masked_fill(self.blocked, torch.inf).topk(num, largest=False).indices.tolist()

    def take(self, chosen: int) -> None:
        """Closes one, and the rest of its group where that has come to its floor."""
        group = self._group[chosen]
        self._left[group] -= 1
        self.blocked[chosen] = True
        if self._left[group] == 0:
            self.blocked |= self._group == group


def greedy_order(
    matrix: Matrix, floors: Floors, gradient: Float[Tensor, " structures"] | None = None
) -> list[int]:
    """Removes one structure after the other, each time the one that adds least.

    With ``gradient``, least ``abs(g_s) + 1/2 abs(Q_ss) + sum over removed s' of abs(Q_ss')``: the
    set saliency of SOSP-I. Without, least ``1/2 Q_ss + sum over removed s' of Q_ss'``, with signs:
    structures that make up for each other's loss go together.
    """
    cost = matrix.diagonal() / 2 + (0 if gradient is None else gradient.abs())
    left, order, rows = _Open(floors), [], dict[int, Tensor]()
    while len(order) < left.num:
        (s,) = left.cheapest(cost)
        if s not in rows:
            near = left.cheapest(cost, min(BLOCK, len(cost)))
            rows = dict(zip(near, matrix[near], strict=True))
        cost = cost + (rows[s] if gradient is None else rows[s].abs())
        left.take(s)
        order.append(s)
    return order


def absolute_row_sums(matrix: Matrix) -> Float[Tensor, " structures"]:
    """``sum_s' abs(Q_ss')`` of each ``s``."""
    blocks = torch.arange(len(matrix)).split(1024)
    return torch.cat([matrix[block.tolist()].abs().sum(1) for block in blocks])


def surgeon_order(matrix: Matrix, floors: Floors, damping: float = 0.01) -> list[int]:
    """Optimal Brain Surgeon over the gates of all layers: each removal moves all other gates.

    With ``A = (Q + lambda)^-1`` and gates ``m``, all 1: removes the ``s`` of least
    ``m_s^2 / A_ss``, moves the gates by ``- m_s / A_ss A[:, s]``, and takes ``s`` out of ``A``.

    Args:
        matrix: ``Q``.
        floors: What stays in each group.
        damping: ``lambda``, as a share of the mean of the diagonal.
    """
    size = _damping(matrix, damping)
    low_rank = isinstance(matrix, LowRank)
    inverse = _LowRankInverse(matrix, size) if low_rank else _Inverse(matrix, size)
    diagonal, gates = inverse.diagonal(), matrix.diagonal().new_ones(len(matrix))
    left, order = _Open(floors), []
    while len(order) < left.num:
        near = left.cheapest(gates.square() / diagonal, min(BLOCK, len(gates)))
        inverse.prepare(near)
        pending = gates.new_empty(len(near), len(gates))  # A = inverse - pending' pending
        gone: list[int] = []
        while len(order) + len(gone) < left.num and len(gone) < len(near):
            (s,) = left.cheapest(gates.square() / diagonal)
            row = inverse.row(s)
            if row is None:
                break
            before = pending[: len(gone)]
            column = row - before[:, s] @ before
            gates -= gates[s] / column[s] * column
            pending[len(gone)] = column / column[s].sqrt()
            diagonal -= pending[len(gone)].square()
            gates[s], diagonal[s] = 0.0, 1.0
            left.take(s)
            gone.append(s)
        order += gone
        inverse.remove(gone, pending[: len(gone)])
    return order


class _Inverse:
    """``(Q + lambda)^-1`` without the structures that are gone."""

    def __init__(self, matrix: Tensor, damping: float) -> None:
        self._inverse = (matrix + damping * torch.eye(len(matrix)).to(matrix)).inverse()

    def diagonal(self) -> Tensor:
        return self._inverse.diagonal().clone()

    def prepare(self, near: list[int]) -> None:
        """All rows are there."""

    def row(self, s: int) -> Tensor | None:
        return self._inverse[s]

    def remove(self, gone: list[int], pending: Tensor) -> None:  # noqa: ARG002 they are 0 in it
        self._inverse.addmm_(pending.T, pending, alpha=-1)


class _LowRankInverse:
    """The same for ``Q = B'B``: ``(1 - B' (lambda + B B')^-1 B) / lambda`` by Woodbury."""

    def __init__(self, matrix: LowRank, damping: float) -> None:
        self._factor, self._damping = matrix.factor.clone(), damping
        self._small = self._factor @ self._factor.T
        self._small.diagonal().add_(damping)

    def diagonal(self) -> Tensor:
        half = torch.linalg.solve_triangular(self._root(), self._factor, upper=False)
        return (1 - half.square().sum(0)) / self._damping

    def prepare(self, near: list[int]) -> None:
        rows = -torch.cholesky_solve(self._factor[:, near], self._root()).T @ self._factor
        rows[range(len(near)), near] += 1
        self._rows = dict(zip(near, rows / self._damping, strict=True))

    def row(self, s: int) -> Tensor | None:
        return self._rows.get(s)

    def remove(self, gone: list[int], pending: Tensor) -> None:  # noqa: ARG002 follows from B
        columns = self._factor[:, gone]
        self._small.addmm_(columns, columns.T, alpha=-1)
        self._factor[:, gone] = 0.0

    def _root(self) -> Tensor:
        return torch.linalg.cholesky(self._small)


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
    free, size = kept if fixed is None else kept & ~fixed, _damping(matrix, damping)
    if isinstance(matrix, LowRank):
        factor, lost = matrix.factor[:, free], matrix.factor[:, ~kept].sum(1)
        small = factor @ factor.T + size * torch.eye(len(factor)).to(factor)
        moves = factor.T @ torch.linalg.solve(small, lost)
    else:
        damped = matrix[free][:, free] + size * torch.eye(int(free.sum())).to(matrix)
        moves = torch.linalg.solve(damped, matrix[free][:, ~kept].sum(1))
    gates = kept.to(moves.dtype)
    gates[free] = (1 + moves).clamp(min=0)
    return gates


def _damping(matrix: Matrix, share: float) -> float:
    diagonal = matrix.diagonal()
    return max(share * diagonal.mean().item(), torch.finfo(diagonal.dtype).tiny)
