"""One layer's least squares: the kept columns take over what the removed ones did."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sosp_hub.reconstruction.gram import Gram

_CONSTANT = 16
"""Inputs whose variance is less than so many times the rounding of their squares are constants."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of one matrix for each slot, ``(slots, outputs, inputs)`` in float64.

    Attributes:
        dense: What it computed before the cut, of what the Gram matrices call ``T``.
        start: What it computes after the cut, of their ``X``: 0 in removed columns.
        kept: Positions of the columns that stay.
        bias: How much the bias of ``start`` is above that of ``dense``, ``(slots, outputs)``; None
            = there is no bias, and none is fitted.
    """

    dense: Tensor
    start: Tensor
    kept: Tensor
    bias: Tensor | None

    def solved(self, gram: Gram, dampings: Iterable[float]) -> "Iterator[Layer]":
        """The layers whose kept columns come nearest to what the dense one makes of the targets.

        Least ``|W x + b - W_dense t - b_dense|^2 + lambda |W - W_start|^2`` over the rows of the
        Gram matrices ``H = X'X`` and ``C = T'X``; where ``t`` is ``x``:
        ``W = W_start + (W_dense - W_start) H[:, K] (H_KK + lambda)^-1``, or, of few rows,
        ``(W_dense - W_start) X' (X_K X_K' + lambda)^-1 X_K``. The bias is not shrunk, so that ``H``
        and ``C`` are then covariances.

        Args:
            gram: Of all columns, the removed ones too.
            dampings: ``lambda``, as a share of the mean of the diagonal of ``H_KK``.
        """
        normal = self._normal_equations(gram)
        _, _, target_sums = gram.target or (None, None, gram.sums)
        kept, size = self.kept, normal.inner.shape[-1]
        for damping in dampings:
            damped = normal.inner + torch.diag_embed(
                (damping * normal.level)[:, None].expand(-1, size)
            )
            step = _solve(damped, normal.pull, normal.varies)
            new = self.start.clone()
            new[:, :, kept] += step if normal.rows is None else step @ normal.rows
            if self.bias is None:
                yield Layer(self.dense, new, kept, None)
                continue
            counts = gram.counts[:, None]
            lost = self.dense @ target_sums[:, :, None] - new @ gram.sums[:, :, None]
            constant = torch.where(counts > 0, lost[:, :, 0] / counts.clamp(min=1), self.bias)
            yield Layer(self.dense, new, kept, constant)

    def _normal_equations(self, gram: Gram) -> "_NormalEquations":
        kept, means = self.kept, gram.sums / gram.counts[:, None].clamp(min=1)
        if (rows := gram.rows) is not None:
            raw = rows[:, :, kept].square().sum(1).mean(1)
            if self.bias is not None:
                rows = rows - means[:, None]
            pull, rows = (self.dense - self.start) @ rows.mT, rows[:, :, kept]
            inner, level = rows @ rows.mT, rows.square().sum(1).mean(1)
        else:
            cross, _, target_sums = gram.target or (None, None, gram.sums)
            columns = gram.products[:, :, kept]
            wanted = columns if cross is None else cross[:, :, kept]
            if self.bias is not None:
                columns = columns - gram.sums[:, :, None] * means[:, None, kept]
                wanted = wanted - target_sums[:, :, None] * means[:, None, kept]
            pull, inner = self.dense @ wanted - self.start @ columns, columns[:, kept]
            level = inner.diagonal(dim1=1, dim2=2).mean(1)
            raw = gram.products.diagonal(dim1=1, dim2=2)[:, kept].mean(1)
        varies = level > _CONSTANT * gram.epsilon * raw
        return _NormalEquations(inner, pull, level, varies, rows)

    def error(self, gram: Gram) -> Tensor:
        """Sum over rows and outputs of the squared distance to the targets, by slot."""
        if (rows := gram.rows) is not None:
            off = self.start - self.dense
            rest = rows @ off.mT if self.bias is None else rows @ off.mT + self.bias[:, None]
            return rest.square().sum((1, 2))
        if gram.target is None:  # of one difference, for the sake of rounding
            off = self.start - self.dense
            total = ((off @ gram.products) * off).sum((1, 2))
            away = (off @ gram.sums[:, :, None])[:, :, 0]
        else:
            cross, square, sums = gram.target
            total = ((self.start @ gram.products) * self.start).sum((1, 2))
            total -= 2 * ((self.dense @ cross) * self.start).sum((1, 2))
            total += ((self.dense @ square) * self.dense).sum((1, 2))
            away = self.start @ gram.sums[:, :, None] - self.dense @ sums[:, :, None]
            away = away[:, :, 0]
        if self.bias is not None:
            total += 2 * (self.bias * away).sum(1) + gram.counts * self.bias.square().sum(1)
        return total.clamp(min=0)

    def some(self, most: int) -> "Layer":
        """The layer with at most so many of its outputs, evenly spaced."""
        step = -(-self.dense.shape[1] // most)
        bias = None if self.bias is None else self.bias[:, ::step]
        return Layer(self.dense[:, ::step], self.start[:, ::step], self.kept, bias)

    def take(self, other: "Layer", where: Tensor) -> "Layer":
        """The other layer in the slots where that is said, this one elsewhere."""
        new = torch.where(where[:, None, None], other.start, self.start)
        if self.bias is None or other.bias is None:
            return Layer(self.dense, new, self.kept, None)
        bias = torch.where(where[:, None], other.bias, self.bias)
        return Layer(self.dense, new, self.kept, bias)


class _NormalEquations(NamedTuple):
    """``step (inner + lambda) = pull``: of kept columns, or of the rows that are kept themselves.

    Attributes:
        inner: ``(slots, n, n)``.
        pull: ``(slots, outputs, n)``.
        level: Mean of the diagonal of ``H_KK``, by slot.
        varies: Whether the inputs of a slot do.
        rows: What a step by rows is multiplied with; None = it is one by columns.
    """

    inner: Tensor
    pull: Tensor
    level: Tensor
    varies: Tensor
    rows: Tensor | None


def _solve(damped: Tensor, pull: Tensor, able: Tensor) -> Tensor:
    """``pull damped^-1``, by slot; 0 where all inputs are constant."""
    eye = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
    damped = torch.where(able[:, None, None], damped, eye)
    factor, wrong = torch.linalg.cholesky_ex(damped)
    if bool((wrong == 0).all()):
        step = torch.cholesky_solve(pull.mT, factor).mT
    else:  # as little damping as rounding of the matrix itself
        step = pull @ torch.linalg.pinv(damped, hermitian=True)
    return torch.where(able[:, None, None], step, 0.0)
