"""Which gates to close, given the matrix of their second derivatives: orders and compensation.

All structures of all groups are one row of gates, ``Q`` their Gauss-Newton matrix. An order lists
structures from the first to go to the last; no group falls under its floor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 64  # eliminations between two updates of the whole matrix


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

    def cheapest(self, cost: Float[Tensor, " structures"]) -> int:
        """Takes the structure that costs least."""
        chosen = int(cost.masked_fill(self.blocked, torch.inf).argmin())
        group = self._group[chosen]
        self._left[group] -= 1
        self.blocked[chosen] = True
        if self._left[group] == 0:
            self.blocked |= self._group == group
        return chosen


def greedy_order(
    matrix: Float[Tensor, "structures structures"],
    floors: Floors,
    gradient: Float[Tensor, " structures"] | None = None,
) -> list[int]:
    """Removes one structure after the other, each time the one that adds least.

    With ``gradient``, least ``abs(g_s) + 1/2 abs(Q_ss) + sum over removed s' of abs(Q_ss')``: the
    set saliency of SOSP-I. Without, least ``1/2 Q_ss + sum over removed s' of Q_ss'``, with signs:
    structures that make up for each other's loss go together.
    """
    if gradient is not None:
        matrix = matrix.abs()
    cost = matrix.diagonal() / 2 + (0 if gradient is None else gradient.abs())
    left, order = _Open(floors), []
    for _ in range(left.num):
        order.append(left.cheapest(cost))
        cost = cost + matrix[order[-1]]
    return order


def surgeon_order(
    matrix: Float[Tensor, "structures structures"], floors: Floors, damping: float = 0.01
) -> list[int]:
    """Optimal Brain Surgeon over the gates of all layers: each removal moves all other gates.

    With ``A = (Q + lambda)^-1`` and gates ``m``, all 1: removes the ``s`` of least
    ``m_s^2 / A_ss``, moves the gates by ``- m_s / A_ss A[:, s]``, and takes ``s`` out of ``A``.

    Args:
        matrix: ``Q``.
        floors: What stays in each group.
        damping: ``lambda``, as a share of the mean of the diagonal.
    """
    inverse = _damped(matrix, damping).inverse()
    diagonal, gates = inverse.diagonal().clone(), inverse.new_ones(len(inverse))
    left, order = _Open(floors), []
    pending = inverse.new_empty(BLOCK, len(inverse))  # inverse - pending' pending is up to date
    num = 0
    for _ in range(left.num):
        cost = gates.square() / diagonal
        s = left.cheapest(cost)
        order.append(s)
        column = inverse[s] - pending[:num, s] @ pending[:num]
        gates -= gates[s] / column[s] * column
        pending[num] = column / column[s].sqrt()
        diagonal -= pending[num].square()
        gates[s], diagonal[s] = 0.0, 1.0
        num += 1
        if num == BLOCK:
            inverse.addmm_(pending.T, pending, alpha=-1)
            num = 0
    return order


def compensation(
    matrix: Float[Tensor, "structures structures"],
    kept: Bool[Tensor, " structures"],
    damping: float = 0.01,
    fixed: Bool[Tensor, " structures"] | None = None,
) -> Float[Tensor, " structures"]:
    """The gates of the kept structures that make up best for those that went; 0 for the latter.

    ``1 + (Q_KK + lambda)^-1 Q_KR 1``, the least ``(m - 1)' (Q + lambda) (m - 1)`` with the removed
    gates at 0, and then none under 0. Kept gates that are ``fixed`` are 1.
    """
    free = kept if fixed is None else kept & ~fixed
    gates = kept.to(matrix.dtype)
    lost = matrix[free][:, ~kept].sum(1)
    damped = _damped(matrix, damping)[free][:, free]
    gates[free] = (1 + torch.linalg.solve(damped, lost)).clamp(min=0)
    return gates


def _damped(matrix: Tensor, damping: float) -> Tensor:
    size = damping * matrix.diagonal().mean()
    return matrix + size.clamp(min=torch.finfo(matrix.dtype).tiny) * torch.eye(len(matrix)).to(
        matrix
    )
