"""Which gates to close, given the matrix of their second derivatives: orders and compensation.

All structures of all groups are one row of gates, ``Q`` their Gauss-Newton matrix. An order lists
structures from the first to go to the last; no group falls under its floor. Where ``Q = B'B`` has
low rank, nothing of its size is held: what is solved with is as large as ``B`` has rows, and
structures are removed in blocks (``_eliminate``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sosp_hub.derivatives import LowRank, Matrix
from sosp_hub.progress import progress, progress_bar

BLOCK = 64  # eliminations between two updates of a whole inverse
ROWS = 1024  # of a matrix of low rank, computed at once
CANDIDATES = 4096  # structures that are looked at between two computations of all costs
REMOVALS = 256  # most removals between them
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
        left = torch.ones(sum(floors.sizes), dtype=torch.bool)
        left[list(gone)] = False
        group = floors.group()
        lost = group[~left].bincount(minlength=len(floors.sizes))
        self._left, self._group = floors.removable().clamp(min=0) - lost, group[left]
        self._units = torch.ones(len(self._group)) if units is None else units[left]
        self.places = left.nonzero()[:, 0]
        self.blocked = self._left[self._group] <= 0
        self.num = int(self._left.sum())

    def per_unit(
        self, cost: Float[Tensor, " some"], some: Int[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """The cost of some structures per unit that is saved; infinite where one has to stay."""
        return (cost / self._units[some]).masked_fill(self.blocked[some], torch.inf)

    def take_cheapest(
        self, cost: Float[Tensor, " some"], some: Int[Tensor, " some"], most: float = torch.inf
    ) -> int | None:
        """Closes the one of some structures that costs least, and its group at its floor.

        Returns:
            Its place among them; None where all have to stay, or cost more than ``most``.
        """
        cost = self.per_unit(cost, some)
        chosen = int(cost.argmin())
        if not cost[chosen] <= most or cost[chosen] == torch.inf:
            return None
        group = self._group[some[chosen]]
        self._left[group] -= 1
        self.num -= 1
        self.blocked[some[chosen]] = True
        if self._left[group] == 0:
            self.blocked |= self._group == group
        return chosen


class _Costs(Protocol):
    """What each of some structures costs now, given those that are gone."""

    def costs(self) -> Float[Tensor, " some"]:
        """Of all; of those that are gone, anything."""
        ...

    def remove(self, chosen: Int[Tensor, " removed"]) -> None:
        """Takes structures out."""
        ...


class _State(_Costs, Protocol):
    """The same of all structures."""

    def close_up(self, some: Int[Tensor, " some"]) -> _Costs:
        """Some structures alone, of which one is removed at little cost."""
        ...


def _eliminate(state: _State, left: _Open, most: int | None = None) -> list[int]:
    """Removes the structure that costs least, one after the other; their positions in the row.

    All costs are computed anew after a block of removals. In between only the structures that cost
    least then are looked at, for as long as they cost less than all others did. Up to
    ``CANDIDATES`` structures that is the order of one at a time; beyond, one that comes to cost
    less within a block waits for the next.
    """
    removed, num = list[int](), left.num if most is None else min(left.num, most)
    everything = torch.arange(len(left.places))
    with progress_bar("eliminate", num, unit="structures") as advance:
        while len(removed) < num:
            cost = left.per_unit(state.costs(), everything)
            some, bound = (cost < torch.inf).nonzero()[:, 0], torch.inf
            if len(some) > CANDIDATES:
                bound = cost.kthvalue(CANDIDATES + 1).values.item()
                least, ties = (cost < bound).nonzero()[:, 0], (cost == bound).nonzero()[:, 0]
                some = torch.cat([least, ties[: CANDIDATES - len(least)]]).sort().values
            view, taken = state.close_up(some), list[int]()
            while len(taken) < min(REMOVALS, num - len(removed)):
                chosen = left.take_cheapest(view.costs(), some, bound if taken else torch.inf)
                if chosen is None:
                    break
                view.remove(torch.tensor([chosen]))
                taken.append(int(some[chosen]))
            state.remove(torch.tensor(taken))
            removed += taken
            advance(steps=len(taken))
    return removed


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
    return _eliminate(_Greedy(matrix, cost, gradient is not None), _Open(floors, units))


@dataclass
class _Greedy:
    """What each structure would add to the loss, given those that are gone."""

    matrix: Matrix
    cost: Float[Tensor, " structures"]
    absolute: bool

    def costs(self) -> Float[Tensor, " structures"]:
        return self.cost

    def close_up(self, some: Int[Tensor, " some"]) -> "_Greedy":
        return _Greedy(_part(self.matrix, some), self.cost[some], self.absolute)

    def remove(self, chosen: Int[Tensor, " removed"]) -> None:
        if not self.absolute:
            self.cost = self.cost + _sum_of_rows(self.matrix, chosen)
            return
        for block in chosen.split(BLOCK):
            self.cost = self.cost + self.matrix[block].abs().sum(0)


def _sum_of_rows(matrix: Matrix, some: Int[Tensor, " some"]) -> Float[Tensor, " structures"]:
    if isinstance(matrix, LowRank):
        return matrix.factor.T @ matrix.factor[:, some].sum(1)
    return matrix[some].sum(0)


def _part(matrix: Matrix, some: Int[Tensor, " some"]) -> Matrix:
    """The rows and columns of some structures."""
    if isinstance(matrix, LowRank):
        return LowRank(matrix.factor[:, some])
    return matrix[some][:, some]


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
    remeasure: "Callable[[Tensor, Tensor], tuple[Matrix, Tensor]] | None" = None,
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
        remeasure: From the gates so far, and which of them are left, to ``Q`` at these gates, and
            to the gates to go on from.
    """
    gates, order = torch.ones_like(matrix.diagonal()), list[int]()
    while (left := _Open(floors, units, order)).num:
        if order and remeasure is not None:
            is_left = torch.zeros(len(gates), dtype=torch.bool).index_fill(0, left.places, True)
            matrix, gates = remeasure(gates, is_left)
        removed, gates = _operate(matrix, gates, left, damping, every)
        order += removed
    return order


