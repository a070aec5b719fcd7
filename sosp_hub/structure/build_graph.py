"""From a finished trace to the graph: groups, their names, and where their gates sit."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from sosp_hub.compat.torch import storage_key
from sosp_hub.standard_layers import standard_layer
from sosp_hub.structure.axes import (
    Atom,
    Axis,
    Prod,
    Sum,
    atoms,
    flag,
    index_of,
    is_fixed,
    resolve,
    size_of,
    unify,
)
from sosp_hub.structure.constraint_solver import kept_values, settle
from sosp_hub.structure.experts import expert_sites
from sosp_hub.structure.graph import Graph, Pinned
from sosp_hub.structure.groups import Group, Member, Site
from sosp_hub.structure.layers import layer_groups
from sosp_hub.structure.rectified import behind_pairs, rectified
from sosp_hub.structure.terms import AS_OUTPUT, Axes, Constraint, Terms
from sosp_hub.structure.traced_int import expr_atoms
from sosp_hub.types import Kind

Places = list[tuple[str, int]]
"""Tensors and dimensions."""


def assemble(
    model: nn.Module,
    terms: Terms,
    borders: tuple[dict[str, Axes], dict[str, Axes]],
    inputs: Any,
    outputs: tuple[str | int, ...] | None,
    num_samples: int,
) -> Graph:
    """Settles the ties and makes a group of every loose atom that sizes a parameter."""
    entries, exits = borders
    tensors, aliases = _tensors(model, terms)
    for axes in tensors.values():
        for axis in axes:
            _pin_repeated(axis)
    of_sizes = tuple(terms.constraints)
    terms.constraints += kept_values(terms.leaks)
    tied = settle(terms.constraints, terms.leaks, terms.comparisons)
    places = _places(tensors)
    _join_tied(terms.constraints, places, tied)
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = set(named)
    builder = _Builder(model, terms, tensors, entries, places)
    of_atom = {
        atom: builder.group(atom)
        for atom, members in places.items()
        if not atom.pinned and any(tensor in parameters for tensor, _ in members)
    }
    ties: dict[int, list[str]] = {}
    for atom, group in of_atom.items():
        ties.setdefault(tied.get(atom.id, atom.id), []).append(group.name)
    stacks, undroppable = layer_groups(model, entries, exits, terms.uses, of_sizes, terms.beside)
    groups = {group.name: group for group in of_atom.values()} | stacks
    sizes = dict(model.named_parameters())
    return Graph(
        groups=groups,
        ties=tuple(tuple(tie) for tie in ties.values() if len(tie) > 1),
        pinned=tuple(_pinned(tensors, parameters)),
        undroppable=undroppable,
        tensors=tensors,
        aliases=aliases,
        atoms={group.name: atom for atom, group in of_atom.items()},
        macs=tuple(terms.macs),
        num_samples=num_samples,
        constraints=tuple(terms.constraints),
        steps=tuple(terms.steps),
        item_bytes={
            name: model.get_parameter(name).element_size() for name in tensors if name in parameters
        }
        | {name: buffer.element_size() for name, buffer in model.named_buffers()},
        parameters=frozenset(parameters & tensors.keys()),
        buffers=frozenset(model.state_dict(keep_vars=True).keys() & tensors.keys() - parameters),
        normalised=frozenset(terms.normalised),
        written=frozenset(name for name in named if storage_key(named[name]) in terms.written),
        scales=tuple(terms.scales),
        example_inputs=inputs,
        outputs=outputs,
        only_in_training=terms.only_in_training,
        never_used=terms.never_used,
        advice=_advice(terms, tensors, groups, sizes),
        num_params=sum(parameter.numel() for parameter in sizes.values()),
        num_cuttable_params=_cuttable(groups, sizes),
    )


def _tensors(model: nn.Module, terms: Terms) -> tuple[dict[str, Axes], dict[str, tuple[str, ...]]]:
    """Axes by first name, and the further names of shared tensors.

    A buffer that the pass made anew in another shape is a cache, not part of the model, where
    nothing of it can be cut.
    """
    first: dict[int, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, Axes] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if name in terms.refilled and all(is_fixed(axis) for axis in terms.of(tensor)):
            continue
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = terms.of(tensor)
        else:
            aliases[known] = (*aliases.get(known, ()), name)
    return tensors, aliases


def _pin_repeated(axis: Axis) -> None:
    """An atom that is a factor of itself cannot be cut by one index list."""
    axis = resolve(axis)
    if isinstance(axis, Prod):
        seen: set[int] = set()
        for factor in axis.factors:
            for atom in {a.id: a for a in atoms(factor)}.values():
                if atom.id in seen:
                    atom.pinned.setdefault("the axis is a product of it with itself")
                seen.add(atom.id)
    elif isinstance(axis, Sum):
        for part in axis.parts:
            _pin_repeated(part)


def _places(tensors: dict[str, Axes]) -> dict[Atom, Places]:
    places: dict[int, tuple[Atom, Places]] = {}
    for name, axes in tensors.items():
        for dim, axis in enumerate(axes):
            for atom in {a.id: a for a in atoms(axis)}.values():
                if atom.size > 1:
                    places.setdefault(atom.id, (atom, []))[1].append((name, dim))
    return dict(places.values())


def _join_tied(
    constraints: Sequence[Constraint],
    places: dict[Atom, Places],
    tied: dict[int, int],
) -> None:
    """Makes an axis of activations alone, such as of copies, that of the group it is tied to."""
    held = {tied.get(atom.id, atom.id): atom for atom in reversed(places) if not atom.pinned}
    for constraint in constraints:
        for atom in (*atoms(constraint.axis), *expr_atoms(constraint.expr)):
            group = held.get(tied.get(atom.id, atom.id))
            if group is not None and atom not in places:
                group.barred |= atom.barred
                atom.roles.clear()  # a group's kind is what its weights are
                unify(atom, group, constraint.where)


class _Builder:
    """Makes the group of an atom.

    Args:
        model: The model.
        terms: What the pass found.
        tensors: Axes of each tensor.
        entries: Axes of what goes into each module.
        places: Where each atom is.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Terms,
        tensors: dict[str, Axes],
        entries: dict[str, Axes],
        places: dict[Atom, Places],
    ) -> None:
        self._tensors, self._entries, self._places = tensors, entries, places
        self._modules = dict(model.named_modules())
        self._normalised = terms.normalised
        self._behind = behind_pairs(model, terms.steps)
        self._readers = _readers(terms)
        self._summed = _summed(terms, model)
        self._names: set[str] = set()

    def group(self, atom: Atom) -> Group:
        """The group of an atom that nothing pins."""
        kind, members = self._kind(atom), self._places[atom]
        if kind == "head_dim" and any(self._may_be_fused(tensor) for tensor, _ in members):
            flag(atom, "a fused kernel would scale attention by 1/sqrt(its size)")
        if kind == "expert":
            sites = expert_sites(atom, members, self._tensors, self._readers)
        else:
            sites = self._sites(atom)
        return Group(
            name=self._name(atom, kind),
            kind=kind,
            size=atom.size,
            members=tuple(
                Member(
                    tensor,
                    dim,
                    index=index_of(self._tensors[tensor][dim], atom),
                    reads=self._is_read(tensor, dim, atom),
                )
                for tensor, dim in members
            ),
            sites=tuple(sites),
            reasons=tuple(atom.inexact),
            multiple=atom.multiple if atom.size % atom.multiple == 0 else 1,
            rectified=rectified(self._behind, atom, tuple(sites), self._entries),
            barred=frozenset(atom.barred),
        )

    def _may_be_fused(self, tensor: str) -> bool:
        """Whether it is a weight of attention that was told not to run in a fused kernel."""
        parents = itertools.accumulate(tensor.split("."), "{}.{}".format)
        inside = (vars(self._modules[name]) for name in parents if name in self._modules)
        return any(module.get("fused_attn") is False for module in inside)

    def _is_read(self, tensor: str, dim: int, atom: Atom) -> bool:
        """Whether this dimension is summed over; a square weight has the atom twice."""
        readers, axes = self._readers.get((tensor, atom.id)), self._tensors[tensor]
        if readers is None:
            return False
        holders = [d for d, axis in enumerate(axes) if any(a is atom for a in atoms(axis))]
        if len(holders) == 1:
            return True
        if sum((tensor, holder) in self._summed for holder in holders) == 1:
            return (tensor, dim) in self._summed
        wanted = [[a.id for a in atoms(axis)] for axis in readers.values()]
        matching = [d for d in holders if [a.id for a in atoms(axes[d])] in wanted]
        return dim == (matching[-1] if matching else holders[-1])

    def _kind(self, atom: Atom) -> Kind:
        axes = [self._tensors[name][dim] for name, dim in self._places[atom]]
        if "expert" in atom.roles and "head" not in atom.roles:
            return "expert"
        if "head" in atom.roles:
            shared = any(_is_copied(axis, atom) for axis in axes)
            return "head" if "copies" in atom.roles or not shared else "kv_group"
        if "contracted" in atom.roles and "stream" not in atom.roles:
            return "head_dim"
        if any(_is_inside_head(axis, atom) for axis in axes):
            return "head_dim"
        if {"stream", "normalised"} <= atom.roles and len(self._makers(atom)) > 1:
            return "residual"  # several layers write into it; else one layer's own result
        return "channel" if "convolved" in atom.roles else "neuron"

    def _makers(self, atom: Atom) -> list[str]:
        """The tensors that make its slices of something else: not scales, shifts or filters."""
        return [
            tensor
            for tensor, dim in self._places[atom]
            if not self._is_read(tensor, dim, atom)
            and any(
                size_of(axis) > 1 and not _is_window(axis)
                for other, axis in enumerate(self._tensors[tensor])
                if other != dim
            )
        ]

    def _name(self, atom: Atom, kind: Kind) -> str:
        """The module that makes the slices, and the kind; the same for the same model."""
        makers = [
            tensor
            for tensor, dim in self._places[atom]
            if len(self._tensors[tensor]) > 1 and not self._is_read(tensor, dim, atom)
        ]
        tensor = (makers or [self._places[atom][0][0]])[0]
        stem = tensor.rpartition(".")[0] or tensor
        name, number = f"{stem}:{kind}", 2
        while name in self._names:
            name, number = f"{stem}:{kind}#{number}", number + 1
        self._names.add(name)
        return name

    def _sites(self, atom: Atom) -> list[Site]:
        """Where the activation is read; nowhere if a gate cannot stand for it."""
        sites: list[Site] = []
        if "contracted" in atom.roles:  # also summed over between two activations
            return sites
        for tensor, dim in self._places[atom]:
            if not self._is_read(tensor, dim, atom):
                continue
            for reader in self._readers[tensor, atom.id]:
                layer, entry = standard_layer(self._modules[reader]), self._entries.get(reader, ())
                at = layer.input_dim if layer else None
                if at is not None and entry and any(a is atom for a in atoms(entry[at])):
                    sites.append(Site(reader, None, at, index_of(entry[at], atom)))
                elif tensor in self._normalised:  # to scale it is no gate
                    return []
                else:
                    index = index_of(self._tensors[tensor][dim], atom)
                    sites.append(Site(None, tensor, dim, index))
        return sites


