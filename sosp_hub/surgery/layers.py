"""Taking whole layers out of a stack, and what counts them."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sosp_hub.compat.torch import child_table
from sosp_hub.errors import PlanError
from sosp_hub.plan import Plan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.layers import LAYER_COUNTS, LAYER_POSITIONS
from sosp_hub.structure.shadow import is_config

_NUMBERS = ("layer_idx", "layer_id", "layer_number")


def drop_layers(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Removes in place the layers that a plan does not keep.

    The rest moves up: positions, ``layer_idx``, lists of positions, and the config's layer count
    and per-layer lists follow, so that caches of key and value tensors stay in step.
    """
    for name in sorted(plan.kept, key=lambda name: -name.count(".")):  # the innermost first
        group, kept = graph.groups[name], plan.kept[name]
        if group.kind != "layer":
            continue
        gone = {layer for i, layer in enumerate(group.layers) if i not in kept}
        stack_name = name.rpartition(":")[0]
        stack = model.get_submodule(stack_name)
        inside = f"{stack_name}." if stack_name else ""
        children = list(stack.named_children())
        stays = [i for i, (child, _) in enumerate(children) if f"{inside}{child}" not in gone]
        for position in reversed(range(len(children))):
            if position not in stays:
                del stack[position]  # type: ignore[attr-defined]
        for position, old in enumerate(stays):
            _renumber(children[old][1], position)
        around = vars(model.get_submodule(stack_name.rpartition(".")[0]))
        around |= {key: _moved(around[key], stays) for key in LAYER_POSITIONS if key in around}
        _rewrite_configs(model, stack_name, len(children), stays)


def names_after(pruned: nn.Module, graph: Graph, plan: Plan) -> Callable[[str], str | None]:
    """How names of the model before the cut read after it; None for what went with its layer.

    Args:
        pruned: The cut model.
        graph: Of the model before the cut.
        plan: What was kept.
    """
    moved: dict[str, str | None] = {}

    def new_name(name: str) -> str | None:
        prefix = name
        while prefix:
            if prefix in moved:
                new = moved[prefix]
                return None if new is None else f"{new}{name[len(prefix) :]}"
            prefix = prefix.rpartition(".")[0]
        return name

    stacks = [name for name in plan.kept if graph.groups[name].kind == "layer"]
    for name in sorted(stacks, key=lambda name: name.count(".")):  # the outermost first
        group, kept = graph.groups[name], plan.kept[name]
        stack = name.rpartition(":")[0]
        inside = f"{stack}." if stack else ""
        gone = {layer for i, layer in enumerate(group.layers) if i not in kept}
        if (new_stack := new_name(stack)) is None:
            continue
        ahead = f"{new_stack}." if new_stack else ""
        size = len(child_table(pruned.get_submodule(new_stack))) + len(gone)
        before = [f"{inside}{i}" for i in range(size)]
        if not gone <= set(before):
            raise PlanError(
                f"{stack!r}: its layers are not numbered from 0, so none can be followed"
            )
        stays = [layer for layer in before if layer not in gone]
        moved |= dict.fromkeys(gone)
        moved |= {layer: f"{ahead}{i}" for i, layer in enumerate(stays)}
    return new_name


def bypassed(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Makes the layers that a plan does not keep hand on their input: the masked model.

    Ahead of the model's own hooks, which may record what a layer gives.
    """
    for name, kept in plan.kept.items():
        group = graph.groups[name]
        for i, layer in enumerate(group.layers):
            if i not in kept:
                model.get_submodule(layer).register_forward_hook(hand_on, prepend=True)


def hand_on(_: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    """A forward hook that makes a layer give what it was given.

    As contiguous as its own result: operations after it take their steps by the memory layout.
    """
    given, made = args[0], result if isinstance(result, Tensor) else result[0]
    if made.is_contiguous():
        given = given.contiguous()
    return given if isinstance(result, Tensor) else type(result)((given, *result[1:]))


def _renumber(layer: nn.Module, position: int) -> None:
    for module in layer.modules():
        for name in _NUMBERS:
            if type(vars(module).get(name)) is int:
                vars(module)[name] = position


def _rewrite_configs(model: nn.Module, stack: str, before: int, stays: list[int]) -> None:
    """Layer counts and per-layer lists of the config that describes the stack, and its copies."""
    holders = {name: module for name, module in model.named_modules() if _configs(module)}
    described = _config_over(holders, stack)
    if described is None or any(
        isinstance(module, nn.ModuleList | nn.Sequential)
        and _inside(stack, name)
        and _alike(_config_over(holders, name), described)
        for name, module in model.named_modules()
        if name != stack
    ):  # a stack inside a layer: the config counts the outer one
        return
    owner = max((name for name in holders if _inside(stack, name)), key=len)
    done: dict[int, Any] = {}
    for name, module in holders.items():
        over_stack = _inside(stack, name) or _inside(name, owner)
        for key, config in _configs(module).items():
            if over_stack or id(config) in done:  # the same one, held elsewhere too
                vars(module)[key] = _shortened(config, described, before, stays, done)


def _inside(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}." if outer else "")


def _config_over(holders: Mapping[str, nn.Module], name: str) -> Any:
    """The config of the innermost module around ``name`` that has one."""
    over = [holder for holder in holders if _inside(name, holder)]
    configs = _configs(holders[max(over, key=len)]) if over else {}
    return configs.get("config", next(iter(configs.values()), None))


def _configs(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if is_config(value)}


def _shortened(
    config: Any, described: Any, before: int, stays: list[int], done: dict[int, Any]
) -> Any:
    """The config, or a copy in which what describes the stack is shorter."""
    if id(config) in done:
        return done[id(config)]
    new: dict[str, Any] = {}
    for key, value in vars(config).items():
        if is_config(value):
            inner = _shortened(value, described, before, stays, done)
            new |= {} if inner is value else {key: inner}
        elif not _alike(config, described):
            continue
        elif key in LAYER_COUNTS and value == before:
            new[key] = len(stays)
        elif key in LAYER_POSITIONS:
            new[key] = _moved(value, stays)
        elif isinstance(value, list) and len(value) == before and key.startswith("layer"):
            new[key] = [value[i] for i in stays]
    twin = config
    if new:
        twin = copy.copy(config)
        vars(twin).update(new)
    done[id(config)] = twin
    return twin


def _moved(positions: list[int], stays: list[int]) -> list[int]:
    """Where layers of a stack are once those that stay moved up; without those that go."""
    return [stays.index(old) for old in positions if old in stays]


def _alike(one: Any, two: Any) -> bool:
    """Whether configs are of the same part of a model (an encoder, a decoder, a vision tower)."""
    facts = ("model_type", "is_decoder")
    return [getattr(one, key, None) for key in facts] == [getattr(two, key, None) for key in facts]
