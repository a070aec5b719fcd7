"""Choices among values that are equal but for rounding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sosp_hub.compat.torch import DispatchMode, aten
from sosp_hub.structure import rules
from sosp_hub.structure.copies import map_tensors
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.verification.outputs import TOLERANCE, has_values, relative_error
from sosp_hub.surgery.verification.steps import plain_name


def chooses(graph: Graph) -> bool:
    """Whether values decide what goes on, so that rounding may change all that follows."""
    return any(step.picked is not None or plain_name(step.name) in _CHOICES for step in graph.steps)


_CHOICES = {"topk", "sort", "argsort", "nms", "nonzero", "argmax", "argmin", "bucketize"}


class Choices(DispatchMode):
    """What the masked model chooses, the cut one chooses too if it chooses among the same values.

    Of values that are equal but for rounding, such as the scores of a plain background, one model
    takes others than the other one, and both are right.

    Args:
        any_made: Whether the pass chooses at all; else no operation is looked at.
    """

    def __init__(self, *, any_made: bool = True) -> None:
        super().__init__()
        self._any_made = any_made
        self._made: list[tuple[str, list[Tensor], Any]] = []
        self._notes = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it choices are written down, in place of what was written down before."""
        self._made, self._notes = [], True
        with self if self._any_made else nullcontext():
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Within it those choices are made again, in their order, each where its values return."""
        self._notes = False
        with self if self._any_made else nullcontext():
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _CHOICES:
            return out
        given = list(rules.tensors((args, kwargs)))
        if self._notes:
            self._made.append((name, *map_tensors((given, out), Tensor.clone)))
            return out
        for place, (made, values, choice) in enumerate(self._made):
            if made == name and _alike(given, values):
                del self._made[: place + 1]
                return choice
        return out


class FirstOfEqual(DispatchMode):
    """``topk`` takes the first of equal values; torch's choice depends on how many there are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not aten.topk.default or not args[0].dim():
            return func(*args, **(kwargs or {}))
        return _first(*args, **(kwargs or {}))


def _first(
    values: Tensor, k: int, dim: int = -1, largest: bool = True, *_: Any
) -> tuple[Tensor, Tensor]:
    found, places = values.sort(stable=True, dim=dim, descending=largest)
    return found.narrow(dim, 0, k).contiguous(), places.narrow(dim, 0, k).contiguous()


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether numbers are equal but for rounding, and all else is equal."""
    return len(found) == len(expected) and all(
        one.shape == two.shape
        and (
            relative_error([one], [two]) <= TOLERANCE if has_values(two) else torch.equal(one, two)
        )
        for one, two in zip(found, expected, strict=True)
    )
