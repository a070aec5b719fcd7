"""What all operations here share: work in pieces, plain tensors, gradients that do not come."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 2**17  # numbers; on a CPU large new tensors cost more than what is done with them


def constant(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors (not quantised, not spread over devices), no gradient."""
    return all(
        tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad)
        for tensor in tensors
    )


def fitting(size: int) -> int:
    """How many things of so many numbers make a piece; at least one."""
    return max(1, PIECE // size)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the first dimension, so small on a CPU that what is made of them stays in cache."""
    first, rows = tensors[0], len(tensors[0])
    if first.device.type == "cpu":
        rows = max(1, PIECE * rows // max(1, first.numel()))
    return zip(*(tensor.split(max(rows, 1)) for tensor in tensors), strict=True)


def where_reached(backward: Callable) -> Callable:
    """A backward that hands on nothing where nothing comes, because what follows has no derivative.

    Zeros would hide that the loss does not depend on what is before.
    """

    @wraps(backward)
    def run(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad)

    return run


def empty(like: Tensor) -> Tensor:
    """A contiguous tensor to write a result into."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
