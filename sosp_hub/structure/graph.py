"""The result of a trace: groups, ties, what is pinned and why, and all that a cut needs to know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sosp_hub.errors import PlanError
from sosp_hub.plan import Plan, PruningPlan
from sosp_hub.structure.axes import Atom, Axis, atoms, size_of, sources
from sosp_hub.structure.constraint_solver import Count
from sosp_hub.structure.groups import Group, Member
from sosp_hub.structure.inputs import num_tokens, one_sample
from sosp_hub.structure.plain import PlainSizes
from sosp_hub.structure.terms import Axes, Constraint, Step
from sosp_hub.summary import Summarised, Summary, alike, span

_MOST_NOTES = 8  # lines of reasons in what print(graph) shows


@dataclass(frozen=True, eq=False)
class Pinned:
    """A dimension that keeps its size, and why."""

    tensor: str
    dim: int
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class Route:
    """Another way to run the model, and its trace.

    Attributes:
        name: What differs from the traced inputs.
        graph: The trace; its groups have the same names, its example inputs are those of this way.
        run: Runs a copy of the model on such inputs.
    """

    name: str
    graph: "Graph"
    run: Callable[[nn.Module, Any], Any]


@dataclass(eq=False)
class Routes:
    """The other ways in which a model can be run, as far as they were looked for.

    Attributes:
        known: Those that were traced.
        unchecked: Those that the model does not take, and why.
        complete: Whether all were looked for, as they are to be verified.
    """

    known: tuple[Route, ...] = ()
    unchecked: dict[str, str] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True, eq=False)
class Sized:
    """The products of a forward pass on inputs of the size that costs are told for.

    Attributes:
        macs: As of a graph, like the others.
        atoms: Root atom of each group.
        num_samples: Samples in the inputs.
        sample: How large one of them is, in words.
        num_tokens: Its tokens; 0 where it has none.
    """

    macs: tuple[tuple[str, Axes], ...]
    atoms: Mapping[str, Atom]
    num_samples: int
    sample: str
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Graph(Summarised):
    """What belongs together in one model. ``print(graph)`` is a screen of it.

    Attributes:
        groups: Groups by name, in the order of the model's parameters.
        ties: Sets of groups that must keep equally many structures (one attribute holds both
            sizes).
        pinned: Parameter dimensions that keep their size, with the reason.
        undroppable: Stacks of like layers none of which can be left out, with the reason.
        tensors: Axes of every parameter and buffer that the forward pass used.
        aliases: Other names of a shared tensor, by the name it is listed under.
        atoms: Root atom of each group.
        macs: Module and axes of each product of the forward pass; the sizes multiply to its cost.
        num_samples: Samples in the traced inputs.
        constraints: Size arguments of the code and the axes they describe; they give the cut
            model's attributes.
        steps: The operations of the forward pass, for verification.
        item_bytes: Bytes of one element of each tensor.
        parameters: Names of the tensors that are parameters.
        buffers: Names of the buffers that a checkpoint stores.
        normalised: Parameters that are divided by a norm of themselves before they are used.
        written: Parameters that the forward pass itself writes to, such as a scale that it clamps.
        scales: Module and width of attention that a fused kernel scales by the width it finds.
        example_inputs: The inputs that were traced.
        outputs: Names or positions of the outputs that matter; None = all.
        only_in_training: Modules with parameters that evaluation never uses, training does.
        never_used: Modules with parameters that neither uses; they keep their size.
        routes: Other ways to run the model, found when it is first cut.
        of_size: What costs are told for, where that is not the size of the traced inputs.
        advice: Which outputs to name so that more can be cut.
        plain: Which numbers of heads and channels the configs inside the model take.
        unproved: Groups whose cut was seen to differ from the masked model, and how; they stay
            whole in every cut since.
        uncut_sizes: Of groups that were cut before the model was traced: how large they were, so
            that floors are shares of that.
    """

    groups: dict[str, Group]
    ties: tuple[tuple[str, ...], ...]
    pinned: tuple[Pinned, ...]
    tensors: dict[str, Axes]
    aliases: dict[str, tuple[str, ...]]
    atoms: dict[str, Atom]
    macs: tuple[tuple[str, Axes], ...]
    num_samples: int
    constraints: tuple[Constraint, ...]
    steps: tuple[Step, ...]
    item_bytes: dict[str, int]
    parameters: frozenset[str]
    buffers: frozenset[str]
    normalised: frozenset[str]
    written: frozenset[str]
    example_inputs: object
    outputs: tuple[str | int, ...] | None = None
    undroppable: Mapping[str, str] = field(default_factory=dict)
    num_params: int = 0
    num_cuttable_params: dict[str, int] = field(default_factory=dict)
    only_in_training: tuple[str, ...] = ()
    never_used: tuple[str, ...] = ()
    scales: tuple[tuple[str, Axis], ...] = ()
    advice: str = ""
    routes: Routes = field(default_factory=Routes)
    of_size: Sized | None = None
    plain: tuple[PlainSizes, ...] = ()
    unproved: dict[str, str] = field(default_factory=dict)
    uncut_sizes: Mapping[str, int] = field(default_factory=dict)

    def after(self, plans: Sequence[PruningPlan]) -> "Graph":
        """The same graph, of a model that was cut by these plans, one after the other."""
        sizes = {name: size for plan in reversed(plans) for name, size in plan.sizes.items()}
        return replace(self, uncut_sizes=sizes)

    def provable(self, plan: PruningPlan) -> PruningPlan:
        """The plan without the groups of ``unproved``."""
        if self.unproved.keys().isdisjoint(plan.kept):
            return plan
        kept = {name: indices for name, indices in plan.kept.items() if name not in self.unproved}
        return replace(plan, kept=kept, sizes={name: plan.sizes[name] for name in kept})

    @property
    def sized(self) -> Sized:
        """What costs are told for."""
        if self.of_size is not None:
            return self.of_size
        inputs = self.example_inputs
        facts = (one_sample(inputs), num_tokens(inputs))
        return Sized(self.macs, self.atoms, self.num_samples, *facts)

    def check(self, plan: Plan) -> None:
        """Raises PlanError unless the plan was made for this model and obeys its ties."""
        for name, size in plan.sizes.items():
            group = self.groups.get(name)
            if group is None:
                known = ", ".join(list(self.groups)[:5])
                raise PlanError(
                    f"plan: this model has no group {name!r}; "
                    f"it has {len(self.groups)}, such as {known}"
                )
            if group.size != size:
                raise PlanError(
                    f"plan: group {name!r} has {group.size} structures here, "
                    f"but the plan was made for {size}"
                )
            if len(plan.kept[name]) in group.barred:
                raise PlanError(
                    f"plan: group {name!r} must not keep {len(plan.kept[name])} of its {size} "
                    f"structures: the model's code would take another path, or picks more of them; "
                    f"not allowed are {', '.join(map(str, sorted(group.barred)[:8]))}"
                )
        counts = plan.num_kept()
        for tie in self.ties:
            tied_counts = {name: counts.get(name, self.groups[name].size) for name in tie}
            if len(set(tied_counts.values())) > 1:
                raise PlanError(
                    f"plan: these groups must keep equally many structures: {tied_counts}"
                )

    def fold_obstacle(self, name: str) -> str | None:
        """Why gates of this group cannot be folded into the weights that read it; None = can."""
        sites = self.groups[name].sites
        places = {site.weight or f"{site.module}.weight" for site in sites}
        if not places or places != {member.tensor for member in self.readers(name)}:
            return "no weight reads it"
        for tensor in sorted(places & self.normalised):
            return f"{tensor!r} is normalised before it reads"
        shared = [tensor for tensor in sorted(places) if self.aliases.get(tensor)]
        return f"{shared[0]!r} is tied to another weight" if shared else None

    def readers(self, name: str) -> list[Member]:
        """The weights that read a group's activation, where its gates sit.

        A parameter that is itself read by a layer, such as a query that a model learns, is not one.
        """
        group = self.groups[name]
        places = {site.weight or f"{site.module}.weight" for site in group.sites}
        return [member for member in group.members if member.reads and member.tensor in places]

    def keep(self, plan: PruningPlan) -> dict[int, NDArray[np.bool_]]:
        """Keep mask of each cut atom, by atom id."""
        masks = {}
        for name, kept in plan.kept.items():
            if name not in self.atoms:
                continue
            mask = np.zeros(self.groups[name].size, bool)
            mask[list(kept)] = True
            masks[self.atoms[name].id] = mask
        return masks

    def count(self, counts: Mapping[str, int]) -> Count:
        """Size of each atom when ``counts`` structures of the named groups are kept."""
        left = {self.atoms[n].id: number for n, number in counts.items() if n in self.atoms}
        return lambda atom: left.get(atom.id, atom.size)

    def kept_positions(self, tensor: str, plan: Plan) -> tuple[NDArray[np.int64] | None, ...]:
        """Where each position of each new dimension comes from; None where all stay as they are."""
        axes = self.tensors[tensor]
        inside = {atom.id for axis in axes for atom in atoms(axis)}
        chosen = {
            self.atoms[name].id: np.asarray(kept, dtype=np.int64)
            for name, kept in plan.kept.items()
            if name in self.atoms and self.atoms[name].id in inside
        }
        if not chosen:
            return (None,) * len(axes)
        kept = [sources(axis, chosen) for axis in self.tensors[tensor]]
        dense = [np.arange(size_of(axis)) for axis in self.tensors[tensor]]
        return tuple(
            None if np.array_equal(*pair) else pair[0] for pair in zip(kept, dense, strict=True)
        )

    def summary(self) -> Summary:
        """A row for the groups that are alike, and the reasons why something stays whole."""
        rows = [
            (
                pattern,
                len(names),
                span([self.groups[name].size for name in names]),
                span([len(self.groups[name].members) for name in names]),
            )
            for pattern, names in alike(self.groups).items()
        ]
        notes = _what_stays(self)
        if len(notes) > _MOST_NOTES:
            notes = [*notes[:_MOST_NOTES], f"and {len(notes) - _MOST_NOTES} more reasons"]
        head = ("group", "groups", "size", "tensor axes")
        whole = "print(graph.describe()) shows every axis and reason"
        return Summary(_share_in_words(self).splitlines(), head, rows, (*notes, whole))

    def describe(self) -> str:
        """Stable, reviewable text: groups and their axes, what is tied, what stays and why."""
        return _in_words(self)


def _share_in_words(graph: Graph) -> str:
    exact = graph.num_cuttable_params.get("exact", 0)
    everything = graph.num_cuttable_params.get("all", 0)
    total = max(graph.num_params, 1)
    return (
        f"{len(graph.groups)} groups; {100 * everything / total:.1f} % of "
        f"{graph.num_params:,} parameters can be cut ({100 * exact / total:.1f} % exactly)"
    )


def _in_words(graph: Graph) -> str:
    """One line a group, then its axes; then ties and what is pinned, by reason."""
    lines = [_share_in_words(graph)]
    for group in graph.groups.values():
        tail = "" if group.exact else f"  inexact: {'; '.join(group.reasons[:2])}"
        if group.barred:
            tail = f"  never {', '.join(map(str, sorted(group.barred)[:8]))}{tail}"
        lines.append(f"{group.name}  size {group.size}{tail}")
        lines += [f"    layer {layer}" for layer in group.layers]
        for member in group.members:
            verb = "reads" if member.reads else "makes"
            lines.append(f"    {verb} {member.tensor}[{member.dim}]")
    return "\n".join([*lines, *_what_stays(graph)])


def _what_stays(graph: Graph) -> list[str]:
    """What is tied, keeps its size, or is not used, with the reason."""
    lines = [graph.advice] if graph.advice else []
    lines += [f"tied: {', '.join(tie)}" for tie in graph.ties]
    by_reason: dict[str, list[str]] = {}
    for pinned in graph.pinned:
        by_reason.setdefault(pinned.reason, []).append(f"{pinned.tensor}[{pinned.dim}]")
    for reason, dims in by_reason.items():
        more = f" and {len(dims) - 3} more" if len(dims) > 3 else ""
        lines.append(f"pinned: {', '.join(dims[:3])}{more}: {reason}")
    for reason in sorted(set(graph.undroppable.values())):
        stacks = [stack for stack, why in graph.undroppable.items() if why == reason]
        more = f" and {len(stacks) - 3} more" if len(stacks) > 3 else ""
        lines.append(f"undroppable: layers of {', '.join(stacks[:3])}{more}: {reason}")
    for modules, label in (
        (graph.only_in_training, "only training uses"),
        (graph.never_used, "nothing uses"),
    ):
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        if modules:
            lines.append(f"{label}: {', '.join(modules[:3])}{more}")
    return lines
