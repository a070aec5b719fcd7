"""The axis algebra: what one tensor dimension is made of.

A dimension is an ``Atom`` (indivisible so far), a ``Prod`` (row-major factors, as ``view`` makes
them) or a ``Sum``
(pieces one after the other, as ``cat`` makes them). Operations *unify* axes that must be cut
alike; an atom that is
unified with a composite axis is bound to it, so a later discovery refines everything that was seen
before.

An atom that something unknown, a literal or an output depends on is *pinned*: it keeps all its
structures.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import numpy as np
from numpy.typing import NDArray

_ids = itertools.count()


@dataclass(eq=False, slots=True)
class Atom:
    """An indivisible axis; one union-find node. Facts are read from the root only."""

    size: int
    pinned: dict[str, None] = field(default_factory=dict)
    inexact: dict[str, None] = field(default_factory=dict)
    roles: set[str] = field(default_factory=set)
    multiple: int = 1
    barred: set[int] = field(default_factory=set)
    parent: "Axis | None" = None
    id: int = field(default_factory=_ids.__next__)


@dataclass(frozen=True, eq=False, slots=True)
class Prod:
    """Row-major product: the first factor varies slowest."""

    factors: tuple["Axis", ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """What an atom is found to be made of is as long as it, so that this size stays."""
        object.__setattr__(self, "size", prod(factor.size for factor in self.factors))


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """Concatenation of pieces."""

    parts: tuple["Axis", ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """As long as its parts together."""
        object.__setattr__(self, "size", sum(part.size for part in self.parts))


Axis = Atom | Prod | Sum
UNIT = Prod(())


def fixed(size: int, reason: str) -> Axis:
    """A new axis that nothing may cut."""
    return UNIT if size == 1 else Atom(size, pinned={reason: None})


def free(size: int) -> Axis:
    """A new axis about which nothing is known yet."""
    return UNIT if size == 1 else Atom(size)


def size_of(axis: Axis, count: Callable[[Atom], int] | None = None) -> int:
    """Length of an axis: dense, or with ``count`` structures left of each root atom."""
    if count is None:
        return axis.size
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return count(axis)
    if isinstance(axis, Prod):
        return prod(size_of(factor, count) for factor in axis.factors)
    return sum(size_of(part, count) for part in axis.parts)


def resolve(axis: Axis) -> Axis:
    """Canonical form: root atoms only, nested products and sums flattened."""
    if isinstance(axis, Atom):
        return _root(axis)
    if isinstance(axis, Prod):
        if not axis.factors:
            return UNIT
        if len(axis.factors) > 1 and all(map(_is_root, axis.factors)):
            return axis
        factors: list[Axis] = []
        for factor in axis.factors:
            factor = resolve(factor)
            factors.extend(factor.factors if isinstance(factor, Prod) else (factor,))
        return factors[0] if len(factors) == 1 else Prod(tuple(factors))
    if len(axis.parts) > 1 and all(map(_is_root, axis.parts)):
        return axis
    parts: list[Axis] = []
    for part in axis.parts:
        part = resolve(part)
        parts.extend(part.parts if isinstance(part, Sum) else (part,))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _is_root(axis: Axis) -> bool:
    return type(axis) is Atom and axis.parent is None


def _root(atom: Atom) -> Axis:
    node: Axis = atom
    while isinstance(node, Atom) and node.parent is not None:
        node = node.parent
    if isinstance(node, Atom):
        while atom is not node and atom.parent is not node:  # path compression
            atom.parent, atom = node, atom.parent  # type: ignore[assignment]
        return node
    return resolve(node)


def atoms(axis: Axis) -> Iterator[Atom]:
    """Root atoms of an axis, in order, with repetitions."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        yield axis
    else:
        for inner in axis.factors if isinstance(axis, Prod) else axis.parts:
            yield from atoms(inner)


def pin(axis: Axis, reason: str) -> None:
    """Nothing of this axis may be cut."""
    for atom in atoms(axis):
        atom.pinned.setdefault(reason)


