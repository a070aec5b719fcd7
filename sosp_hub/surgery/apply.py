"""``apply``: a plan becomes a smaller model of the same class."""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType, ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sosp_hub.compat.torch import (
    has_hooks,
    hook_for,
    hook_inside,
    hook_tables,
    packed_weight,
    with_marks,
)
from sosp_hub.errors import PlanError
from sosp_hub.plan import Plan, PruningPlan
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.copies import share_model, unshared
from sosp_hub.structure.deferred import data_of, deferred, is_deferred
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.routes import find_scales
from sosp_hub.surgery.attributes import rewrite
from sosp_hub.surgery.layers import drop_layers
from sosp_hub.surgery.proof import verified_plan
from sosp_hub.surgery.replaced import Replacing
from sosp_hub.surgery.tensors import Positions, get_tensor, put_tensor
from sosp_hub.surgery.verification.twins import twin_of

_LOG = logging.getLogger("sosp_hub")

Verify = Literal["thorough", "fast"]


def apply(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    verify: Verify = "thorough",
    *,
    strict: bool = False,
) -> nn.Module:
    """What `sosp_hub.apply` does, without the description of the cut that checkpoints hold."""
    dense, part = _verified(model, graph, plan, verify, strict=strict)
    return unshared(cut(twin_of(dense, graph), graph, part), model)


def _verified(
    model: nn.Module, graph: Graph, plan: PruningPlan, verify: Verify, *, strict: bool
) -> tuple[nn.Module, PruningPlan]:
    """The model to cut, which is the given one where nothing is folded in, and by which plan."""
    check_arguments(model, graph, plan)
    if verify not in get_args(Verify):
        raise PlanError(f"verify: got {verify!r}, expected {' or '.join(get_args(Verify))}")
    graph.check(plan)
    check_model(model, graph)
    if verify == "thorough" and any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError("the model has no weights (meta device): give verify='fast', or load them")
    dense = model
    if plan.gates or plan.shifts:
        dense = fold(share_model(model, folds(graph, plan)), graph, plan)
    thorough = verify == "thorough"
    return dense, verified_plan(dense, graph, plan, thorough=thorough, cut=cut, strict=strict)


def fold(model: nn.Module, graph: Graph, plan: PruningPlan) -> nn.Module:
    """Multiplies, in place, the weights that read gated structures, and shifts biases."""
    with torch.no_grad():
        fold_into(lambda name: get_tensor(model, name), graph, plan)
    return model


def fold_into(get: Callable[[str], Tensor], graph: Graph, plan: PruningPlan) -> None:
    """`fold` for any tensors that are named like the model's."""
    for name, (scales, shift) in folds(graph, plan).items():
        tensor = get(name)
        for dim, scale in scales:
            shape = [-1 if i == dim else 1 for i in range(tensor.dim())]
            tensor.mul_(scale.to(tensor).view(shape))
        if shift is not None:
            tensor.add_(shift.to(tensor))


Fold = tuple[tuple[tuple[int, Tensor], ...], Tensor | None]
"""Dimensions of a tensor with factors for their positions, and what is added to it."""


def folds(graph: Graph, plan: PruningPlan) -> dict[str, Fold]:
    """What gates and shifts of a plan do to tensors of the model before the cut, by name.

    Raises:
        PlanError: Gates that no weight of their own reads, or shifts of what is no bias.
    """
    scales: dict[str, list[tuple[int, Tensor]]] = {}
    shifts: dict[str, Tensor] = {}
    for name, gates in plan.gates.items():
        group = graph.groups[name]
        if why := graph.fold_obstacle(name):
            raise PlanError(f"plan: gates of group {name!r} cannot be folded: {why}")
        factors = torch.ones(group.size, dtype=torch.float64)
        factors[list(plan.kept[name])] = torch.tensor(gates, dtype=torch.float64)
        for member in graph.readers(name):
            index = torch.as_tensor(member.index)
            scale = torch.where(index >= 0, factors[index.clamp(min=0)], 1.0)
            scales.setdefault(member.tensor, []).append((member.dim, scale))
    for name, values in plan.shifts.items():
        sizes = [size_of(axis) for axis in graph.tensors.get(name, ())]
        if sizes != [len(values)]:
            raise PlanError(
                f"plan: a shift of {len(values)} values for {name!r}, which is "
                f"{sizes if sizes else 'no tensor'} here; it was made for another model"
            )
        shifts[name] = torch.tensor(values, dtype=torch.float64)
    return {
        name: (tuple(scales.get(name, ())), shifts.get(name))
        for name in (*scales, *(name for name in shifts if name not in scales))
    }


