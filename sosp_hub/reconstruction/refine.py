"""Trains the weights of a block that lost structures toward what the block computed with them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.reconstruction.gram import ProcessSum
from sosp_hub.structure.copies import copy_model, map_tensors
from sosp_hub.structure.trace import output_tensors

_RATE = 0.01
"""Of Adam, times the root mean square of a parameter."""
_WARM_UP = 5
_CHECKS = 4
"""How often in a block the error on held-out batches is measured."""
_TOLERANCE = 1e-3
"""Of squares, within which a block gives again what it gave: 16 bits beside 32 differ by less."""


@dataclass(frozen=True)
class RefinedBlock:
    """What became of one block.

    Attributes:
        name: Of the module.
        parameters: Names of what was trained.
        error_before: Squared distance of its outputs to those of the uncut block over the squares
            of these, on the held-out batches, once its readers were solved.
        error: The same after training; not larger.
    """

    name: str
    parameters: tuple[str, ...]
    error_before: float
    error: float


@dataclass(frozen=True)
class Call:
    """One call of a block: of what it is given, which rows count, and what it gave.

    Attributes:
        args: Positional arguments.
        kwargs: Named ones.
        mask: ``(samples, tokens)``, which tokens are not padding; None = all count.
        result: What the block returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    result: Any


def refined(
    block: nn.Module,
    uncut: nn.Module,
    frozen: Mapping[str, Tensor],
    calls: Sequence[Call],
    steps: int,
    process_sum: ProcessSum | None,
) -> tuple[dict[str, Tensor], float, float] | str:
    """Adam on the squared distance to what the uncut block makes of the same inputs.

    Block-wise fine-tuning (EBFT, arXiv 2402.12419), which trains the weights that unstructured
    pruning left. Differs from the paper: the target is the uncut block's output of what the cut
    model gives it, not that of the dense model; rates follow the size of each parameter. What is
    best on every fourth batch, which takes no part in training, stays; the start is among that.

    Args:
        block: With its readers solved; the removed columns are zero. It stays as it is.
        uncut: The block with all columns.
        frozen: By name, of each parameter that is trained: a boolean tensor of its shape, which of
            its numbers stay as they are.
        calls: Of each batch.
        steps: Optimizer steps, one a batch.
        process_sum: Sum of a tensor over all processes.

    Returns:
        Parameters by name, in float32 or wider, and the errors before and after; or why there are
        none.
    """
    add = process_sum or (lambda tensor: tensor)
    student, teacher = _wide(block), _wide(uncut)
    with torch.no_grad():
        aims = [(call, _outputs(teacher, call)) for call in calls]
        changing = [call for call in calls[:1] if not _repeats(student, call)]
    fit = [pair for i, pair in enumerate(aims) if i % 4 != 3]
    held_out = [pair for i, pair in enumerate(aims) if i % 4 == 3]
    if add(torch.tensor(float(len(changing)))) > 0:
        return "it gives something else when it is called again"
    named = dict(student.named_parameters())
    trained = {name: named[name].requires_grad_() for name in frozen}

    @torch.no_grad()
    def error() -> float:
        off = sum(float(_distance(_outputs(student, call), target)) for call, target in held_out)
        size = sum(float(_size(target)) for _, target in held_out)
        total = add(torch.tensor([off, size], dtype=torch.float64))
        return float(total[0] / total[1]) if total[1] > 0 else math.nan

    def snapshot() -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in trained.items()}

    best, state = error(), snapshot()
    first = best
    if not math.isfinite(first):
        return "there are too few batches to hold some out (4 at the least), or its outputs are 0"
    scale = sum(float(_size(target)) for _, target in fit) / max(len(fit), 1) or 1.0
    sizes = [float(p.detach()[~frozen[n]].square().mean().sqrt()) for n, p in trained.items()]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained.values()], betas=(0.9, 0.95))
    order = _orders(len(fit))
    for step in range(steps):
        rate = _RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * size
        optimizer.zero_grad()
        if fit:
            call, target = fit[next(order)]
            with torch.enable_grad():
                loss = _distance(_outputs(student, call), target) / scale
            loss.backward()
        for name, parameter in trained.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = add(grad.masked_fill(frozen[name], 0.0))
        optimizer.step()
        if (step + 1) % max(1, steps // _CHECKS) == 0 and (now := error()) < best:
            best, state = now, snapshot()
    return state, first, best


def _orders(number: int) -> Iterator[int]:
    """All batches in a random order, again and again."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(number, generator=generator).tolist()


def _wide(block: nn.Module) -> nn.Module:
    """A copy in float32, or in float64 where the block has that."""
    double = any(parameter.dtype == torch.float64 for parameter in block.parameters())
    twin = copy_model(block) if double else copy_model(block).float()
    return twin.eval().requires_grad_(False)


def _outputs(block: nn.Module, call: Call) -> list[Tensor]:
    dtype = next(p.dtype for p in block.parameters() if p.is_floating_point())

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    args, kwargs = map_tensors((call.args, call.kwargs), own)
    return _numbers(block(*args, **kwargs), call.mask)


def _numbers(result: Any, mask: Tensor | None) -> list[Tensor]:
    """Floating outputs; of padding, zeros."""
    found = [tensor for tensor in output_tensors(result) if tensor.is_floating_point()]
    if mask is None:
        return found
    return [
        tensor * mask.to(tensor)[(...,) + (None,) * (tensor.ndim - 2)]
        if tensor.shape[:2] == mask.shape
        else tensor
        for tensor in found
    ]


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum of squares of the differences."""
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([(one - two).square().sum() for one, two in pairs]).sum()


def _size(targets: Sequence[Tensor]) -> Tensor:
    return torch.stack([target.square().sum() for target in targets]).sum()


def _repeats(student: nn.Module, call: Call) -> bool:
    """Whether a block gives again what it gave."""
    again, result = _outputs(student, call), _numbers(call.result, call.mask)
    if not again or [t.shape for t in again] != [t.shape for t in result]:
        return False
    result = [tensor.to(again[0]) for tensor in result]
    return bool(_distance(again, result) <= _TOLERANCE * _size(result))