def flag(axis: Axis, reason: str) -> None:
    """Cutting this axis is legal but does not equal masking it."""
    for atom in atoms(axis):
        atom.inexact.setdefault(reason)


def mark(axis: Axis, role: str) -> None:
    """Remembers what an axis is used as (``head``, ``stream``, ...)."""
    for atom in atoms(axis):
        atom.roles.add(role)


def is_fixed(axis: Axis) -> bool:
    """Whether every atom of the axis is pinned."""
    return all(atom.pinned for atom in atoms(axis))


def unify(one: Axis, two: Axis, why: str) -> None:
    """Makes two axes the same one; where nothing refines both, both are pinned."""
    one, two = resolve(one), resolve(two)
    if one is two:
        return
    if size_of(one) != size_of(two):
        raise AssertionError(
            f"{why}: axes of sizes {size_of(one)} and {size_of(two)} cannot be the same"
        )
    if isinstance(one, Atom):
        _bind(one, two, why)
    elif isinstance(two, Atom):
        _bind(two, one, why)
    elif isinstance(one, Sum) and isinstance(two, Sum):
        _align(list(one.parts), list(two.parts), why)
    elif isinstance(one, Prod) and isinstance(two, Prod):
        _refine(list(one.factors), list(two.factors), why)
    else:
        whole, pieces = (one, two) if isinstance(one, Prod) else (two, one)
        assert isinstance(whole, Prod)
        if not whole.factors:
            return
        halves = split(pieces, size_of(whole.factors[0]), why)
        if halves is None:
            _give_up(one, two, why)
        else:
            unify(halves[0], whole.factors[0], why)
            unify(halves[1], Prod(whole.factors[1:]), why)


def _bind(atom: Atom, axis: Axis, why: str) -> None:
    if not isinstance(axis, Atom) and any(inner is atom for inner in atoms(axis)):
        _give_up(atom, axis, why)
        return
    atom.parent = axis
    for inner in atoms(axis):
        inner.pinned.update(atom.pinned)
        inner.inexact.update(atom.inexact)
        inner.roles |= atom.roles
        inner.multiple = max(inner.multiple, atom.multiple)


def _give_up(one: Axis, two: Axis, why: str) -> None:
    pin(one, why)
    pin(two, why)


def _refine(ones: list[Axis], twos: list[Axis], why: str) -> None:
    """Unifies two factor lists of equal product, splitting the longer leading factor each time."""
    _match(ones, twos, lambda factor, lead: split(factor, lead, why), Prod, why)


def _align(ones: list[Axis], twos: list[Axis], why: str) -> None:
    """Unifies two piece lists of equal length, cutting the longer leading piece each time.

    Where borders differ and nothing on either side may be cut, there is nothing to learn: positions
    of a text beside the same ones shifted by one would become pieces of length one.
    """
    borders = [list(accumulate(map(size_of, parts))) for parts in (ones, twos)]
    if borders[0] != borders[1] and is_fixed(Sum(tuple(ones))) and is_fixed(Sum(tuple(twos))):
        return
    _match(ones, twos, cut_at, Sum, why)


def _match(
    ones: list[Axis],
    twos: list[Axis],
    divide: Callable[[Axis, int], Sequence[Axis] | None],
    whole: type[Prod] | type[Sum],
    why: str,
) -> None:
    """Unifies leading parts of equal size; ``divide`` makes the longer one as long as the other."""
    while ones and twos:
        one, two = ones[0], twos[0]
        if size_of(one) == size_of(two):
            del ones[0], twos[0]
            unify(one, two, why)
            continue
        longer, shorter = (ones, two) if size_of(one) > size_of(two) else (twos, one)
        parts = divide(longer[0], size_of(shorter))
        if parts is None:
            _give_up(whole(tuple(ones)), whole(tuple(twos)), why)
            return
        longer[:1] = parts


