"""Parameters that ``apply_`` replaces, and the optimizers that still hold them."""

import gc
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sosp_hub.compat.torch import TensorTable, after_steps, has_hooks
from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.tensors import Positions, get_tensor, put_tensor


class Replaced(NamedTuple):
    """What became of a parameter.

    Attributes:
        name: Its name in the model before the cut.
        plan: The plan of the cut.
    """

    name: str
    plan: PruningPlan


_REPLACED = TensorTable()  # from the old parameter; it goes when nobody holds the parameter
_WATCH: list[Any] = []


def note_replaced(parameters: Mapping[str, nn.Parameter], plan: PruningPlan) -> None:
    """Remembers parameters that no model holds any more, and watches the steps of optimizers."""
    for name, parameter in parameters.items():
        _REPLACED[parameter] = Replaced(name, plan)
    if not _WATCH:
        _WATCH.append(after_steps(_refuse_stale))


class Replacing:
    """Parameters of a model are replaced by cut ones, one by one; all of them, or none.

    A parameter that nobody else holds is given up at once: what was cut off is kept until the end,
    so that it can be put together again, bit by bit, should anything go wrong.
    """

    def __init__(self, model: nn.Module, graph: Graph, plan: PruningPlan) -> None:
        self._model, self._graph, self._plan = model, graph, plan
        self._undo: list[tuple[list[_Place], Callable[[], Tensor]]] = []
        self._before = {name: weakref.ref(p) for name, p in model.named_parameters()}

    def __enter__(self) -> "Replacing":
        return self

    def put(self, name: str, positions: Positions, new: Tensor) -> None:
        """Puts a cut tensor in the place of the model's."""
        places = [self._place(each) for each in (name, *self._graph.aliases.get(name, ()))]
        self._undo.append((places, _way_back(get_tensor(self._model, name), positions, new)))
        _put(places, new)

    def _place(self, name: str) -> "_Place":
        owner, _, leaf = name.rpartition(".")
        return weakref.ref(self._model.get_submodule(owner)), leaf

    def leave_to_others(self) -> None:
        """Gives submodules that the model no longer has, but somebody else, their tensors back."""
        if any(self._others(places) for places, _ in self._undo):
            gc.collect()  # those that hold nobody but themselves
        while self._undo:
            places, old = self._undo.pop()
            if others := self._others(places):
                _put(others, old())

    def _others(self, places: "list[_Place]") -> "list[_Place]":
        return [place for place in places if place[0]() not in (None, self._model)]

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            alive = {name: old for name, ref in self._before.items() if (old := ref()) is not None}
            note_replaced(alive, self._plan)
            return
        while self._undo:
            places, old = self._undo[-1]
            _put(places, old())
            self._undo.pop()


_Place = tuple[weakref.ref[nn.Module], str]
"""A module and the name of a tensor in it."""


def _put(places: list[_Place], tensor: Tensor) -> None:
    for held, leaf in places:
        if (module := held()) is not None:
            put_tensor(module, leaf, tensor)


def _way_back(old: Tensor, positions: Positions, new: Tensor) -> Callable[[], Tensor]:
    """Gives a tensor back that was cut: itself where anybody holds it, else an equal one."""
    if type(old) is not nn.Parameter or vars(old) or old.grad is not None or has_hooks(old):
        return lambda: old
    removed, rest = [], old.detach()
    for dim, kept in enumerate(positions):
        if kept is not None:
            index = torch.as_tensor(kept, device=rest.device)
            gone = torch.ones(rest.shape[dim], dtype=torch.bool, device=rest.device)
            gone = gone.index_fill(0, index, False).nonzero()[:, 0]
            removed.append((dim, index, gone, rest.index_select(dim, gone)))
            rest = rest.index_select(dim, index)
    held, trains, strides = weakref.ref(old), old.requires_grad, old.stride()

    def put_together() -> Tensor:
        if (same := held()) is not None:
            return same
        whole = new.detach()
        for dim, index, gone, part in reversed(removed):
            shape = list(whole.shape)
            shape[dim] = len(index) + len(gone)
            larger = whole.new_empty(shape)
            whole = larger.index_copy_(dim, index, whole).index_copy_(dim, gone, part)
        same = torch.empty_strided(whole.shape, strides, dtype=whole.dtype, device=whole.device)
        return nn.Parameter(same.copy_(whole), requires_grad=trains)

    return put_together


def replaced(parameter: Tensor) -> Replaced | None:
    """What became of a parameter, if ``apply_`` replaced it."""
    return _REPLACED.get(parameter)


def _refuse_stale(optimizer: Optimizer, *_: Any) -> None:
    """Raises where a step moved nothing because all that it could move was replaced."""
    if not len(_REPLACED):
        return
    stale = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter in _REPLACED
    ]
    if stale and all(parameter.grad is None for parameter in stale):
        raise PlanError(
            f"this optimizer holds {len(stale)} parameters that apply_ replaced, such as "
            f"{_REPLACED[stale[0]].name!r}; they get no gradients, so its steps do not train the "
            "cut model: call sosp_hub.carry(optimizer, model, graph, plan) after apply_, or make "
            "a new optimizer"
        )