def _readers(terms: Terms) -> dict[tuple[str, int], dict[str, Axis]]:
    """By (parameter, atom id): the modules whose code sums over the axis, and that axis."""
    readers: dict[tuple[str, int], dict[str, Axis]] = {}
    for read in terms.reads:
        axis = resolve(read.axis)
        for atom in {a.id: a for a in atoms(axis)}.values():
            readers.setdefault((read.tensor, atom.id), {}).setdefault(read.module, axis)
    return readers


def _summed(terms: Terms, model: nn.Module) -> set[tuple[str, int]]:
    """Dimensions of parameters that a read sums over, by their stride: views keep it."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {
        (read.tensor, dim)
        for read in terms.reads
        if read.tensor in tensors
        for dim, stride in enumerate(tensors[read.tensor].stride())
        if stride == read.stride
    }


def _is_window(axis: Axis) -> bool:
    """Whether an axis is that of a convolution's window."""
    return all(reason.startswith(_WINDOW) for a in atoms(axis) for reason in a.pinned or ("",))


_WINDOW = "the window of"


def _is_copied(axis: Axis, atom: Atom) -> bool:
    """Whether an axis holds copies of the atom's structures, as keys that heads share."""
    axis = resolve(axis)
    factors = axis.factors if isinstance(axis, Prod) else ()
    return any(isinstance(f, Atom) and f is not atom and "copies" in f.roles for f in factors)


