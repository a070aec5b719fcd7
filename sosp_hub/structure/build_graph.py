"""From a finished trace to the graph: groups, their names, and where their gates sit."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from sosp_hub.compat.torch import Convolution
from sosp_hub.structure.axes import (
    Atom,
    Axis,
    Prod,
    Sum,
    atoms,
    index_of,
    is_fixed,
    resolve,
    size_of,
    unify,
)
from sosp_hub.structure.constraint_solver import settle
from sosp_hub.structure.experts import expert_sites
from sosp_hub.structure.graph import Graph, Pinned
from sosp_hub.structure.groups import Group, Member, Site
from sosp_hub.structure.layers import layer_groups
from sosp_hub.structure.rectified import behind_pairs, rectified
from sosp_hub.structure.terms import Axes, Constraint, Terms
from sosp_hub.structure.traced_int import expr_atoms
from sosp_hub.types import Kind

Reads = dict[tuple[str, int], dict[str, Axis]]
Summed = set[tuple[str, int]]

"""Axes along which a parameter is summed over, by (parameter, atom id) and the module whose code
does it.
"""


def assemble(
    model: nn.Module,
    terms: Terms,
    borders: tuple[dict[str, Axes], dict[str, Axes]],
    inputs: Any,
    outputs: tuple[str, ...] | None,
    num_samples: int,
) -> Graph:
    """Settles the ties and makes a group of every loose atom that sizes a parameter."""
    entries, exits = borders
    tensors, aliases = _tensors(model, terms)
    for axes in tensors.values():
        for axis in axes:
            _pin_repeated(axis)
    tied = settle(terms.constraints, terms.leaks, terms.comparisons)
    places = _places(tensors)
    _join_tied(terms.constraints, places, tied)
    parameters = {name for name, parameter in model.named_parameters(remove_duplicate=False)}
    reads, summed = _reads(terms), _summed(terms, model)
    behind = behind_pairs(model, terms.steps)
    numbers: dict[int, Group] = {}
    names: set[str] = set()
    for atom, members in places.items():
        if atom.pinned or not any(tensor in parameters for tensor, _ in members):
            continue
        kind = _kind(atom, members, tensors)
        name = _name(atom, members, tensors, reads, summed, kind, names)
        names.add(name)
        found = tuple(
            Member(
                tensor,
                dim,
                index_of(tensors[tensor][dim], atom),
                _is_read(reads, summed, tensor, dim, atom, tensors),
            )
            for tensor, dim in members
        )
        if kind == "expert":
            sites = tuple(expert_sites(atom, members, tensors, reads))
        else:
            sites = tuple(
                _sites(model, atom, members, tensors, reads, summed, entries, terms.normalised)
            )
        multiple = atom.multiple if atom.size % atom.multiple == 0 else 1
        numbers[atom.id] = Group(
            name, kind, atom.size, found, sites, tuple(atom.inexact), (), multiple,
            rectified(behind, atom, sites, entries),
            frozenset(atom.barred),
        )  # fmt: skip
    by_id = {atom.id: atom for atom in places}
    groups = {group.name: group for group in numbers.values()}
    group_atoms = {numbers[number].name: by_id[number] for number in numbers}
    ties: dict[int, list[str]] = {}
    for number, group in numbers.items():
        ties.setdefault(tied.get(number, number), []).append(group.name)
    stacks, undroppable = layer_groups(model, entries, exits, terms.uses)
    groups |= stacks
    sizes = dict(model.named_parameters())
    return Graph(
        groups=groups,
        ties=tuple(tuple(tie) for tie in ties.values() if len(tie) > 1),
        pinned=tuple(_pinned(tensors, parameters)),
        undroppable=undroppable,
        tensors=tensors,
        aliases=aliases,
        atoms=group_atoms,
        macs=tuple(terms.macs),
        num_samples=num_samples,
        constraints=tuple(terms.constraints),
        steps=tuple(terms.steps),
        item_bytes={
            name: model.get_parameter(name).element_size() for name in tensors if name in parameters
        }
        | {name: buffer.element_size() for name, buffer in model.named_buffers()},
        parameters=frozenset(parameters & tensors.keys()),
        buffers=frozenset(model.state_dict().keys() & tensors.keys() - parameters),
        normalised=frozenset(terms.normalised),
        example_inputs=inputs,
        outputs=outputs,
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


def _places(tensors: dict[str, Axes]) -> dict[Atom, list[tuple[str, int]]]:
    places: dict[int, tuple[Atom, list[tuple[str, int]]]] = {}
    for name, axes in tensors.items():
        for dim, axis in enumerate(axes):
            for atom in {a.id: a for a in atoms(axis)}.values():
                if atom.size > 1:
                    places.setdefault(atom.id, (atom, []))[1].append((name, dim))
    return dict(places.values())


def _join_tied(
    constraints: Sequence[Constraint],
    places: dict[Atom, list[tuple[str, int]]],
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


def _reads(terms: Terms) -> Reads:
    reads: Reads = {}
    for read in terms.reads:
        axis = resolve(read.axis)
        for atom in {a.id: a for a in atoms(axis)}.values():
            reads.setdefault((read.tensor, atom.id), {}).setdefault(read.module, axis)
    return reads


def _summed(terms: Terms, model: nn.Module) -> Summed:
    """Dimensions of parameters that a read sums over, by their stride: views keep it."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {
        (read.tensor, dim)
        for read in terms.reads
        if read.tensor in held
        for dim, stride in enumerate(held[read.tensor].stride())
        if stride == read.stride
    }


