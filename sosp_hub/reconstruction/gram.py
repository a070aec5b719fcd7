"""Sums of products of a layer's inputs, added up batch by batch."""

from collections.abc import Callable

import torch
from torch import Tensor

ProcessSum = Callable[[Tensor], Tensor]


class Gram:
    """``X'X``, the sums of the columns of ``X``, and its number of rows, for each slot.

    ``T``, the inputs of what a layer should compute, is ``X`` itself, or is added beside it.

    Attributes:
        products: ``X'X``, ``(slots, inputs, inputs)`` in float64; a batch's share is computed in
            float32 or wider.
        sums: ``(slots, inputs)``.
        counts: ``(slots,)``.
        epsilon: Relative rounding of what was added.
        target: The same of ``T``: ``T'X``, ``T'T`` and its sums; None = ``T`` is ``X``.
    """

    def __init__(self, products: Tensor, sums: Tensor, counts: Tensor) -> None:
        self.products, self.sums, self.counts = products, sums, counts
        self.target: tuple[Tensor, Tensor, Tensor] | None = None
        self.epsilon = torch.finfo(torch.float64).eps

    @classmethod
    def zeros(
        cls, num_slots: int, num_inputs: int, device: torch.device, *, target: bool = False
    ) -> "Gram":
        """Of no rows yet; ``target``: those of ``T`` come with them."""
        options = {"dtype": torch.float64, "device": device}
        square, row = (num_slots, num_inputs, num_inputs), (num_slots, num_inputs)
        gram = cls(
            torch.zeros(square, **options),
            torch.zeros(row, **options),
            torch.zeros(num_slots, **options),
        )
        if target:
            shapes = square, square, row
            gram.target = tuple(torch.zeros(shape, **options) for shape in shapes)  # pyright: ignore
        return gram

    def add(self, rows: Tensor, slots: slice, target: Tensor | None = None) -> None:
        """Adds rows ``(slots, rows, inputs)``, and those of ``T`` beside them."""
        self.epsilon = max(self.epsilon, torch.finfo(rows.dtype).eps)
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
        self.products, self.sums, self.counts = map(
            process_sum, (self.products, self.sums, self.counts)
        )
        if self.target is not None:
            self.target = tuple(map(process_sum, self.target))  # pyright: ignore

    def toward(self, share: float) -> "Gram":
        """With ``(1 - share) X + share T`` in the place of ``T``."""
        mixed = Gram(self.products, self.sums, self.counts)
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
        total = Gram(
            self.products + other.products, self.sums + other.sums, self.counts + other.counts
        )
        total.epsilon = max(self.epsilon, other.epsilon)
        if self.target is not None and other.target is not None:
            pairs = zip(self.target, other.target, strict=True)
            total.target = tuple(one + two for one, two in pairs)  # pyright: ignore
        return total

    def is_finite(self) -> bool:
        """Whether no input was infinite or NaN."""
        parts = (self.products, self.sums, *(self.target or ()))
        return all(bool(part.isfinite().all()) for part in parts)
