"""Copies of models and inputs that share nothing that a pass could write to."""

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sosp_hub.compat.torch import FakeMode, with_marks
from sosp_hub.structure.deferred import is_deferred

_PLAIN = {str, int, float, bool, type(None)}
_TABLES = {name for name in vars(nn.Module()) if name.startswith("_")} - {"_buffers"}


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of ``functools`` caches that a module keeps for its own methods.

    Args:
        model: Any module. What it cached while gradients were recorded is copied without them.
        memo: What stands for what in the copy, by id; as for ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    for parameter in model.parameters():
        if is_deferred(parameter):
            memo.setdefault(id(parameter), parameter)
    caches: list[tuple[nn.Module, str, Any]] = []
    seen: set[int] = set()
    for module in model.modules():
        tables = [table for key, table in vars(module).items() if key in _TABLES]
        memo |= {id(table): type(table)() for table in tables if table is not None and not table}
        inside = {key: value for key, value in vars(module).items() if key not in _TABLES}
        caches += [
            (module, key, value)
            for key, value in inside.items()
            if type(value) is functools._lru_cache_wrapper
        ]
        for value in inside.values():  # not of `inside` itself, whose id another one will have
            for tensor in _tensors_within(value, seen):
                if not tensor.is_leaf:
                    memo.setdefault(id(tensor), tensor.detach().clone())
    twin = copy.deepcopy(model, memo)
    for parameter in model.parameters():
        with_marks(memo[id(parameter)], parameter)
    for module, key, cache in caches:
        function = copy.deepcopy(cache.__wrapped__, memo)  # a method of the copy
        vars(memo[id(module)])[key] = functools.lru_cache(**cache.cache_parameters())(function)
    return twin


def share_model(
    model: nn.Module,
    own: Collection[str] = (),
    instead: Callable[[str, nn.Parameter], nn.Parameter | None] | None = None,
) -> nn.Module:
    """A copy whose parameters lie where those of the model lie; all else is its own.

    Args:
        model: Any module.
        own: Names of parameters that are written to, by a pass or by the caller, and are copied.
        instead: What stands for a parameter of this name; None = what shares its memory.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        put_off = is_deferred(parameter)
        plain = put_off or (type(parameter) is nn.Parameter and parameter.is_leaf)
        if not plain or name in own:
            continue
        other = None if instead is None else instead(name, parameter)
        if other is None and not put_off:
            other = with_marks(nn.Parameter(parameter.detach(), parameter.requires_grad), parameter)
        memo[id(parameter)] = parameter if other is None else other
    return copy_model(model, memo)


def unshared(twin: nn.Module, model: nn.Module) -> nn.Module:
    """The twin of `share_model` with copies of what it still shares; its parameters stay."""
    held = {place for each in model.parameters() if (place := _place(each)) is not None}
    for parameter in twin.parameters():
        if _place(parameter) in held:
            parameter.data = parameter.detach().clone()
    return twin


def _place(tensor: Tensor) -> int | None:
    """Where a tensor has its memory; None where it has none."""
    if tensor.is_meta or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr() or None


def copy_inputs(inputs: Any, fake: FakeMode | None = None) -> Any:
    """The same nesting with tensors of their own, without data where a mode is given.

    A pass may write to its inputs, as caches of key and value tensors are there for.
    """
    if fake is None:
        return map_tensors(inputs, lambda tensor: tensor.detach().clone())
    return map_tensors(inputs, fake.from_tensor)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with what ``change`` makes of each tensor."""
    memo: dict[int, Any] = {}
    for tensor in _tensors_within(value, set()):
        memo[id(tensor)] = change(tensor)
    return _copied(value, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # a lock, a generator, a file
        if isinstance(value, tuple | list):
            return type(value)(_copied(item, memo) for item in value)
        if isinstance(value, dict):
            return {key: _copied(item, memo) for key, item in value.items()}
        return value


def _tensors_within(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if type(value) in _PLAIN or id(value) in seen or isinstance(value, type | nn.Module):
        return
    seen.add(id(value))
    inside: Any = ()
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, tuple | list):
        inside = value
    for item in (*inside, *getattr(value, "__dict__", {}).values()):
        yield from _tensors_within(item, seen)
