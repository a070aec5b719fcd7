"""Sums of outer products of rows: as a matrix, or as the rows where those are fewer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sosp_hub.errors import CriterionError

MOST_NUMBERS = 20_000**2  # of float64, which take 3.2 GB


@dataclass(frozen=True, eq=False)
class LowRank:
    """``B'B``, of which only ``B`` is held; it is read like a matrix.

    Attributes:
        factor: ``B``, rows x structures.
    """

    factor: Float[Tensor, "rows structures"]

    def __len__(self) -> int:
        return self.factor.shape[1]

    def __getitem__(self, index: int | Int[Tensor, " some"]) -> Float[Tensor, "*some structures"]:
        """A row of the matrix, or some."""
        return self.factor.T[index] @ self.factor

    def diagonal(self) -> Float[Tensor, " structures"]:
        """As of a matrix."""
        return self.factor.square().sum(0)

    def dense(self) -> Float[Tensor, "structures structures"]:
        """The matrix."""
        return self.factor.T @ self.factor


Matrix = Float[Tensor, "structures structures"] | LowRank
"""A matrix that is symmetric and positive semidefinite."""


class Gram:
    """``B'B`` while its rows come in: they are kept until they are half as many as structures.

    Args:
        size: Structures.
        alone: There is one process; several find out together, in ``mean``, that it is too much.

    Raises:
        CriterionError: Neither the rows nor the matrix fit into memory.
    """

    def __init__(self, size: int, *, alone: bool = True) -> None:
        self.size, self.num_rows, self._alone = size, 0, alone
        self._rows: list[Tensor] = []
        self._matrix: Tensor | None = None

    def add(self, rows: Float[Tensor, "rows structures"]) -> None:
        """Adds the outer products of these rows with themselves."""
        self.num_rows += len(rows)
        if self._matrix is None:
            self._rows.append(rows)
            if 2 * self.num_rows > self.size and self._dense_fits:
                self._collapse()
            elif self.num_rows * self.size > MOST_NUMBERS:
                if self._alone:
                    raise self._too_large(self.num_rows)
                self._rows.clear()
        else:
            self._matrix.addmm_(rows.T, rows)

    def mean(
        self,
        weight: float,
        process_sum: Callable[[Tensor], Tensor] | None,
        process_rows: Callable[[Tensor], Tensor] | None,
    ) -> Matrix:
        """The sum over all processes, divided by ``weight``.

        Args:
            weight: What to divide by.
            process_sum: Sum of a tensor over all processes.
            process_rows: The rows of all processes one behind the other; None = where there are
                several they exchange the matrix.
        """
        num_rows = self.num_rows
        if process_sum is not None:
            num_rows = int(process_sum(torch.tensor(float(num_rows), dtype=torch.float64)))
        few = 2 * num_rows <= self.size or not self._dense_fits
        if few and (process_sum is None or process_rows is not None):
            if num_rows * self.size > MOST_NUMBERS:
                raise self._too_large(num_rows)
            rows = torch.cat([torch.zeros(0, self.size, dtype=torch.float64), *self._rows])
            rows = rows if process_rows is None else process_rows(rows)
            return LowRank(rows / weight**0.5)
        if not self._dense_fits:
            raise self._too_large(self.size)
        if self._matrix is None:
            self._collapse()
        assert self._matrix is not None
        whole = self._matrix if process_sum is None else process_sum(self._matrix)
        return whole / weight

    @property
    def _dense_fits(self) -> bool:
        return self.size**2 <= MOST_NUMBERS

    def _collapse(self) -> None:
        self._matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        for rows in self._rows:
            self._matrix.addmm_(rows.T, rows)
        self._rows = []

    def _too_large(self, num_rows: int) -> CriterionError:
        return CriterionError(
            f"sosp_i, compensation: {self.size} structures times {num_rows} rows (samples times "
            f"classes or draws) need {num_rows * self.size * 8 / 1e9:.1f} GB, of "
            f"{MOST_NUMBERS * 8 / 1e9:.1f}; score fewer samples or kinds, write a smaller "
            "`max_classes`, or use `sosp_h`"
        )
