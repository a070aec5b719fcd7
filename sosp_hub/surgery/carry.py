"""What lives beside a model, cut by the same plan: averages of its weights, optimizers, tensors.

LoRA adapters need nothing of this: trace the model with its adapters, and they are cut with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.copies import copy_model
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.apply import check_model, cut, fold, fold_into
from sosp_hub.surgery.layers import names_after
from sosp_hub.surgery.replaced import replaced
from sosp_hub.tasks.batches import tensors


def carrying(
    what: Optimizer | nn.Module, graph: Graph, plan: PruningPlan, dense: nn.Module | None = None
) -> Callable[[nn.Module], None]:
    """The cut in two parts: all that can go wrong is done now, the rest by what is returned.

    Args:
        what: An optimizer of the model, or a module that holds a copy of it; it changes in the
            second part.
        graph: What ``trace`` found in the model before the cut.
        plan: The plan of the cut.
        dense: For an optimizer: the model before the cut, unless ``apply_`` has cut it already.

    Returns:
        What to call with the cut model.

    Raises:
        PlanError: As for ``sosp_hub.carry``.
    """
    if isinstance(what, Optimizer):
        return _carrying_optimizer(what, graph, plan, dense)
    average = copy_of_the_model(what, graph)
    smaller = cut(fold(copy_model(average), graph, plan), graph, plan)

    def put(_: nn.Module) -> None:
        average.__dict__.clear()
        average.__dict__.update(smaller.__dict__)

    return put


def _carrying_optimizer(
    optimizer: Optimizer, graph: Graph, plan: PruningPlan, dense: nn.Module | None
) -> Callable[[nn.Module], None]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = {} if dense is None else {id(p): name for name, p in dense.named_parameters()}
    names |= {id(p): name for p in held if id(p) not in names and (name := _replaced_name(p, plan))}
    if not any(id(p) in names for p in held):
        raise PlanError(
            f"optimizer: none of its {len(held)} parameters belongs to the model before the cut; "
            "after apply, pass that model as dense="
        )
    states = {
        id(p): {
            key: _carried_state(value, key, p, names[id(p)], graph, plan)
            for key, value in optimizer.state[p].items()
        }
        for p in held
        if id(p) in names and p in optimizer.state
    }
    beside = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    if any(each is not None for name in names.values() for each in _positions(name, graph, plan)):
        for each in (beside, *optimizer.param_groups):
            _check_beside(each)

    def put(pruned: nn.Module) -> None:
        smaller, new_name = dict(pruned.named_parameters()), names_after(pruned, graph, plan)
        new: list[dict[str, Any]] = []
        state: dict[Any, Any] = dict(beside)
        for group in optimizer.param_groups:
            given = group.get("param_names") or [""] * len(group["params"])
            stays: list[tuple[Tensor, str]] = []
            for parameter, said in zip(group["params"], given, strict=True):
                if (old := names.get(id(parameter))) is None:  # of another model
                    stays.append((parameter, said))
                    if parameter in optimizer.state:
                        state[parameter] = optimizer.state[parameter]
                elif (name := new_name(old)) is not None:  # else its layer is gone
                    if name not in smaller:
                        raise PlanError(f"optimizer: the pruned model has no parameter {name!r}")
                    stays.append((smaller[name], name if said == old else said))
                    if id(parameter) in states:
                        state[smaller[name]] = states[id(parameter)]
            new.append({"params": [each for each, _ in stays]})
            if "param_names" in group:
                new[-1]["param_names"] = [said for _, said in stays]
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, changed in zip(optimizer.param_groups, new, strict=True):
            group.update(changed)

    return put


def _replaced_name(parameter: Tensor, plan: PruningPlan) -> str | None:
    """The name of a parameter that ``apply_`` replaced; None for another model's."""
    known = replaced(parameter)
    if known is not None and known.plan != plan:
        raise PlanError(
            f"optimizer: {known.name!r} {list(parameter.shape)} was replaced by a cut with another "
            "plan"
        )
    return known and known.name


def _carried_state(
    value: Any, key: str, parameter: Tensor, name: str, graph: Graph, plan: PruningPlan
) -> Any:
    """A state cut like its parameter: a tensor of its shape, also where some dims are 1, or any."""
    if isinstance(value, dict):
        return {
            inner: _carried_state(each, f"{key}.{inner}", parameter, name, graph, plan)
            for inner, each in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(
            _carried_state(each, f"{key}.{i}", parameter, name, graph, plan)
            for i, each in enumerate(value)
        )
    if not isinstance(value, Tensor):
        return value
    positions = _positions(name, graph, plan)
    if value.ndim == parameter.ndim and all(
        size in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)
    ):  # factored moments keep a dim of 1 for what they sum over
        sizes = zip(positions, value.shape, parameter.shape, strict=False)
        return _take(value, [kept if size == whole else None for kept, size, whole in sizes])
    if (summed := _summed_dim(value, key, parameter, positions)) is not None:
        return _take(value, [*positions[:summed], *positions[summed + 1 :]])
    if value.numel() > 1 and any(each is not None for each in positions):
        raise PlanError(
            f"optimizer: its {key!r} of {name!r} is {list(value.shape)}, the parameter "
            f"{list(parameter.shape)}, so it is not known how to cut it; make a new optimizer, or "
            "take one whose state has the shape of the weights"
        )
    return value


