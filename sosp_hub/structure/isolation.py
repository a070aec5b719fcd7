"""Running a model's code without a trace of it in what the code shares with its caller.

A copy of a model still shares its classes, the globals of their files, closures, default arguments
and every cache in these with the caller's own model. What such a pass puts there (tensors without
data, tensors with masked values, traced numbers) would be found by the caller's next pass. So these
places are noted before and set back afterwards, and ``functools`` caches, which cannot be set back,
are exchanged for empty ones.
"""

import collections
import functools
import gc
import operator
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sosp_hub.compat.accelerate import in_own_precision
from sosp_hub.compat.torch import eagerly, num_writes

_Cache = functools._lru_cache_wrapper

_FOREIGN = frozenset(sys.stdlib_module_names) | frozenset(
    [
        *("IPython", "PIL", "_pytest", "accelerate", "anyio", "certifi", "datasets", "fsspec"),
        *("h11", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "idna", "jax"),
        *("matplotlib", "numpy", "packaging", "pandas", "psutil", "pyarrow", "pydantic", "pytest"),
        *("regex", "requests", "safetensors", "scipy", "sklearn", "sosp_hub", "sympy"),
        *("tensorflow", "tokenizers", "torch", "tqdm", "triton", "truststore"),
        *("typing_extensions", "urllib3", "yaml"),
    ]
)
"""Packages that keep nothing of a model's pass, or whose own state must not be set back."""

_PLAIN = (int, str, float, bool, type(None), bytes, complex, torch.dtype, torch.device)
_LARGEST_CONTAINER = 100_000
_LARGEST_TENSOR = 65_536

_MISSING: Any = object()


@contextmanager
def isolated(*models: nn.Module | type[nn.Module]) -> Iterator[None]:
    """Within it the code of these models may run; afterwards everything is as it was before.

    Of a class, objects may also be built.

    Modules (attributes, hooks, buffers of the models themselves), classes, globals, closures and
    default arguments of their code and of all that it imports, the caches in them, and the random
    number generators, also after an exception. Compiled modules run as they were written, models
    that Accelerate prepared without its mixed precision, and ``functools`` caches start empty, so
    that a pass takes one path whatever ran before.

    What a model reaches only through threads of its own or through C++ is not seen.
    """
    classes = frozenset(kind for model in models for kind in _kinds(model))
    stack: list[tuple[frozenset[Any], _Places, Snapshot]]
    stack = _running.__dict__.setdefault("stack", [])
    known = next((each for each in stack if classes <= each[0]), None)  # a pass within a verb
    generators = _generators()
    if known is None:
        places = _Places()
        places.scan(models)
        known = classes, places, places.snapshot()
    _, places, snapshot = known
    stack.append(known)
    try:
        places.exchange_caches()
        with eagerly(), ExitStack() as precision:
            for model in models:
                if isinstance(model, nn.Module):
                    precision.enter_context(in_own_precision(model))
            yield
    finally:
        stack.pop()
        places.restore(snapshot)
        for put_back in generators:
            put_back()


_running = threading.local()


def _kinds(model: nn.Module | type[nn.Module]) -> Iterator[Any]:
    if isinstance(model, type):
        yield model, "__init__"
    else:
        yield from map(type, model.modules())


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """The generators of torch, numpy and Python go on afterwards where they were."""
    generators = _generators()
    try:
        yield
    finally:
        for put_back in generators:
            put_back()


