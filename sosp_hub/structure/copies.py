"""Copies of models and inputs that share nothing that a pass could write to."""

import copy
import copyreg
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType, NoneType
from typing import Any

from torch import Tensor, nn

from sosp_hub.compat.torch import FakeMode, with_marks
from sosp_hub.structure.deferred import is_deferred

_PLAIN = {str, int, float, bool, NoneType, ModuleType}
_CONTAINERS = {dict, set, OrderedDict}
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
    plain = [module for module in model.modules() if _is_plain(type(module))]
    for module in plain:
        memo.setdefault(id(module), object.__new__(type(module)))
        for key, table in vars(module).items():
            if key in _TABLES and type(table) in _CONTAINERS and not table:
                memo.setdefault(id(table), type(table)())
    for module in model.modules():
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
    for module in plain:
        vars(memo[id(module)]).update(
            (key, value if type(value) in _PLAIN else copy.deepcopy(value, memo))
            for key, value in module.__getstate__().items()
        )
    twin = copy.deepcopy(model, memo)
    for parameter in model.parameters():
        if id(parameter) in memo:  # else of a module that builds its copies itself
            with_marks(memo[id(parameter)], parameter)
    for module, key, cache in caches:
        function = copy.deepcopy(cache.__wrapped__, memo)  # a method of the copy
        vars(memo[id(module)])[key] = functools.lru_cache(**cache.cache_parameters())(function)
    return twin


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether all that a copy of such a module needs is a copy of each attribute."""
    return (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind.__setstate__ is nn.Module.__setstate__
        and kind.__new__ is object.__new__
        and not hasattr(kind, "__deepcopy__")
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
        and kind not in copyreg.dispatch_table
    )


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