def _summed_dim(value: Tensor, key: str, parameter: Tensor, positions: Sequence[Any]) -> int | None:
    """The dim that a factored moment lacks, such as Adafactor's; None where shapes leave it open.

    Of a square matrix the name says it: ``exp_avg_sq_row`` has a number for each row.
    """
    sizes = parameter.shape
    fit = [dim for dim in range(len(positions)) if value.shape == sizes[:dim] + sizes[dim + 1 :]]
    if parameter.ndim == 2 and len(fit) == 2:
        fit = [dim for dim, ending in ((1, "_row"), (0, "_col")) if key.endswith(ending)]
    left = {
        tuple(
            None if kept is None else tuple(kept)
            for kept in (*positions[:dim], *positions[dim + 1 :])
        )
        for dim in fit
    }
    return fit[0] if len(left) == 1 else None


def _check_beside(values: Mapping[Any, Any]) -> None:
    """Refuses tensors that stand beside those of the parameters: nothing says whose they are."""
    for key, value in values.items():
        if key != "params" and any(each.numel() > 1 for each in tensors(value)):
            raise PlanError(
                f"optimizer: {key!r} holds tensors for several parameters, and it is not known how "
                "to cut them; make a new optimizer, or take one with a state for each parameter"
            )


def copy_of_the_model(averaged: nn.Module, graph: Graph) -> nn.Module:
    """The outermost module inside that looks like the model before the cut; else PlanError."""
    first: PlanError | None = None
    for module in averaged.modules():
        try:
            check_model(module, graph)
        except PlanError as error:
            first = first or error
        else:
            return module
    raise PlanError(
        f"carry: nothing in this {type(averaged).__name__} is a copy of the model before the cut "
        f"({first})"
    ) from first


def carried_tensors(
    tensors: Mapping[str, Tensor], pruned: nn.Module, graph: Graph, plan: PruningPlan
) -> dict[str, Tensor]:
    """Tensors that are named and shaped like the model's, cut as it was; else PlanError."""
    main = {alias: name for name, others in graph.aliases.items() for alias in others}
    if not any(main.get(name, name) in graph.tensors for name in tensors):
        raise PlanError(
            f"carry: none of these tensors is the model's: {next(iter(tensors), 'nothing')!r}, "
            f"expected names such as {next(iter(graph.tensors), 'nothing')!r}"
        )
    for name, tensor in tensors.items():
        _check_whole(name, tensor, main, pruned, graph)
    first: dict[str, str] = {}
    for name, tensor in tensors.items():
        tied = first.setdefault(main.get(name, name), name)
        if not torch.equal(tensor, tensors[tied]):
            raise PlanError(f"carry: {name!r} differs from {tied!r}, to which it is tied")
    folded = {known: tensors[name] for known, name in first.items()}
    if plan.gates or plan.shifts:
        folded = {name: tensor.detach().clone() for name, tensor in folded.items()}
        with torch.no_grad():
            fold_into(_getter(folded), graph, plan)
    new_name = names_after(pruned, graph, plan)
    carried: dict[str, Tensor] = {}
    for name in tensors:
        if (new := new_name(name)) is not None:
            carried[new] = _cut(folded[main.get(name, name)], main.get(name, name), graph, plan)
    return carried


def _check_whole(
    name: str, tensor: Tensor, main: Mapping[str, str], pruned: nn.Module, graph: Graph
) -> None:
    """Refuses what is not the dense model's; counters, and what no cut touches, may be there."""
    if (known := main.get(name, name)) in graph.tensors:
        expected = [size_of(axis) for axis in graph.tensors[known]]
        if list(tensor.shape) != expected:
            raise PlanError(
                f"{name}: {list(tensor.shape)}, expected {expected} as before the cut; was it "
                "already cut?"
            )
    elif tensor.numel() > 1:
        same = pruned.state_dict().get(name)
        if same is None or same.shape != tensor.shape:
            raise PlanError(f"{name}: {list(tensor.shape)}, the model has no such tensor")


def _getter(tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    def get(name: str) -> Tensor:
        if name not in tensors:
            raise PlanError(f"carry: {name!r} is missing; the plan folds gates or shifts into it")
        return tensors[name]

    return get


def _positions(name: str, graph: Graph, plan: PruningPlan) -> tuple[Any, ...]:
    return graph.kept_positions(name, plan) if name in graph.tensors else ()


def _cut(tensor: Tensor, name: str, graph: Graph, plan: PruningPlan) -> Tensor:
    return _take(tensor, _positions(name, graph, plan))


def _take(tensor: Tensor, positions: Iterable[Any]) -> Tensor:
    for dim, kept in enumerate(positions):
        if kept is not None:
            tensor = tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return tensor