def split(axis: Axis, lead: int, why: str) -> tuple[Axis, Axis] | None:
    """The axis as a product of ``lead`` and the rest, or None where it is not one."""
    axis = resolve(axis)
    if lead == 1:
        return UNIT, axis
    if lead == axis.size:
        return axis, UNIT
    if axis.size % lead:
        return None
    halves = _split(axis, lead, why)
    if halves is None and is_fixed(axis):  # of pieces that nothing cuts there is nothing to learn
        return fixed(lead, why), fixed(axis.size // lead, why)
    return halves


def _split(axis: Axis, lead: int, why: str) -> tuple[Axis, Axis] | None:
    inner = size_of(axis) // lead
    if isinstance(axis, Atom):
        halves = (Atom(lead), Atom(inner))
        _bind(axis, Prod(halves), why)
        return halves
    if isinstance(axis, Prod):
        done: list[Axis] = []
        rest = list(axis.factors)
        while lead > 1:
            factor = rest.pop(0)
            length = size_of(factor)
            if lead % length == 0:
                done.append(factor)
                lead //= length
            else:
                halves = split(factor, lead, why)
                if halves is None:
                    return None
                done.append(halves[0])
                rest.insert(0, halves[1])
                lead = 1
        return Prod(tuple(done)), Prod(tuple(rest))
    if any(size_of(part) % inner for part in axis.parts):
        return None
    pairs = [split(part, size_of(part) // inner, why) for part in axis.parts]
    if any(pair is None for pair in pairs):
        return None
    for pair in pairs[1:]:
        unify(pairs[0][1], pair[1], why)  # type: ignore[index]
    return Sum(tuple(pair[0] for pair in pairs)), pairs[0][1]  # type: ignore[index]


def paired(one: Axis, two: Axis) -> list[tuple[Atom, Atom]]:
    """Factors of two equally long axes side by side; an atom gets the borders of the other axis.

    Borders of factors, not those of pieces alone: pieces would be groups that are cut alike. In a
    stream that holds heads whose halves are exchanged by a rotation they are, as in those heads.
    Empty where the borders do not fit.
    """
    one, two = resolve(one), resolve(two)
    if isinstance(one, Sum) and not isinstance(two, Atom):
        return _paired_pieces(one, two)
    if isinstance(two, Sum) and not isinstance(one, Atom):
        return _paired_pieces(two, one)
    ones, twos = _factors(one), _factors(two)
    pairs: list[tuple[Atom, Atom]] = []
    while ones and twos:
        first, second = ones[0], twos[0]
        if size_of(first) == size_of(second):
            del ones[0], twos[0]
            if _repeats(second) and isinstance(first, Atom) and "stream" in first.roles:
                first = _bind_like(first, second)
            elif _repeats(first) and isinstance(second, Atom) and "stream" in second.roles:
                second = _bind_like(second, first)
            if isinstance(first, Atom) and isinstance(second, Atom):
                pairs.append((first, second))
            elif _repeats(first) and _repeats(second) and _sizes(first) == _sizes(second):
                pairs += dict.fromkeys(zip(atoms(first), atoms(second), strict=True))
            elif [atom.id for atom in atoms(first)] != [atom.id for atom in atoms(second)]:
                return []
            continue
        longer, shorter = (ones, twos) if size_of(first) > size_of(second) else (twos, ones)
        whole = longer[0]
        halves = split(whole, size_of(shorter[0]), "") if isinstance(whole, Atom) else None
        if halves is None:
            return []
        longer[:1] = halves
    return pairs


def _repeats(axis: Axis) -> bool:
    """Whether it consists of equal pieces."""
    parts = axis.parts if isinstance(axis, Sum) else ()
    return len({tuple(atom.id for atom in atoms(part)) for part in parts}) == 1


def _sizes(axis: Axis) -> list[int]:
    return [atom.size for atom in atoms(axis)]


def _bind_like(atom: Atom, axis: Axis) -> Axis:
    """Makes an atom of new ones as the axis is made of its own."""
    new: dict[int, Atom] = {}

    def like(axis: Axis) -> Axis:
        if isinstance(axis, Prod):
            return Prod(tuple(map(like, axis.factors)))
        if isinstance(axis, Sum):
            return Sum(tuple(map(like, axis.parts)))
        return new.setdefault(axis.id, Atom(axis.size))

    _bind(atom, like(resolve(axis)), "")
    return resolve(atom)


def _paired_pieces(whole: Sum, other: Axis) -> list[tuple[Atom, Atom]]:
    """`paired` for pieces one after the other and an axis that borders are drawn in."""
    pairs: list[tuple[Atom, Atom]] = []
    for part in whole.parts[:-1]:
        pieces = cut_at(other, size_of(part))
        found = [] if pieces is None else paired(part, pieces[0])
        if pieces is None or not found:
            return []
        pairs += found
        other = pieces[1]
    return [*pairs, *paired(whole.parts[-1], other)]


def _factors(axis: Axis) -> list[Axis]:
    axis = resolve(axis)
    return list(axis.factors) if isinstance(axis, Prod) else [axis]


def cut_at(axis: Axis, position: int) -> tuple[Axis, Axis] | None:
    """The axis as two pieces with the border at ``position``, or None where none can be drawn."""
    axis = resolve(axis)
    size = size_of(axis)
    assert 0 < position < size
    if isinstance(axis, Atom):
        pieces = (free(position), free(size - position))
        reasons, flags, roles = axis.pinned, axis.inexact, axis.roles
        for piece in pieces:
            for atom in atoms(piece):
                atom.pinned.update(reasons)
                atom.inexact.update(flags)
                atom.roles |= roles
                atom.multiple = axis.multiple
        axis.parent = Sum(pieces)
        return pieces
    if isinstance(axis, Prod):
        inner = Prod(axis.factors[1:])
        if position % size_of(inner):
            return None
        pieces = cut_at(axis.factors[0], position // size_of(inner))
        return None if pieces is None else (Prod((pieces[0], inner)), Prod((pieces[1], inner)))
    before: list[Axis] = []
    rest = list(axis.parts)
    while position > 0:
        part = rest.pop(0)
        length = size_of(part)
        if length <= position:
            before.append(part)
            position -= length
        else:
            pieces = cut_at(part, position)
            if pieces is None:
                return None
            before.append(pieces[0])
            rest.insert(0, pieces[1])
            position = 0
    return Sum(tuple(before)), Sum(tuple(rest))


def keep_mask(axis: Axis, kept: Mapping[int, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Which positions of an axis stay; ``kept`` maps the id of a root atom to its keep mask."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        mask = kept.get(axis.id)
        return np.ones(axis.size, bool) if mask is None else mask
    if isinstance(axis, Prod):
        mask = np.ones(1, bool)
        for factor in axis.factors:
            mask = np.logical_and.outer(mask, keep_mask(factor, kept)).ravel()
        return mask
    return np.concatenate([keep_mask(part, kept) for part in axis.parts])


def sources(axis: Axis, chosen: Mapping[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Which position of an axis each position of the new one comes from.

    ``chosen`` maps the id of a root atom to the structure that each of its new ones comes from:
    left out, or taken more than once.
    """
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return chosen.get(axis.id, np.arange(axis.size))
    if isinstance(axis, Prod):
        positions = np.zeros(1, np.int64)
        for factor in axis.factors:
            positions = np.add.outer(positions * size_of(factor), sources(factor, chosen)).ravel()
        return positions
    starts = np.cumsum([0, *(size_of(part) for part in axis.parts)])
    return np.concatenate(
        [start + sources(part, chosen) for start, part in zip(starts, axis.parts, strict=False)]
    )


def index_of(axis: Axis, atom: Atom) -> NDArray[np.int64]:
    """For each position of an axis the structure of ``atom`` it belongs to, or -1."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return np.arange(axis.size) if axis is atom else np.full(axis.size, -1)
    if isinstance(axis, Prod):
        index = np.full(1, -1)
        for factor in axis.factors:
            index = np.maximum.outer(index, index_of(factor, atom)).ravel()
        return index
    return np.concatenate([index_of(part, atom) for part in axis.parts])