def _is_inside_head(axis: Axis, atom: Atom) -> bool:
    axis = resolve(axis)
    if isinstance(axis, Sum):
        return any(_is_inside_head(part, atom) for part in axis.parts)
    if not isinstance(axis, Prod):
        return False
    inside = any(any(a is atom for a in atoms(factor)) for factor in axis.factors)
    return inside and any(
        "head" in a.roles for factor in axis.factors for a in atoms(factor) if a is not atom
    )


def _pinned(tensors: dict[str, Axes], parameters: set[str]) -> list[Pinned]:
    """Parameter dimensions nothing of which can be cut, windows of convolutions aside."""
    pinned = []
    for name, axes in tensors.items():
        for dim, axis in enumerate(axes):
            stuck = list(atoms(axis))
            if (
                name not in parameters
                or size_of(axis) == 1
                or not all(atom.pinned for atom in stuck)
            ):
                continue
            reason = next(
                (reason for atom in stuck for reason in atom.pinned),
                "the size is written into the code",
            )
            if not reason.startswith(_WINDOW):
                pinned.append(Pinned(name, dim, size_of(axis), reason))
    return pinned


_MUCH = 0.05


def _advice(
    terms: Terms, tensors: dict[str, Axes], groups: dict[str, Group], parameters: dict[str, Any]
) -> str:
    """Which outputs keep much whole, where others do not; nothing where there is no choice."""
    touched = {member.tensor for group in groups.values() for member in group.members}
    total = sum(parameter.numel() for parameter in parameters.values())

    def share(output: str | int) -> float:
        held = {atom for axis in terms.given[output] for atom in atoms(axis)}
        alone = {atom.id for atom in held if list(atom.pinned) == [AS_OUTPUT]}
        kept = (
            parameter.numel()
            for name, parameter in parameters.items()
            if name not in touched
            and any(a.id in alone for axis in tensors.get(name, ()) for a in atoms(axis))
        )
        return sum(kept) / max(total, 1)

    shares = {output: share(output) for output in terms.given}
    most = max(shares.values(), default=0)
    heavy = [output for output, part in shares.items() if part > most / 2 and part >= _MUCH]
    light = [output for output in shares if output not in heavy and terms.given[output]]
    if not heavy or not light:
        return ""
    much = ", ".join(f"{output!r} ({100 * shares[output]:.1f} %)" for output in heavy)
    wanted = repr(light[0] if len(light) == 1 else tuple(light))
    return (
        f"outputs that keep parameters whole: {much}; trace(..., outputs={wanted}) frees them, "
        "if nobody reads the others"
    )


def _cuttable(groups: dict[str, Group], parameters: dict[str, Any]) -> dict[str, int]:
    shares = {}
    for label, chosen in (
        ("exact", [g for g in groups.values() if g.exact]),
        ("all", list(groups.values())),
    ):
        touched = {member.tensor for group in chosen for member in group.members}
        shares[label] = sum(p.numel() for name, p in parameters.items() if name in touched)
    return shares
