"""A pruned transformers model as one that a plain config builds: zeros where layers are narrow.

Where the zeros belong is read from a trace of the model before the cut, which needs no weights: a
matrix that holds gate and up projection gets them in its middle, a query head beside the heads that
share its KV head.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sosp_hub.checkpoint.format import proof
from sosp_hub.checkpoint.format.modules import plain_attributes
from sosp_hub.checkpoint.format.record import Delta
from sosp_hub.checkpoint.format.standins import StandIn
from sosp_hub.checkpoint.inputs import inputs_without_weights, made_up_inputs
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.checkpoint.transformers import native
from sosp_hub.errors import CheckpointError, ModelError, SospHubError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.axes import atoms, size_of
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import cut

_INSTEAD = "save it with its delta, or export it to ONNX"

Places = dict[str, tuple[NDArray[np.int64] | None, ...]]
"""For each tensor and dimension the positions in the wide one; None where all stay."""


@dataclass(frozen=True)
class Filling:
    """What zeros make of a model.

    Attributes:
        config: Builds the wide model.
        places: Where the values of the model go in it, by tensor.
        share: The share of its parameters that the model gains.
    """

    config: Any
    places: Places
    share: float


def padded(model: nn.Module) -> nn.Module:
    """The same function in a model that a plain config builds: zeros fill up narrow layers.

    Layers become as wide as the widest of their kind, where a config can say that, else as wide as
    before pruning; what was taken out comes back as zeros. Save it with the library's own
    ``save_pretrained``.

    Args:
        model: A pruned transformers model, cut inside its layers.

    Raises:
        ModelError, CheckpointError: As `filling`, or the wide model computes something else.
    """
    found = filling(model)
    inputs = made_up_inputs(model)
    wide = _filled(model, found)
    if inputs is not None and not proof.same_function(wide, model, inputs):
        raise CheckpointError(
            f"{type(model).__name__}: filled up with zeros it computes other outputs; {_INSTEAD}"
        )
    return wide.eval()


def filling(model: nn.Module) -> Filling:
    """How zeros make a model as a plain config builds it, from shapes alone.

    Args:
        model: A pruned transformers model; its weights may be on the meta device.

    Raises:
        ModelError: No transformers model.
        CheckpointError: Zeros would change what it computes, as they do in a residual stream behind
            a normalisation, or its shapes are not those of a cut that can be followed.
    """
    from sosp_hub.checkpoint.io import library_of

    name = type(model).__name__
    if library_of(model) != "transformers":
        raise ModelError(f"{name}: only transformers models have a plain config")
    config, delta = native.best_skeleton(model)  # pyright: ignore[reportArgumentType]
    if delta.empty:
        return Filling(config, {}, 0.0)
    skeleton = adapter.build_meta(type(model), config)  # pyright: ignore[reportArgumentType]
    graph = _traced(skeleton)
    counts = _kept(graph, model, skeleton, delta)
    obstacle = ""
    for wide_counts in (_widest(graph, counts), {}):
        narrow = [n for n, c in counts.items() if c < wide_counts.get(n, graph.groups[n].size)]
        if inexact := next((n for n in narrow if not graph.groups[n].exact), None):
            obstacle = (
                obstacle
                or f"zeros in {inexact} would change what it computes: "
                + (graph.groups[inexact].reasons[0])
            )
            continue
        wide = _cut(skeleton, graph, wide_counts)
        if (plain := _plain_config(wide, config)) is not None:
            places = _places(graph, counts, wide_counts)
            params = sum(parameter.numel() for parameter in model.parameters())
            return Filling(plain, places, _num_params(wide) / params - 1)
    raise CheckpointError(f"{name}: {obstacle or 'no plain config has its sizes'}; {_INSTEAD}")


def _traced(skeleton: nn.Module) -> Graph:
    inputs = inputs_without_weights(skeleton)
    if inputs is None:
        raise CheckpointError(
            f"{type(skeleton).__name__}: its config does not tell how its inputs look, so that the "
            f"place of zeros cannot be found; {_INSTEAD}"
        )
    try:
        return trace(skeleton, inputs)
    except SospHubError as error:
        raise CheckpointError(
            f"{type(skeleton).__name__}: the place of zeros cannot be found ({error}); {_INSTEAD}"
        ) from error


def _plain_config(wide: Any, config: Any) -> Any | None:
    """The config that builds these shapes; None where none does."""
    delta = adapter.delta_of(wide, config)
    return native.uniform_config(wide, config, delta)[0]


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _first(graph: Graph, counts: Mapping[str, int]) -> PruningPlan:
    """A plan that keeps the first structures of each group."""
    less = {name: c for name, c in counts.items() if c < graph.groups[name].size}
    return PruningPlan(
        kept={name: tuple(range(count)) for name, count in less.items()},
        sizes={name: graph.groups[name].size for name in less},
    )


def _widest(graph: Graph, counts: Mapping[str, int]) -> dict[str, int]:
    """The largest count among groups that are alike but for the number of their layer."""

    def alike(name: str) -> tuple[str, int]:
        return re.sub(r"\d+", "N", name), graph.groups[name].size

    most: dict[tuple[str, int], int] = {}
    for name, count in counts.items():
        most[alike(name)] = max(count, most.get(alike(name), 0))
    return {name: most[alike(name)] for name in graph.groups if alike(name) in most}


def _cut(skeleton: nn.Module, graph: Graph, counts: Mapping[str, int]) -> nn.Module:
    return cut(copy.deepcopy(skeleton), graph, _first(graph, counts))


def _kept(graph: Graph, model: nn.Module, skeleton: nn.Module, delta: Delta) -> dict[str, int]:
    """How many structures of each group a cut model has kept.

    Six heads of eight values have the shapes of eight heads of six: the numbers that the modules
    hold tell them apart. Groups whose module was taken out are left out.
    """
    base = adapter.base_name(skeleton)  # pyright: ignore[reportArgumentType]

    def num_other(counts: Mapping[str, int]) -> int:
        small = _cut(skeleton, graph, counts)
        return sum(
            plain_attributes(root.get_submodule(name)).get(key) != value
            for section, root in native.sections(small, base, delta)
            for name, values in section.modules.items()
            for key, value in values.items()
        )

    ways, faults = [], []
    for way in (False, True):
        try:
            ways.append(_counts(graph, model, inner_first=way))
        except CheckpointError as error:  # this order meets sizes that the other one does not
            faults.append(error)
    if not ways:
        raise faults[0]
    return ways[0] if ways[0] == ways[-1] else min(ways, key=num_other)


def _counts(graph: Graph, model: nn.Module, *, inner_first: bool) -> dict[str, int]:
    """Counts that give the shapes of a cut model.

    Args:
        graph: Of the model before the cut.
        model: The cut model.
        inner_first: Where several do, sizes of heads are cut rather than their number.

    Raises:
        CheckpointError: No counts give these shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _own(model)}
    by_atom = {atom.id: name for name, atom in graph.atoms.items()}
    sizes: list[tuple[tuple[str, ...], Any, int]] = []
    for tensor, axes in graph.tensors.items():
        for axis, size in zip(axes, shapes.get(tensor, ()), strict=False):
            groups = tuple(dict.fromkeys(by_atom[a.id] for a in atoms(axis) if a.id in by_atom))
            if groups:
                sizes.append((groups, axis, size))
    counts: dict[str, int] = {}
    for groups, axis, size in sorted(sizes, key=lambda each: len(each[0])):
        free = [name for name in groups if name not in counts]
        if not free:
            continue
        free.sort(key=lambda name: (graph.groups[name].kind == "head_dim") == inner_first)
        solution = next(_solutions(graph, axis, size, free, dict(counts)), None)
        if solution is None:
            break
        counts |= solution
    for groups, axis, size in sizes:
        if size_of(axis, graph.count({n: counts.get(n, 0) for n in groups})) != size:
            raise CheckpointError(
                f"{type(model).__name__}: the size {size} of {', '.join(groups)} is not that of a "
                f"cut that can be followed; {_INSTEAD}"
            )
    return counts


