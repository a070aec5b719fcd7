"""Stacks of layers that can be left out: what goes in is of the same stream as what comes out."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from sosp_hub.structure.axes import Axis, atoms, is_fixed, size_of
from sosp_hub.structure.groups import Group
from sosp_hub.structure.terms import Axes, Constraint
from sosp_hub.structure.traced_int import attributes

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
"""What configs call the number of layers of a stack."""

LAYER_POSITIONS = ("fullatt_block_indexes",)
"""What configs, and modules around a stack, call the positions of some of its layers."""

Uses = Mapping[tuple[str, int], Iterable[str]]
"""The modules whose code computes with a result, by the module that made it and its position."""


def layer_groups(
    model: nn.Module,
    entries: Mapping[str, Axes],
    exits: Mapping[str, Axes],
    uses: Uses,
    constraints: Iterable[Constraint],
    beside: Mapping[str, tuple[tuple[int, ...], ...]],
) -> tuple[dict[str, Group], dict[str, str]]:
    """One group for each list of like modules of which at least two keep their stream.

    Args:
        model: Holds the stacks.
        entries: Axes of what each module was given first.
        exits: Axes of what each module gave.
        uses: The modules whose code computes with what a module gave.
        constraints: What the sizes of tensors are computed from.
        beside: Shapes of the further tensors that each module that runs in evaluation was given by
            position. A layer given others than most, such as the one where Funnel pools, does what
            the others do not.

    Returns:
        The groups, and for other stacks why none of their layers can be left out: each layer but
        the last one must give its result to the next one alone, what a layer gives besides it
        must be for nobody, and no tensor holds a part for each layer.
    """
    groups: dict[str, Group] = {}
    reasons: dict[str, str] = {}
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList | nn.Sequential) or len(stack) < 2:
            continue
        inside = f"{name}." if name else ""
        layers = tuple(
            f"{inside}{child_name}"
            for child_name, child in stack.named_children()
            if any(True for _ in child.children())
            and _keeps_stream(
                entries.get(f"{inside}{child_name}"), exits.get(f"{inside}{child_name}")
            )
        )
        kinds = [(_kind(model.get_submodule(layer)), beside.get(layer)) for layer in layers]
        if kinds:  # a layer with parameters of its own, such as T5's first, serves the others
            usual = Counter(kinds).most_common(1)[0][0]
            layers = tuple(
                layer for layer, kind in zip(layers, kinds, strict=True) if kind == usual
            )
        if len(layers) < 2:
            continue
        if not beside.keys() >= set(layers):  # code that chooses among them counts them all
            reasons[name] = "evaluation does not run all of its layers"
            continue
        layers = tuple(layer for layer in layers if not _gives_more(layer, uses))
        if len(layers) < 2:
            reasons[name] = "more than the first result of one of its layers is used"
            continue
        elsewhere = _used_elsewhere(
            [f"{inside}{child}" for child, _ in stack.named_children()], uses
        )
        elsewhere = elsewhere or _counted(name, len(stack), constraints)
        if elsewhere is None:
            group = Group(f"{name}:layer", "layer", len(layers), (), (), (), layers)
            groups[group.name] = group
        else:
            reasons[name] = elsewhere
    return groups, reasons


def _gives_more(layer: str, uses: Uses) -> bool:
    """Whether code outside of a layer uses anything but the first result that it makes."""
    return any(
        module == layer
        and position
        and any(not f"{user}.".startswith(f"{layer}.") for user in users)
        for (module, position), users in uses.items()
    )


def _used_elsewhere(children: Sequence[str], uses: Uses) -> str | None:
    """What but the next one uses the result of a module of a stack, in words."""
    for child, following in itertools.pairwise(children):
        for user in uses.get((child, 0), ()):
            if not f"{user}.".startswith(f"{following}."):
                around = f"{child}.".startswith(f"{user}." if user else "")
                return (
                    f"{'the code around it' if around else user} uses the result of one of its "
                    "layers, not of the last one alone"
                )
    return None


def _counted(stack: str, number: int, constraints: Iterable[Constraint]) -> str | None:
    """Which tensor is as long as a stack has layers, such as one with an input for each; in words.

    The number is an attribute of a module around the stack, or in it.
    """
    for constraint in constraints:
        for attribute in attributes(constraint.expr):
            around, inside = f"{attribute.module}.", f"{stack}."
            if (
                attribute.name.rpartition(".")[2] in LAYER_COUNTS
                and attribute.dense == number
                and (not attribute.module or inside.startswith(around) or around.startswith(inside))
            ):
                return f"a tensor has a part for each of its layers ({constraint.where})"
    return None


def _kind(layer: nn.Module) -> tuple[type, frozenset[str]]:
    return type(layer), frozenset(name for name, _ in layer.named_parameters())


def _keeps_stream(entry: Axes | None, leaving: Axes | None) -> bool:
    """Whether a module adds to a stream: its output's axes are those of its input."""
    if not entry or not leaving or len(entry) != len(leaving):
        return False
    pairs = list(zip(entry, leaving, strict=True))
    return all(_alike(one, two) for one, two in pairs) and any(
        _same(one, two) and any("stream" in atom.roles for atom in atoms(one)) for one, two in pairs
    )


def _alike(one: Axis, two: Axis) -> bool:
    return _same(one, two) or (size_of(one) == size_of(two) and is_fixed(one) and is_fixed(two))


def _same(one: Axis, two: Axis) -> bool:
    return [atom.id for atom in atoms(one)] == [atom.id for atom in atoms(two)]