def apply_(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    verify: Verify = "thorough",
    *,
    strict: bool = False,
) -> nn.Module:
    """What `sosp_hub.apply_` does, without that description."""
    dense, part = _verified(model, graph, plan, verify, strict=strict)
    _tell_left(model)
    twin = twin_of(dense, graph)
    for old, new in zip(model.parameters(), twin.parameters(), strict=True):
        new.grad = old.grad
    pairs = zip(model.modules(), twin.modules(), strict=True)
    twins = [(new, weakref.ref(old)) for old, new in pairs]
    with Replacing(model, graph, part) as replacing:
        on_cut = replacing.put if dense is model else None
        pruned = cut(twin, graph, part, on_cut)
    _keep_hooks(twins, model, pruned)
    _become(model, pruned)
    replacing.leave_to_others()
    for key, value in vars(model).items():  # such as the forward pass that Accelerate puts there
        if isinstance(value, MethodType) and value.__self__ is pruned:
            vars(model)[key] = MethodType(value.__func__, model)
    return model


def _become(model: nn.Module, pruned: nn.Module) -> None:
    """The model takes the place of the cut one, also for modules inside that hold it."""
    model.__dict__.clear()
    model.__dict__.update(pruned.__dict__)
    object.__setattr__(pruned, "__dict__", model.__dict__)


def _keep_hooks(
    twins: Sequence[tuple[nn.Module, weakref.ref[nn.Module]]], model: nn.Module, pruned: nn.Module
) -> None:
    """The caller's own hooks stay those that are called, and their handles remove them.

    The cut model has copies of them. Those that hold modules of the model, as its methods do, hold
    those of the cut model, as copies do. A module that somebody else holds too keeps its hooks in a
    table of its own.

    Args:
        twins: Modules of the cut model, and those that they were copied from.
        model: The model before the cut; it takes the place of ``pruned``.
        pruned: The cut model.
    """
    own = {id(module) for module in model.modules()}
    tables: list[tuple[Any, Any]] = []
    for module, held in twins:
        before = held()
        assert before is not None  # the model holds it
        for name, table in hook_tables(before).items():
            vars(before)[name], copies = copy.copy(table), vars(module)[name]
            vars(module)[name] = table  # whose entries handles remove
            tables.append((copies, table))
            for key, hook in table.items():
                function = hook_inside(hook)
                if any(id(each) in own for each in _held(function)):
                    function = hook_inside(copies[key])
                    if isinstance(function, MethodType) and function.__self__ is pruned:
                        function = MethodType(function.__func__, model)
                table[key] = hook_for(function, hook, model if module is pruned else module)
    instead = {id(copies): table for copies, table in tables}
    seen: set[int] = set()
    for handle in (each for module, _ in twins for each in _handles(vars(module), seen)):
        first, *more = (
            weakref.ref(instead.get(id(table), table)) if (table := ref()) is not None else ref
            for ref in (handle.hooks_dict_ref, *handle.extra_dict_ref)
        )
        handle.hooks_dict_ref, handle.extra_dict_ref = first, tuple(more)


_WITHOUT_HANDLES = (nn.Module, Tensor, str, type, ModuleType)


def _handles(value: Any, seen: set[int]) -> Iterator[RemovableHandle]:
    """Handles of hooks that a module holds itself, also in lists, dictionaries and objects."""
    if isinstance(value, RemovableHandle):
        yield value
    elif id(value) not in seen and not isinstance(value, _WITHOUT_HANDLES):
        seen.add(id(value))
        inside = value.values() if isinstance(value, Mapping) else ()
        if isinstance(value, list | tuple | set):
            inside = value
        for item in (*inside, *getattr(value, "__dict__", {}).values()):
            yield from _handles(item, seen)


