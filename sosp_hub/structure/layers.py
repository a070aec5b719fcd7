"""Stacks of layers that can be left out: what goes in is of the same stream as what comes out."""

from collections import Counter

from torch import nn

from sosp_hub.structure.axes import Axis, atoms, is_fixed, size_of
from sosp_hub.structure.groups import Group
from sosp_hub.structure.terms import Axes


def layer_groups(
    model: nn.Module, entries: dict[str, Axes], exits: dict[str, Axes]
) -> dict[str, Group]:
    """One group for each list of like modules of which at least two keep their stream."""
    groups: dict[str, Group] = {}
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
        kinds = [_kind(model.get_submodule(layer)) for layer in layers]
        if kinds:  # a layer with parameters of its own, such as T5's first, serves the others
            usual = Counter(kinds).most_common(1)[0][0]
            layers = tuple(
                layer for layer, kind in zip(layers, kinds, strict=True) if kind == usual
            )
        if len(layers) > 1:
            group = Group(f"{name}:layer", "layer", len(layers), (), (), (), layers)
            groups[group.name] = group
    return groups


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
