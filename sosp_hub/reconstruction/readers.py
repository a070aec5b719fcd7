"""Which weights can be solved again after a cut, and which parts of a plan a mask stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.apply import cut
from sosp_hub.surgery.layers import bypassed
from sosp_hub.surgery.tensors import get_tensor


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that sums over a cut axis.

    Attributes:
        tensor: Name of the parameter.
        dim: The dimension that is summed over.
        kept: Positions along it that stay, in the partly cut model.
        bias_norm: A BatchNorm that alone reads what this weight makes, so that its running mean
            can take a constant.
    """

    tensor: str
    dim: int
    kept: NDArray[np.int64]
    bias_norm: str | None


@dataclass(frozen=True, eq=False)
class PartlyCut:
    """A model in which a mask stands for what is not yet cut.

    Groups over which nothing but sums run are masked: the columns that read what goes are zero.
    The others are cut for real, since their mask would be another model.

    Attributes:
        model: The model, of which the caller's shares nothing.
        masked: The groups that are masked.
        readers: The weights that can be solved again, by name.
        positions: Of each tensor and dimension where the dense model has what this one has; None =
            all of it.
        left: Why other weights that read a cut axis stay as they are, by name.
    """

    model: nn.Module
    masked: frozenset[str]
    readers: dict[str, Reader]
    positions: Mapping[str, tuple[NDArray[np.int64] | None, ...]]
    left: dict[str, str]

    def index(self, tensor: str) -> tuple[NDArray[np.int64], ...]:
        """What this model has of a tensor of the dense one, for ``dense[index]``."""
        return np.ix_(*self._places(tensor))

    def outputs(self, tensor: str, num_inputs: int) -> tuple[NDArray[np.int64], ...]:
        """The same of a reader, with all inputs that it has in the dense model."""
        places = self._places(tensor)
        places[self.readers[tensor].dim] = np.arange(num_inputs)
        return np.ix_(*places)

    def reads_cut(self, tensor: str) -> bool:
        """Whether some of what a reader sums over is cut for real."""
        return self.positions[tensor][self.readers[tensor].dim] is not None

    def _places(self, tensor: str) -> list[NDArray[np.int64]]:
        shape = get_tensor(self.model, tensor).shape
        places = zip(shape, self.positions[tensor], strict=True)
        return [np.arange(size) if at is None else at for size, at in places]


def partly_cut(model: nn.Module, graph: Graph, plan: PruningPlan) -> PartlyCut:
    """Cuts and masks in place.

    Args:
        model: The dense model, with the plan's gates and shifts folded in.
        graph: What ``trace`` found in it.
        plan: The plan.
    """
    whole = {name for name, kept in plan.kept.items() if len(kept) == graph.groups[name].size}
    obstacles = {name: why for name in plan.kept.keys() - whole if (why := _obstacle(graph, name))}
    for tie in graph.ties:  # one number in the code sizes them all
        first = next((name for name in tie if name in obstacles), None)
        for name in tie if first is not None else ():
            if name in plan.kept:
                obstacles.setdefault(name, f"it is tied to {first!r}")
    layers = {name for name in obstacles if graph.groups[name].kind == "layer"}
    gone = tuple(
        f"{layer}."
        for name in layers
        for i, layer in enumerate(graph.groups[name].layers)
        if i not in plan.kept[name]
    )
    first = _only(plan, obstacles.keys() - layers)
    positions = {name: graph.kept_positions(name, first) for name in graph.tensors}
    model = cut(model, graph, first)
    bypassed(model, graph, _only(plan, layers))
    norms = _norms_behind(graph)
    readers: dict[str, Reader] = {}
    masked = [name for name in plan.kept if name not in whole and name not in obstacles]
    for name in (*masked, *(name for name in obstacles if name not in layers)):
        for member in graph.readers(name):
            if member.tensor in readers or member.tensor.startswith(gone):
                continue
            if member.tensor in graph.normalised:
                continue
            stays = graph.kept_positions(member.tensor, plan)[member.dim]
            assert stays is not None  # the group is cut
            there = positions[member.tensor][member.dim]
            kept = stays if there is None else np.searchsorted(there, stays)
            norm = norms.get(member.tensor.rpartition(".")[0])
            readers[member.tensor] = Reader(member.tensor, member.dim, kept, norm)
    left = {
        member.tensor: f"group {name!r}: {why}"
        for name, why in obstacles.items()
        for member in graph.groups[name].members
        if member.reads and member.tensor not in readers and not member.tensor.startswith(gone)
    }
    for reader in readers.values():
        weight = get_tensor(model, reader.tensor)
        removed = torch.ones(weight.shape[reader.dim], dtype=torch.bool)
        removed[torch.as_tensor(reader.kept)] = False
        with torch.no_grad():
            weight.index_fill_(reader.dim, removed.nonzero()[:, 0].to(weight.device), 0.0)
    return PartlyCut(model, frozenset(masked), readers, positions, left)


def _only(plan: PruningPlan, names: set[str]) -> PruningPlan:
    kept = {name: plan.kept[name] for name in plan.kept if name in names}
    return replace(
        plan, kept=kept, sizes={name: plan.sizes[name] for name in kept}, gates={}, shifts={}
    )


def _obstacle(graph: Graph, name: str) -> str | None:
    """Why zero columns where a group is read are not its cut; None = they are."""
    group = graph.groups[name]
    if group.kind == "layer":
        return "a whole layer is read by no weight of its own"
    if group.reasons:
        return group.reasons[0]
    places = {site.weight or f"{site.module}.weight" for site in group.sites}
    if not places or places != {member.tensor for member in graph.readers(name)}:
        return "no weight reads it"
    if normalised := sorted(places & graph.normalised):
        return f"{normalised[0]!r} is normalised before it reads"
    return None


def _norms_behind(graph: Graph) -> dict[str, str]:
    """The BatchNorm right behind each convolution that gives its result to nothing else."""
    uses: dict[int, int] = {}
    made: dict[int, str] = {}
    norms: dict[str, str] = {}
    for step in graph.steps:
        for axes in step.inputs:
            uses[id(axes)] = uses.get(id(axes), 0) + 1
        if "convolution" in step.name:
            made[id(step.outputs[0])] = step.module
    for step in graph.steps:
        if "batch_norm" in step.name and step.inputs and uses[id(step.inputs[0])] == 1:
            maker = made.get(id(step.inputs[0]))
            mean = f"{step.module}.running_mean"
            if maker is not None and mean in graph.buffers and not graph.aliases.get(mean):
                norms[maker] = step.module
    both = [norm for norm in norms.values() if list(norms.values()).count(norm) > 1]
    return {maker: norm for maker, norm in norms.items() if norm not in both}