def _held(hook: Any) -> Iterator[Any]:
    """The object that a method is of, and what a partial function has been given."""
    if isinstance(hook, MethodType):
        yield hook.__self__
    elif isinstance(hook, partial):
        yield from (*_held(hook.func), *hook.args, *hook.keywords.values())


def _tell_left(model: nn.Module) -> None:
    """Names parameters with what a cut one cannot take over: it was made for the size before."""
    left = [
        name
        for name, parameter in model.named_parameters()
        if has_hooks(parameter)
        or any(isinstance(value, Tensor) for value in vars(parameter).values())
    ]
    if left:
        _LOG.warning(
            "apply_: hooks and tensors that were set on parameters stay with the old ones (%s); "
            "set them again on those of the cut model",
            ", ".join(left[:4]) + ", ..." * (len(left) > 4),
        )


def check_arguments(model: object, graph: object, plan: object) -> None:
    """Raises PlanError where something else than a model, its graph and a plan is given."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"model: got a {type(model).__name__}, expected the nn.Module to cut")
    if not isinstance(graph, Graph):
        raise PlanError(f"graph: got a {type(graph).__name__}, expected what trace(...) returns")
    if not isinstance(plan, PruningPlan):
        raise PlanError(
            f"plan: got a {type(plan).__name__}, expected what allocate(...) returns; "
            "PruningPlan.from_json(text) reads a stored one"
        )
    check_not_packed(model)


def check_not_packed(model: nn.Module) -> None:
    """Raises PlanError where weights are quantised: their elements are not those of a plan."""
    if packed := packed_weight(model):
        raise PlanError(
            f"{packed}; cut the model that it was made from, save that, and quantise what "
            "from_pretrained(FOLDER, quantization_config=...) loads"
        )


def check_model(model: nn.Module, graph: Graph) -> None:
    """Raises PlanError unless ``graph`` was traced from this model."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, axes in graph.tensors.items():
        expected = [size_of(axis) for axis in axes]
        if name not in tensors or list(tensors[name].shape) != expected:
            given = list(tensors[name].shape) if name in tensors else "no such tensor"
            raise PlanError(
                f"this is not the model that was traced: {name!r} has {given}, "
                f"expected {expected}; trace it again"
            )
    strange = [name for name, _ in model.named_parameters() if name not in graph.tensors]
    if strange:
        raise PlanError(
            f"this is not the model that was traced: it also has {strange[0]!r}; trace it again"
        )


def cut(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    on_cut: Callable[[str, Positions, Tensor], None] | None = None,
) -> nn.Module:
    """Slices tensors and rewrites attributes in place, without any check.

    Args:
        model: A model of our own.
        graph: What ``trace`` found.
        plan: Which positions stay.
        on_cut: Is given the name of each tensor that was cut, what stays along each of its
            dimensions, and the new tensor.
    """
    find_scales(model, graph, plan)
    with torch.no_grad():
        for name in graph.tensors:
            positions = graph.kept_positions(name, plan)
            if any(kept is not None for kept in positions):
                old = get_tensor(model, name)
                if is_deferred(old):
                    new = _deferred_part(old, positions)
                else:
                    new = _part(old.detach(), positions)
                    if isinstance(old, nn.Parameter):
                        new = with_marks(nn.Parameter(new, requires_grad=old.requires_grad), old)
                        if old.grad is not None:
                            new.grad = _part(old.grad, positions)
                for alias in (name, *graph.aliases.get(name, ())):
                    put_tensor(model, alias, new)
                if on_cut is not None:
                    on_cut(name, positions, new)
    rewrite(model, graph, plan)
    drop_layers(model, graph, plan)
    return model


def _part(tensor: Tensor, positions: Positions) -> Tensor:
    """What is kept of a tensor: positions by dimension, None = all."""
    for dim, kept in enumerate(positions):
        if kept is not None:
            tensor = tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return tensor if tensor.is_sparse else tensor.contiguous()


def _deferred_part(tensor: Tensor, positions: Positions) -> nn.Parameter:
    kept = zip(tensor.shape, positions, strict=True)
    shape = tuple(size if at is None else len(at) for size, at in kept)
    return deferred(lambda: _part(data_of(tensor), positions), tensor, shape=shape)
