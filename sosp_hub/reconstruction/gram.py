"""Sums of products of a layer's inputs, added up batch by batch."""

from collections.abc import Callable

import torch
from torch import Tensor

ProcessSum = Callable[[Tensor], Tensor]


class Gram:
    """``X'X``, the sums of the columns of ``X``, and its number of rows, for each slot.

    ``T``, the inputs of what a layer should compute, is ``X`` itself, or is added beside it; it may
    have more columns. While ``X`` has at most half as many rows as inputs it is kept itself, which
    takes less memory than ``X'X``.

    Attributes:
        sums: ``(slots, inputs)``.
        counts: ``(slots,)``.
        epsilon: Relative rounding of what was added.
        target: The same of ``T``: ``T'X``, ``T'T`` and its sums; None = ``T`` is ``X``.
    """

    def __init__(
        self, sums: Tensor, counts: Tensor, rows: list[Tensor], products: Tensor | None = None
    ) -> None:
        self.sums, self.counts, self._rows, self._products = sums, counts, rows, products
        self.target: tuple[Tensor, Tensor, Tensor] | None = None
        self.epsilon = torch.finfo(torch.float64).eps

    @classmethod
    def zeros(
        cls, num_slots: int, num_inputs: int, device: torch.device, num_targets: int | None = None
    ) -> "Gram":
        """Of no rows yet; those of ``T`` come with them where its number of inputs is given."""
        options = {"dtype": torch.float64, "device": device}
        sums = torch.zeros(num_slots, num_inputs, **options)
        gram = cls(sums, torch.zeros(num_slots, **options), [])
        if num_targets is not None:
            sizes = (num_targets, num_inputs), (num_targets, num_targets), (num_targets,)
            shapes = [(num_slots, *size) for size in sizes]
            gram.target = tuple(torch.zeros(shape, **options) for shape in shapes)  # pyright: ignore
        return gram

    @property
    def products(self) -> Tensor:
        """``X'X``, ``(slots, inputs, inputs)`` in float64; of a batch in float32 or wider."""
        if self._products is None:
            self._products = self.sums.new_zeros(*self.sums.shape, self.sums.shape[1])
            for rows in self._rows:
                self._products += rows.mT @ rows
            self._rows = []
        return self._products

    @property
    def rows(self) -> Tensor | None:
        """``X``, ``(slots, rows, inputs)`` in float64; None where it is not kept."""
        if self._products is not None or not self._rows:
            return None
        return torch.cat(self._rows, 1).double()

    def add(self, rows: Tensor, slots: slice, target: Tensor | None = None) -> None:
        """Adds rows ``(slots, rows, inputs)``, which it may keep, and those of ``T``."""
        self.epsilon = max(self.epsilon, torch.finfo(rows.dtype).eps)
        few = bool((self.counts + rows.shape[1]).max() <= self.sums.shape[1] // 2)
        if few and len(rows) == len(self.counts) and self._products is None and target is None:
            self._rows.append(rows)
        else:
            self.products[slots] += rows.mT @ rows
        self.sums[slots] += rows.sum(1, dtype=torch.float64)
        self.counts[slots] += rows.shape[1]
        if self.target is not None and target is not None:
            self.target[0][slots] += target.mT @ rows
            self.target[1][slots] += target.mT @ target
            self.target[2][slots] += target.sum(1, dtype=torch.float64)

    def sum_over(self, process_sum: ProcessSum | None) -> None:
        """Becomes the sum over all processes."""
        if process_sum is None:
            return
        self._products, self.sums, self.counts = map(
            process_sum, (self.products, self.sums, self.counts)
        )
        if self.target is not None:
            self.target = tuple(map(process_sum, self.target))  # pyright: ignore

    def toward(self, share: float) -> "Gram":
        """With ``(1 - share) X + share T`` in the place of ``T``."""
        if share == 1:
            return self
        mixed = Gram(self.sums, self.counts, self._rows, self._products)
        mixed.epsilon = self.epsilon
        if self.target is None or share == 0:
            return mixed
        (cross, square, sums), rest = self.target, 1 - share
        mixed.target = (
            rest * self.products + share * cross,
            rest**2 * self.products + share**2 * square + share * rest * (cross + cross.mT),
            rest * self.sums + share * sums,
        )
        return mixed

    def __add__(self, other: "Gram") -> "Gram":
        sums, counts = self.sums + other.sums, self.counts + other.counts
        if self._products is None and other._products is None:
            total = Gram(sums, counts, self._rows + other._rows)
        else:
            total = Gram(sums, counts, [], self.products + other.products)
        total.epsilon = max(self.epsilon, other.epsilon)
        if self.target is not None and other.target is not None:
            pairs = zip(self.target, other.target, strict=True)
            total.target = tuple(one + two for one, two in pairs)  # pyright: ignore
        return total

    def is_finite(self) -> bool:
        """Whether no input was infinite or NaN."""
        kept = self._rows if self._products is None else [self._products]
        parts = (*kept, self.sums, *(self.target or ()))
        return all(bool(part.isfinite().all()) for part in parts)
