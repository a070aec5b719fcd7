"""``carry``: what lives beside a model, cut by the same plan: averages of its weights, optimizers.

LoRA adapters need nothing of this: trace the model with its adapters, and they are cut with it.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sosp_hub.compat.torch import unwrapped
from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.copies import copy_model
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.apply import check_model, cut, fold, fold_into
from sosp_hub.surgery.layers import names_after
from sosp_hub.surgery.replaced import replaced

Carried = TypeVar("Carried", Optimizer, nn.Module, Mapping[str, Tensor])


def carry(
    what: Carried,
    pruned: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    *,
    dense: nn.Module | None = None,
) -> Carried:
    """Cuts what belongs to a model like the model was cut; call it right after each cut.

    Args:
        what: An optimizer of the model: it is pointed at the parameters of ``pruned``, its moments
            are cut like the weights, and its groups and learning rates stay. A copy of the model
            with averaged weights (EMA), or what holds one, such as
            ``torch.optim.swa_utils.AveragedModel``: it is cut in place. Or a dictionary of tensors
            that are named and shaped like the model's: a new one is returned. Gates and shifts
            of the plan are folded into weights; moments stay those of the weights as they were.
        pruned: The cut model.
        graph: What ``trace`` found in the model before the cut.
        plan: The plan of the cut.
        dense: For an optimizer after ``apply``: the model before the cut. After ``apply_``, which
            remembers what it replaced, nothing.

    Returns:
        The optimizer or the module itself; a new dictionary.

    Raises:
        PlanError: A tensor that is none of the model's, or not of its size before the cut; what was
            given is left as it was.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, structures=0.5)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> small = sosp_hub.apply(net, graph, plan)
        >>> optimizer = sosp_hub.carry(optimizer, small, graph, plan, dense=net)
        >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
        [(4, 4), (4,), (2, 4), (2,)]
    """
    if not isinstance(graph, Graph) or not isinstance(plan, PruningPlan):
        raise PlanError(
            f"carry got a {type(graph).__name__} and a {type(plan).__name__}; expected "
            "carry(what, pruned, graph, plan)"
        )
    plan = graph.provable(plan)
    pruned, dense = unwrapped(pruned), unwrapped(dense)
    if isinstance(what, Optimizer):
        _carry_optimizer(what, pruned, graph, plan, dense)
        return what
    if isinstance(what, nn.Module):
        _carry_module(what, graph, plan)
        return what
    if isinstance(what, Mapping) and all(isinstance(each, Tensor) for each in what.values()):
        return _carry_tensors(what, pruned, graph, plan)
    raise PlanError(
        f"carry got a {type(what).__name__}; expected an optimizer, a module with averaged weights "
        "or a dictionary of tensors such as a state dict"
    )


def _carry_optimizer(
    optimizer: Optimizer,
    pruned: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    dense: nn.Module | None,
) -> None:
    names = {} if dense is None else {id(p): name for name, p in dense.named_parameters()}
    smaller = dict(pruned.named_parameters())
    new_name = names_after(pruned, graph, plan)
    groups: list[list[nn.Parameter]] = []
    state: dict[Tensor, Any] = {}
    for group in optimizer.param_groups:
        groups.append([])
        for parameter in group["params"]:
            old = names.get(id(parameter)) or _replaced_name(parameter, plan)
            if (new := new_name(old)) is None:  # its layer is gone
                continue
            if new not in smaller:
                raise PlanError(f"optimizer: the pruned model has no parameter {new!r}")
            groups[-1].append(smaller[new])
            if parameter in optimizer.state:
                state[smaller[new]] = {
                    key: _carried_state(value, key, parameter, old, graph, plan)
                    for key, value in optimizer.state[parameter].items()
                }
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters


def _replaced_name(parameter: Tensor, plan: PruningPlan) -> str:
    shape = list(parameter.shape)
    known = replaced(parameter)
    if known is None:
        raise PlanError(
            f"optimizer: a parameter of shape {shape} does not belong to the model before the "
            "cut; after apply, pass that model as dense="
        )
    if known.plan != plan:
        raise PlanError(
            f"optimizer: {known.name!r} {shape} was replaced by a cut with another plan"
        )
    return known.name


def _carried_state(
    value: Any, key: str, parameter: Tensor, name: str, graph: Graph, plan: PruningPlan
) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        return _cut(value, name, graph, plan)
    is_cut = any(each is not None for each in _positions(name, graph, plan))
    if is_cut and value.numel() > 1:
        raise PlanError(
            f"optimizer: its {key!r} of {name!r} is {list(value.shape)}, the parameter "
            f"{list(parameter.shape)}, so it is not known how to cut it; make a new optimizer"
        )
    return value


def _carry_module(module: nn.Module, graph: Graph, plan: PruningPlan) -> None:
    average = _copy_of_the_model(module, graph)
    smaller = cut(fold(copy_model(average), graph, plan), graph, plan)
    average.__dict__.clear()
    average.__dict__.update(smaller.__dict__)


def _copy_of_the_model(averaged: nn.Module, graph: Graph) -> nn.Module:
    """The outermost module inside that looks like the model before the cut."""
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


def _carry_tensors(
    tensors: Mapping[str, Tensor], pruned: nn.Module, graph: Graph, plan: PruningPlan
) -> dict[str, Tensor]:
    main = {alias: name for name, others in graph.aliases.items() for alias in others}
    if not any(main.get(name, name) in graph.tensors for name in tensors):
        raise PlanError(
            f"carry: none of these tensors is the model's: {next(iter(tensors), 'nothing')!r}, "
            f"expected names such as {next(iter(graph.tensors), 'nothing')!r}"
        )
    for name, tensor in tensors.items():
        _check_whole(name, tensor, main, pruned, graph)
    folded = {main.get(name, name): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.equal(tensor, folded[main.get(name, name)]):
            raise PlanError(f"carry: {name!r} differs from {main[name]!r}, to which it is tied")
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
    for dim, kept in enumerate(_positions(name, graph, plan)):
        if kept is not None:
            tensor = tensor.index_select(dim, torch.as_tensor(kept, device=tensor.device))
    return tensor
