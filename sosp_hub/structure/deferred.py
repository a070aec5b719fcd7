"""Parameters without data that are computed where an operation reads them.

A copy of a model that has them takes the memory of one of its tensors at a time. They have the
shape, dtype and device of what they stand for, and raise where code asks for their data outside of
an operation.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import DispatchMode, FakeMode, TensorTable

_COMPUTE = TensorTable()
"""From a deferred parameter to what computes it."""
_SMALL = 16_384
"""Numbers in a parameter that is not worth deferring."""
_AT_ONCE = ContextVar("_AT_ONCE", default=False)


def deferred(
    compute: Callable[[], Tensor],
    like: Tensor,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """A parameter that is what ``compute`` gives, at once where it is small; without gradient.

    Args:
        compute: Is called whenever an operation reads the parameter.
        like: Has its device and, where nothing else is said, its shape, strides and dtype.
        shape: Of what is computed, contiguous.
        dtype: Of what is computed.
    """
    if _AT_ONCE.get() or like.numel() <= _SMALL:
        return nn.Parameter(compute(), requires_grad=False)
    options: Any = {"dtype": dtype or like.dtype, "device": like.device}
    with _without_data():
        if shape is None:
            empty = torch.empty_strided(like.shape, like.stride(), **options)
        else:
            empty = torch.empty(shape, **options)
        parameter = nn.Parameter(empty, requires_grad=False)
    _COMPUTE[parameter] = compute
    return parameter


@functools.cache
def _without_data() -> FakeMode:
    return FakeMode()


def is_deferred(tensor: Tensor) -> bool:
    """Whether it is a parameter that is computed where it is read."""
    return tensor in _COMPUTE


def data_of(tensor: Tensor) -> Tensor:
    """The tensor, or what stands behind a deferred parameter."""
    compute = _COMPUTE.get(tensor)
    return tensor.detach() if compute is None else compute()


@contextmanager
def at_once() -> Iterator[None]:
    """Within it parameters that would be deferred are computed when they are made."""
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


class WhereRead(DispatchMode):
    """Within it operations get the data of deferred parameters; the outermost of several modes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not types:  # plain tensors alone
            return func(*args, **(kwargs or {}))
        return func(*_read(args), **_read(kwargs or {}))


def where_read(model: nn.Module) -> AbstractContextManager[Any]:
    """``WhereRead`` for a model that has deferred parameters; others need no mode."""
    return WhereRead() if any(map(is_deferred, model.parameters())) else nullcontext()


def _read(value: Any) -> Any:
    if isinstance(value, Tensor):
        compute = _COMPUTE.get(value)
        return value if compute is None else compute()
    if isinstance(value, tuple | list):
        return type(value)(_read(item) for item in value)
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    return value