def _is_read(
    reads: Reads, summed: Summed, tensor: str, dim: int, atom: Atom, tensors: dict[str, Axes]
) -> bool:
    """Whether this dimension is summed over; a square weight has the atom twice."""
    if (tensor, atom.id) not in reads:
        return False
    holders = [d for d, axis in enumerate(tensors[tensor]) if any(a is atom for a in atoms(axis))]
    if len(holders) == 1:
        return True
    if sum((tensor, holder) in summed for holder in holders) == 1:
        return (tensor, dim) in summed
    wanted = [[a.id for a in atoms(axis)] for axis in reads[tensor, atom.id].values()]
    matching = [d for d in holders if [a.id for a in atoms(tensors[tensor][d])] in wanted]
    return dim == (matching[-1] if matching else holders[-1])


def _kind(atom: Atom, members: list[tuple[str, int]], tensors: dict[str, Axes]) -> Kind:
    if "expert" in atom.roles and "head" not in atom.roles:
        return "expert"
    if "head" in atom.roles:
        shared = False
        for name, dim in members:
            axis = resolve(tensors[name][dim])
            factors = axis.factors if isinstance(axis, Prod) else ()
            shared |= any(
                isinstance(f, Atom) and f is not atom and "copies" in f.roles for f in factors
            )
        return "head" if "copies" in atom.roles or not shared else "kv_group"
    if "contracted" in atom.roles and "stream" not in atom.roles:
        return "head_dim"
    inside_head = any(_is_inside_head(tensors[name][dim], atom) for name, dim in members)
    if inside_head:
        return "head_dim"
    if {"stream", "normalised"} <= atom.roles:
        return "residual"
    return "channel" if "convolved" in atom.roles else "neuron"


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


def _name(
    atom: Atom,
    members: list[tuple[str, int]],
    tensors: dict[str, Axes],
    reads: Reads,
    summed: Summed,
    kind: Kind,
    taken: set[str],
) -> str:
    makers = [
        n
        for n, d in members
        if len(tensors[n]) > 1 and not _is_read(reads, summed, n, d, atom, tensors)
    ]
    tensor = (makers or [members[0][0]])[0]
    stem = tensor.rpartition(".")[0] or tensor
    name, number = f"{stem}:{kind}", 2
    while name in taken:
        name, number = f"{stem}:{kind}#{number}", number + 1
    return name


def _sites(
    model: nn.Module,
    atom: Atom,
    members: list[tuple[str, int]],
    tensors: dict[str, Axes],
    reads: Reads,
    summed: Summed,
    entries: dict[str, Axes],
    normalised: set[str],
) -> list[Site]:
    sites: list[Site] = []
    if (
        "contracted" in atom.roles
    ):  # also summed over between two activations: no gate stands for it
        return sites
    modules = dict(model.named_modules())
    for tensor, dim in members:
        if not _is_read(reads, summed, tensor, dim, atom, tensors):
            continue
        for reader in reads[tensor, atom.id]:
            at = _input_dim(modules[reader])
            entry = entries.get(reader, ())
            if at is not None and entry and any(a is atom for a in atoms(entry[at])):
                sites.append(Site(reader, None, at, index_of(entry[at], atom)))
            elif tensor in normalised:  # to scale it is no gate
                return []
            else:
                sites.append(Site(None, tensor, dim, index_of(tensors[tensor][dim], atom)))
    return sites


def _input_dim(module: nn.Module) -> int | None:
    """Dimension of a layer's input that its weight is multiplied with."""
    if isinstance(module, Convolution):
        return 1
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return -1
    return None


def _pinned(tensors: dict[str, Axes], parameters: set[str]) -> list[Pinned]:
    """Parameter dimensions nothing of which can be cut, windows of convolutions aside."""
    found = []
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
            if not reason.startswith("the window of"):
                found.append(Pinned(name, dim, size_of(axis), reason))
    return found


def _cuttable(groups: dict[str, Group], parameters: dict[str, Any]) -> dict[str, int]:
    shares = {}
    for label, chosen in (
        ("exact", [g for g in groups.values() if g.exact]),
        ("all", list(groups.values())),
    ):
        touched = {member.tensor for group in chosen for member in group.members}
        shares[label] = sum(p.numel() for name, p in parameters.items() if name in touched)
    return shares