def _operate(
    matrix: Matrix, gates: Tensor, left: _Open, damping: float, most: int | None
) -> tuple[list[int], Tensor]:
    """The next removals, and where all gates are then: none under 0."""
    places = left.places
    matrix, moved = _part(matrix, places), gates[places].clamp(min=0)
    size = _damping(matrix, damping)
    if isinstance(matrix, LowRank):
        state = _LowRankSurgeon(matrix, moved, size)
        chosen = _eliminate(state, left, most)
        moved = state.gates()
    else:
        chosen = _operate_whole(matrix, moved, left, size, most)
    removed = places[chosen].tolist()
    gates = torch.zeros_like(gates).index_copy_(0, places, moved.clamp(min=0))
    gates[removed] = 0.0  # but for rounding they are
    return removed, gates


def _operate_whole(
    matrix: Tensor, gates: Tensor, left: _Open, damping: float, most: int | None
) -> list[int]:
    """One removal after the other, of a matrix that is held whole; moves ``gates``."""
    inverse, everything, removed = _Inverse(matrix, damping), torch.arange(len(matrix)), list[int]()
    diagonal = inverse.diagonal()
    num = left.num if most is None else min(left.num, most)
    for _ in progress(range(num), "eliminate", unit="structures"):
        s = left.take_cheapest(gates.square() / diagonal, everything)
        assert s is not None  # `left.num` may go
        column = inverse.remove(s)
        gates -= gates[s] / column[s] * column
        diagonal -= column.square() / column[s]
        gates[s], diagonal[s] = 0.0, 1.0
        removed.append(s)
    return removed


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


