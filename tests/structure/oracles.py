"""What a cut model must compute, found without the engine's replay: plain runs of the dense model.

``gated``: activations are multiplied by 0 where a removed structure is read. ``unmade``: what makes
a removed structure is zero (equal to the cut as long as every function in between keeps zero).
"""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group
from sosp_hub.structure.trace import call, output_tensors, wanted_outputs


def fill(model: nn.Module) -> nn.Module:
    """Random values for what is constant in a fresh model, where it would hide wrong cuts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * (noise - 0.5))
            elif isinstance(tensor, nn.Parameter) and tensor.max() == tensor.min():
                tensor.copy_((noise - 0.5) * 0.2 if abs(float(tensor.max())) < 0.1 else 0.5 + noise)
    return model


def plan_of(graph: Graph, kept: dict[str, Any]) -> PruningPlan:
    """A plan from kept indices."""
    return PruningPlan(kept, {name: graph.groups[name].size for name in kept})


def _free(graph: Graph, chosen: Callable[[Group], bool]) -> list[str]:
    """Chosen groups whose ties are all chosen."""
    bound = {
        name
        for tie in graph.ties
        if not all(chosen(graph.groups[name]) for name in tie)
        for name in tie
    }
    return [name for name, group in graph.groups.items() if chosen(group) and name not in bound]


def half(
    graph: Graph, chosen: Callable[[Group], bool] = lambda group: True, seed: int = 0
) -> PruningPlan:
    """Keeps a random half of every chosen group."""
    generator = random.Random(seed)
    kept = {}
    for name in _free(graph, chosen):
        size = graph.groups[name].size
        barred = graph.groups[name].barred
        count = next(n for n in range(max(1, size // 2), size + 1) if n not in barred)
        kept[name] = tuple(sorted(generator.sample(range(size), count)))
    return plan_of(graph, kept)


def ragged(
    graph: Graph, chosen: Callable[[Group], bool] = lambda group: True, seed: int = 0
) -> PruningPlan:
    """Keeps a random number of every chosen group; tied groups keep equally many."""
    generator = random.Random(seed)
    label = {name: tie[0] for tie in graph.ties for name in tie}
    counts: dict[str, int] = {}
    kept = {}
    for name in _free(graph, chosen):
        size = graph.groups[name].size
        barred = {n for o in label if label[o] == label.get(name) for n in graph.groups[o].barred}
        barred |= graph.groups[name].barred
        count = generator.choice([n for n in range(1, size + 1) if n not in barred])
        count = counts.setdefault(label.get(name, name), count)
        kept[name] = tuple(sorted(generator.sample(range(size), count)))
    return plan_of(graph, kept)


def run(model: nn.Module, graph: Graph) -> list[Tensor]:
    """The outputs that matter, on the traced inputs; what a model draws is the same each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return output_tensors(wanted_outputs(call(model, graph.example_inputs), graph.outputs))


def gated(model: nn.Module, graph: Graph, plan: PruningPlan) -> list[Tensor]:
    """Outputs of the dense model with removed structures at zero where they are read."""
    twin = copy.deepcopy(model)
    with _gates(twin, graph, plan):
        return run(twin, graph)


def unmade(model: nn.Module, graph: Graph, plan: PruningPlan) -> list[Tensor]:
    """Outputs of the dense model with removed structures at zero where they are made."""
    twin = copy.deepcopy(model)
    for name in plan.kept:
        _unmake(twin, graph, plan, name)
    return run(twin, graph)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest finite output; infinite for other shapes and NaN.

    What is infinite, as what a detector masks, must be so in both.
    """
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if one.shape != two.shape:
            return float("inf")
        if two.is_floating_point() and two.numel():
            if (
                not torch.equal(one.isinf(), two.isinf())
                or (one[one.isinf()] != two[two.isinf()]).any()
            ):
                return float("inf")
            one, two = one[~one.isinf()], two[~two.isinf()]
            if not two.numel():
                continue
            scale = max(float(two.abs().max()), 1e-30)
            error = float((one.double() - two.double()).abs().max()) / scale
            worst = max(worst, error) if error == error else float("inf")
    return worst


@contextlib.contextmanager
def _gates(model: nn.Module, graph: Graph, plan: PruningPlan) -> Iterator[None]:
    handles = []
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def hook(site: Any, name: str) -> Callable[[nn.Module, Any], Any]:
        gate = _gate(graph, plan, name)
        return lambda module, args: (_scale(args[0], site.dim, site.index, gate), *args[1:])

    def hand_on(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return args[0] if isinstance(result, Tensor) else type(result)((args[0], *result[1:]))

    with torch.no_grad():
        for name in plan.kept:
            group = graph.groups[name]
            if group.kind == "layer":
                gone = [layer for i, layer in enumerate(group.layers) if i not in plan.kept[name]]
                handles += [
                    modules[layer].register_forward_hook(hand_on, prepend=True) for layer in gone
                ]
                continue
            sites = group.sites
            for site in sites:
                if site.module is not None:
                    handles.append(modules[site.module].register_forward_pre_hook(hook(site, name)))
                else:
                    weight = parameters[site.weight]
                    gate = _gate(graph, plan, name)
                    weight.copy_(_scale(weight, site.dim, site.index, gate))
            if not sites:  # no parameter reads it
                _unmake(model, graph, plan, name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unmake(model: nn.Module, graph: Graph, plan: PruningPlan, name: str) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gate = _gate(graph, plan, name)
    with torch.no_grad():
        for member in graph.groups[name].members:
            if not member.reads and member.tensor in parameters:
                weight = parameters[member.tensor]
                weight.copy_(_scale(weight, member.dim, member.index, gate))


def _gate(graph: Graph, plan: PruningPlan, name: str) -> Tensor:
    gate = torch.zeros(graph.groups[name].size + 1)
    gate[list(plan.kept[name])] = 1
    gate[-1] = 1  # positions of other groups have index -1
    return gate


def _scale(tensor: Tensor, dim: int, index: Any, gate: Tensor) -> Tensor:
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return tensor * gate[torch.as_tensor(index)].view(shape).to(tensor)