def _generators() -> list[Callable[[], None]]:
    """Puts back the state of each random number generator."""
    state, plain, arrays = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    found: list[Callable[[], None]] = [
        lambda: torch.set_rng_state(state),
        lambda: random.setstate(plain),
        lambda: np.random.set_state(arrays),  # noqa: NPY002
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        found.append(lambda: torch.cuda.set_rng_state_all(states))
    return found


Snapshot = list[tuple[Any, Any]]
_Put = Callable[[Any, Any, Any], None]


@dataclass
class _Places:
    """Where code can leave something: found once, noted and set back for each pass.

    Attributes:
        namespaces: Dictionaries of modules and objects.
        classes: Classes.
        containers: Dictionaries, lists, sets and queues.
        cells: Variables of closures.
        tensors: Small tensors in any of these.
        caches: ``functools`` caches: how to put another one in their place.
    """

    namespaces: list[dict[str, Any]] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    cells: list[types.CellType] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    caches: list[tuple["_Slot", Any]] = field(default_factory=list)

    def scan(self, models: Sequence[nn.Module | type[nn.Module]]) -> None:
        """Everything that is reached from the models' objects and from the code they run."""
        _Scan(self).run(models)

    def snapshot(self) -> Snapshot:
        """What is in every place."""
        return [
            *((d, dict(d)) for d in self.namespaces),
            *((c, dict(vars(c))) for c in self.classes),
            *((c, _entries(c)) for c in self.containers),
            *((cell, _content(cell)) for cell in self.cells),
            *((tensor, (num_writes(tensor), tensor.detach().clone())) for tensor in self.tensors),
        ]

    def exchange_caches(self) -> None:
        """Puts an empty cache in the place of each."""
        fresh: dict[int, Any] = {}
        for slot, cache in self.caches:
            if id(cache) not in fresh:
                of_module = type(slot.holder) is dict and "_parameters" in slot.holder
                fresh[id(cache)] = _empty(cache) if of_module else _empty_twin(cache)
            if fresh[id(cache)] is not cache:
                slot.fill(fresh[id(cache)])

    def restore(self, snapshot: Snapshot) -> None:
        """Sets every place back to what it held."""
        at = 0
        for restore_one, places in (
            (_restore_namespace, self.namespaces),
            (_restore_class, self.classes),
            (_restore_container, self.containers),
            (_restore_cell, self.cells),
            (_restore_tensor, self.tensors),
        ):
            for place, before in snapshot[at : at + len(places)]:
                restore_one(place, before)
            at += len(places)


class _Scan:
    """Follows objects and code, starting with what a model's modules hold and what they call.

    Code is followed by name: a global is reached where code names it, and a method where some code
    that runs names it, whatever object that may be a method of.
    """

    def __init__(self, places: _Places) -> None:
        self.places = places
        self.seen: set[int] = set()
        self.waiting: list[Any] = []
        self.names: set[str] = {"forward"}
        self.unnamed: dict[str, list[Any]] = {}
        self.own: dict[Any, bool] = {}
        self.builds = False

    def run(self, models: Sequence[nn.Module | type[nn.Module]]) -> None:
        for model in models:
            if isinstance(model, type):
                self.builds = True
                self.visit((model,))
            else:
                self.visit(model.modules())
        while self.waiting:
            self.follow(self.waiting.pop())

    def is_own(self, name: Any) -> bool:
        if name not in self.own:
            self.own[name] = isinstance(name, str) and name.partition(".")[0] not in _FOREIGN
        return self.own[name]

    def visit(self, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) not in _PLAIN and id(value) not in self.seen:
                self.seen.add(id(value))
                self.waiting.append(value)

    def visit_items(self, holder: Any, put: _Put, items: Iterable[tuple[Any, Any]]) -> None:
        """Values that a holder keeps, and the caches among them, which can be exchanged there."""
        for key, value in items:
            if type(value) in _PLAIN:
                continue
            cache = _unwrapped(value) if type(value) in _WRAPPERS else value
            if type(cache) is not _Cache:
                self.visit((value,))
            else:
                self.places.caches.append((_Slot(holder, key, put, value), cache))
                self.visit((cache.__wrapped__,))

    def namespace(self, place: dict[str, Any], items: dict[str, Any] | None = None) -> None:
        self.places.namespaces.append(place)
        inside = place if items is None else items
        self.visit_items(place, dict.__setitem__, [*inside.items()])

    def follow(self, value: Any) -> None:
        kind = type(value)
        if kind is types.FunctionType:
            self.function(value)
        elif isinstance(value, type):
            self.visit(value.__bases__)
            if self.is_own(value.__module__) and _is_open(value):
                self.places.classes.append(value)
                self.methods(value)
        elif isinstance(value, types.ModuleType):
            if self.is_own(value.__name__):
                self.places.namespaces.append(vars(value))
        elif isinstance(value, dict | list | set | collections.deque):
            if len(value) <= _LARGEST_CONTAINER:
                self.places.containers.append(value)
                if isinstance(value, dict):
                    self.visit_items(value, dict.__setitem__, [*dict.items(value)])
                elif isinstance(value, list):
                    self.visit_items(value, list.__setitem__, [*enumerate(list.__iter__(value))])
                else:
                    self.visit(value)
        elif isinstance(value, tuple | frozenset):
            self.visit(value)
        elif kind in _WRAPPERS:
            self.visit((_unwrapped(value),))
        elif isinstance(value, functools.partial):
            self.visit((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.visit((value.__func__, value.__self__))
        elif kind is _Cache:  # in a tuple or a partial, where no other can be put
            self.visit((value.__wrapped__,))
        elif isinstance(value, Tensor):
            if value.numel() <= _LARGEST_TENSOR and not value.is_meta and not _is_odd(value):
                self.places.tensors.append(value)
        elif isinstance(value, weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
            self.places.containers.append(vars(value)["data"])
        elif isinstance(value, nn.Module):
            self.visit((kind,))
            self.places.containers.append(vars(value)["_parameters"])
            inside = {key: item for key, item in vars(value).items() if key != "_parameters"}
            self.namespace(vars(value), inside)
        elif self.is_own(kind.__module__) or kind in _OPEN_KINDS:
            self.visit((kind,))
            inside = getattr(value, "__dict__", None)
            if isinstance(inside, dict):
                self.namespace(inside)

    def function(self, function: types.FunctionType) -> None:
        if not self.is_own(function.__module__):
            return
        places = self.places
        self.visit((function.__defaults__, function.__kwdefaults__))
        if function.__dict__:
            self.namespace(function.__dict__)
        for cell in function.__closure__ or ():
            if id(cell) not in self.seen:
                self.seen.add(id(cell))
                content = _content(cell)
                if not isinstance(content, type):
                    places.cells.append(cell)
                self.visit_items(cell, _set_cell, [(None, content)])
        variables = function.__globals__
        if id(variables) not in self.seen:
            self.seen.add(id(variables))
            places.namespaces.append(variables)
        self.code(function.__code__, variables)

    def code(self, code: types.CodeType, variables: dict[str, Any]) -> None:
        """What code names: globals, attributes of modules, methods of anything."""
        if id(code) in self.seen:
            return
        self.seen.add(id(code))
        inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
        told = [const for const in code.co_consts if type(const) is str and const.isidentifier()]
        names = [*code.co_names, *told]
        modules = []
        for name in code.co_names:
            value = variables.get(name, _MISSING)
            if value is _MISSING and name in sys.modules:
                value = sys.modules[name]  # an import in the code
            if isinstance(value, types.ModuleType):
                modules.append(value)
            if value is not _MISSING:
                self.visit_items(variables, dict.__setitem__, [(name, value)])
        for module in modules:
            if self.is_own(module.__name__):
                found = [(name, vars(module)[name]) for name in names if name in vars(module)]
                self.visit_items(vars(module), dict.__setitem__, found)
        for name in names:
            if name not in self.names:
                self.names.add(name)
                self.visit(self.unnamed.pop(name, ()))
        for const in inner:
            self.code(const, variables)

    def methods(self, kind: type) -> None:
        built = issubclass(kind, nn.Module) and not self.builds  # before the pass
        for name, value in [*vars(kind).items()]:
            plain = _unwrapped(value) if type(value) in _WRAPPERS else value
            if type(plain) is not types.FunctionType:
                self.visit_items(kind, type.__setattr__, [(name, value)])
            elif name in self.names or (
                name.startswith("__") and not (built and name == "__init__")
            ):
                self.visit((plain,))
            else:
                self.unnamed.setdefault(name, []).append(plain)


# What a place holds, and how it is set back -------------------------------------------------------


def _restore_namespace(place: dict[str, Any], then: dict[str, Any]) -> None:
    if _same(place.values(), then.values()) and _same(place, then):
        return
    for key in [key for key in place if key not in then]:
        if not _is_import(place[key]):
            del place[key]
    for key, value in then.items():
        if place.get(key, _MISSING) is not value:
            place[key] = value


def _restore_class(place: type, then: dict[str, Any]) -> None:
    if _same(vars(place).values(), then.values()) and _same(vars(place), then):
        return
    now = dict(vars(place))
    for key, value in now.items():
        if key not in then and not key.startswith("__") and not _is_import(value):
            type.__delattr__(place, key)
    for key, value in then.items():
        if now.get(key, _MISSING) is not value and not key.startswith("__"):
            type.__setattr__(place, key, value)


def _entries(place: Any) -> Any:
    if isinstance(place, dict):
        return list(dict.keys(place)), list(dict.values(place))
    return list(place)


def _restore_container(place: Any, before: Any) -> None:
    if isinstance(place, dict):
        keys, values = before
        if not place and not keys:
            return
        if not (_same(dict.values(place), values) and _same(dict.keys(place), keys)):
            kind: Any = (
                collections.OrderedDict if isinstance(place, collections.OrderedDict) else dict
            )
            kind.clear(place)
            for key, value in zip(keys, values, strict=True):
                kind.__setitem__(place, key, value)
    elif isinstance(place, list):
        if not _same(list.__getitem__(place, slice(None)), before):
            list.__setitem__(place, slice(None), before)
    elif isinstance(place, set):
        if {*map(id, place)} != {*map(id, before)}:
            set.clear(place)
            set.update(place, before)
    elif not _same(place, before):
        place.clear()
        place.extend(before)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


def _restore_cell(cell: types.CellType, before: Any) -> None:
    if _content(cell) is not before:
        cell.cell_contents = before


def _restore_tensor(tensor: Tensor, before: tuple[int, Tensor]) -> None:
    if num_writes(tensor) != before[0]:
        with torch.no_grad():
            tensor.copy_(before[1])


def _same(now: Collection[Any], before: Collection[Any]) -> bool:
    """Whether they hold the same objects in the same order."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _is_import(value: Any) -> bool:
    """Imports stay: the import system, which knows that they were made, would not repeat them."""
    return isinstance(value, types.ModuleType | types.FunctionType | type)


# Caches of functools ------------------------------------------------------------------------------

_WRAPPERS = (staticmethod, classmethod, property, functools.cached_property)
_OPEN_KINDS = (types.SimpleNamespace, threading.local)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return value.__func__


@dataclass(frozen=True)
class _Slot:
    """Where a cache is kept, perhaps in a ``staticmethod`` or the like."""

    holder: Any
    key: Any
    put: "_Put"
    held: Any

    def fill(self, cache: Any) -> None:
        """Puts another cache there."""
        if isinstance(self.held, property):
            cache = property(cache, self.held.fset, self.held.fdel, self.held.__doc__)
        elif type(self.held) in _WRAPPERS:
            cache = type(self.held)(cache)
        self.put(self.holder, self.key, cache)


def _set_cell(cell: types.CellType, _: Any, value: Any) -> None:
    cell.cell_contents = value


def _empty(cache: Any) -> Any:
    return functools.lru_cache(**cache.cache_parameters())(cache.__wrapped__)


def _empty_twin(cache: Any) -> Any:
    """An empty cache of the same function, which still knows what is no tensor and no number.

    So a function that makes one object for all (a registry) goes on giving that one.
    """
    size = cache.cache_info().currsize
    code = getattr(cache.__wrapped__, "__code__", None)
    if size and code is not None and not code.co_argcount and not code.co_flags & 0x0C:
        return cache  # without arguments: what it gives is there already
    fresh = _empty(cache)
    known = {key: result for key, result in _results(cache) if not _is_number(result)}
    if not known:
        return fresh

    @functools.wraps(cache.__wrapped__)
    def twin(*args: Any, **kwargs: Any) -> Any:
        key = args[0] if len(args) == 1 and type(args[0]) in {int, str} else args
        return known[key] if not kwargs and key in known else fresh(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(twin, name, getattr(fresh, name))
    return twin


def _results(cache: Any) -> Iterator[tuple[Any, Any]]:
    """What a cache holds, by its keys: arguments as a tuple, or the only one.

    To ask the cache itself would count as a hit.
    """
    inside = gc.get_referents(cache)
    keys = next((d for d in inside if type(d) is dict and d is not cache.__dict__), {})
    if cache.cache_parameters()["maxsize"] is None:
        yield from keys.items()
        return
    place = {id(each): i for i, each in enumerate(inside)}
    for key in keys:  # each result comes behind its key
        if place.get(id(key), len(inside)) + 1 < len(inside):
            yield key, inside[place[id(key)] + 1]


def _is_number(value: Any) -> bool:
    """Whether a pass may make it anew: nothing that others put something into."""
    if isinstance(value, tuple | list):
        return all(_is_number(item) for item in value)
    return isinstance(value, (Tensor, np.ndarray, np.generic, *_PLAIN))


def _is_open(kind: type) -> bool:
    """Whether attributes of a class can be set: not on those that C made."""
    return bool(kind.__flags__ & (1 << 9)) and not kind.__flags__ & (1 << 8)


def _is_odd(tensor: Tensor) -> bool:
    """Whether a tensor has no plain memory that could be copied."""
    return type(tensor) not in {Tensor, nn.Parameter, nn.Buffer} or tensor.layout != torch.strided