class _LowRankSurgeon:
    """Gates and costs for ``Q = B'B``, with ``K = (lambda + B B')^-1`` of what is left of ``B``.

    By Woodbury ``A = (1 - B' K B) / lambda``, and once a set ``R`` is gone the gates that started
    at ``m`` are ``m + B' K B_R m_R``: both follow from the set alone, so no error builds up.
    """

    def __init__(self, matrix: LowRank, gates: Tensor, damping: float) -> None:
        self._size, self._damping = len(matrix), damping
        self._left_over = torch.arange(len(matrix))  # columns of the others are no longer held
        self._factor, self._start = matrix.factor, gates
        self._gone = torch.zeros(len(matrix), dtype=torch.bool)
        self._removed = gates.new_zeros(len(matrix.factor))  # B_R m_R
        self._small = self._damped_gram()

    def gates(self) -> Float[Tensor, " structures"]:
        """Of all structures; 0 for those that are gone."""
        return self._everywhere(self._moved(self._inverse())).masked_fill(self._gone, 0.0)

    def costs(self) -> Float[Tensor, " structures"]:
        inverse = self._inverse()
        blocks = self._factor.split(ROWS, 1)
        diagonal = 1 - torch.cat([(inverse @ block * block).sum(0) for block in blocks])
        self._now = inverse, self._moved(inverse), diagonal
        return self._everywhere(self._now[1].square() / diagonal)

    def close_up(self, some: Int[Tensor, " some"]) -> "_FewOfLowRank":
        inverse, moved, diagonal = self._now
        columns = torch.searchsorted(self._left_over, some)
        factor = self._factor[:, columns].T.contiguous()
        return _FewOfLowRank(factor, inverse.clone(), moved[columns], diagonal[columns])

    def remove(self, chosen: Int[Tensor, " removed"]) -> None:
        columns = torch.searchsorted(self._left_over, chosen)
        gone = self._factor[:, columns]
        self._removed += gone @ self._start[columns]
        self._gone[chosen] = True
        is_left = ~self._gone[self._left_over]
        if is_left.sum() < 0.9 * len(is_left):
            self._left_over, self._start = self._left_over[is_left], self._start[is_left]
            self._factor = self._factor[:, is_left]
            self._small = self._damped_gram()
        else:
            self._factor[:, columns] = 0.0
            self._small -= gone @ gone.T

    def _moved(self, inverse: Tensor) -> Tensor:
        return self._start + self._factor.T @ (inverse @ self._removed)

    def _damped_gram(self) -> Tensor:
        small = self._factor @ self._factor.T
        small.diagonal().add_(self._damping)
        return small

    def _inverse(self) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(self._small))

    def _everywhere(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._size).index_copy_(0, self._left_over, values)


@dataclass
class _FewOfLowRank:
    """The same for some structures, with all that changes when one of them goes."""

    columns: Float[Tensor, "some rows"]
    inverse: Float[Tensor, "rows rows"]
    gates: Float[Tensor, " some"]
    diagonal: Float[Tensor, " some"]

    def costs(self) -> Float[Tensor, " some"]:
        return self.gates.square() / self.diagonal

    def remove(self, chosen: Int[Tensor, " one"]) -> None:
        s = int(chosen)
        moved = self.inverse @ self.columns[s]
        row, left = self.columns @ moved, 1 - (self.columns[s] @ moved).item()
        self.gates = self.gates + self.gates[s] / left * row
        self.diagonal = self.diagonal - row.square() / left
        self.inverse.addr_(moved, moved, alpha=1 / left)
        self.gates[s], self.diagonal[s] = 0.0, 1.0


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
        descent = matrix.factor.T @ matrix.factor[:, ~kept].sum(1)
    else:
        descent = matrix[:, ~kept].sum(1)
    return (kept + damped_step(matrix, descent, free, damping)).clamp(min=0)


def damped_step(
    matrix: Matrix,
    descent: Float[Tensor, " structures"],
    free: Bool[Tensor, " structures"],
    damping: float,
) -> Float[Tensor, " structures"]:
    """``(Q + lambda)^-1 pull`` within the ``free`` structures; 0 for the others."""
    size, step = _damping(matrix, damping), torch.zeros_like(descent)
    if isinstance(matrix, LowRank):  # Woodbury, as in the surgeon
        factor = matrix.factor[:, free]
        small = factor @ factor.T + size * torch.eye(len(factor)).to(factor)
        inside = factor.T @ torch.linalg.solve(small, factor @ descent[free])
        step[free] = (descent[free] - inside) / size
    else:
        damped = matrix[free][:, free] + size * torch.eye(int(free.sum())).to(matrix)
        step[free] = torch.linalg.solve(damped, descent[free])
    return step


def _damping(matrix: Matrix, share: float) -> float:
    diagonal = matrix.diagonal()
    return max(share * diagonal.mean().item(), torch.finfo(diagonal.dtype).tiny)