def _solutions(
    graph: Graph, axis: Any, size: int, free: list[str], counts: dict[str, int]
) -> Iterator[dict[str, int]]:
    """Counts of the free groups that give an axis its size; those that cut least come first."""
    if not free:
        if size_of(axis, graph.count(counts)) == size:
            yield {}
        return
    name, *others = free
    whole = {other: graph.groups[other].size for other in others}
    for count in range(graph.groups[name].size, 0, -1):
        given = {**counts, name: count}
        if size_of(axis, graph.count({**given, **whole})) < size:
            return
        for rest in _solutions(graph, axis, size, others, given):
            yield {name: count, **rest}


def _places(graph: Graph, counts: Mapping[str, int], wide_counts: Mapping[str, int]) -> Places:
    small, wide = _first(graph, counts), _first(graph, wide_counts)
    places: Places = {}
    for tensor, axes in graph.tensors.items():
        found = []
        pairs = zip(
            graph.kept_positions(tensor, small), graph.kept_positions(tensor, wide), strict=True
        )
        for axis, (ours, theirs) in zip(axes, pairs, strict=True):
            whole = np.arange(size_of(axis))
            ours, theirs = (whole if each is None else each for each in (ours, theirs))
            index = np.searchsorted(theirs, ours)
            found.append(None if len(ours) == len(theirs) else index)
        if any(each is not None for each in found):
            for name in (tensor, *graph.aliases.get(tensor, ())):
                places[name] = tuple(found)
    return places


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model that its layers had before the cut."""
    removed = _removed(model)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in state.items():
        if not name.startswith(removed or ("\n",)):
            yield name, tensor


def _removed(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, StandIn)
    )


def _filled(model: Any, filling: Filling) -> Any:
    """The model that the plain config builds, with the values of ``model`` among zeros."""
    wide: Any = adapter.build(type(model), filling.config)
    proof.adopt_dtypes(wide, model)
    small = dict(_own(model))
    with torch.no_grad():
        for name, tensor in wide.state_dict().items():
            tensor.zero_()
            if (values := small.get(name)) is None:
                continue
            places = filling.places.get(name) or (None,) * tensor.dim()
            index = [
                torch.arange(size) if each is None else torch.as_tensor(each)
                for each, size in zip(places, tensor.shape, strict=True)
            ]
            tensor[torch.meshgrid(*index, indexing="ij") if index else ()] = values.to(tensor)
    return wide
