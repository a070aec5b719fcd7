"""The axis algebra against brute force: an axis is a row of positions; a cut says which stay."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sosp_hub.structure.axes import (
    UNIT,
    Atom,
    Prod,
    Sum,
    atoms,
    cut_at,
    fixed,
    flag,
    free,
    index_of,
    is_fixed,
    keep_mask,
    mark,
    pin,
    resolve,
    size_of,
    sources,
    split,
    unify,
)

# --- brute force ---


def positions(axis):
    """For each position of an axis what it is made of: a set of (atom id, structure)."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [frozenset({(axis.id, i)}) for i in range(axis.size)]
    if isinstance(axis, Prod):
        rows = [positions(factor) for factor in axis.factors]
        return [frozenset().union(*chosen) for chosen in itertools.product(*rows)]
    return [position for part in axis.parts for position in positions(part)]


def random_cut(axes, seed):
    """Keep masks by atom id; pinned atoms stay whole, others lose a random part."""
    generator = random.Random(seed)
    kept = {}
    for atom in {atom.id: atom for axis in axes for atom in atoms(axis)}.values():
        if not atom.pinned:
            mask = np.array([generator.random() < 0.6 for _ in range(atom.size)])
            mask[generator.randrange(atom.size)] = True
            kept[atom.id] = mask
    return kept


def stays(axis, kept):
    """The brute-force keep mask."""
    return np.array(
        [all(atom not in kept or kept[atom][i] for atom, i in made) for made in positions(axis)]
    )


def build(recipe, pool):
    """An axis from nested data: ("atom", number), ("prod", ...) or ("sum", ...)."""
    kind, *rest = recipe
    if kind == "atom":
        return pool[rest[0]]
    inner = tuple(build(item, pool) for item in rest)
    return Prod(inner) if kind == "prod" else Sum(inner)


_SIZES = (2, 2, 3, 3, 4, 6, 6, 12)
_RECIPES = st.recursive(
    st.integers(0, len(_SIZES) - 1).map(lambda number: ("atom", number)),
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map(lambda items: ("prod", *items))
        | st.lists(inner, min_size=2, max_size=3).map(lambda items: ("sum", *items))
    ),
    max_leaves=4,
)


def pool():
    return [Atom(size) for size in _SIZES]


# --- properties ---


@given(_RECIPES, st.integers(0, 99))
def test_keep_mask_size_and_index_follow_from_the_positions(recipe, seed):
    axis = build(recipe, pool())
    kept = random_cut([axis], seed)
    expected = stays(axis, kept)
    np.testing.assert_array_equal(keep_mask(axis, kept), expected)
    assert size_of(axis) == len(expected)
    if len({(a.id, i) for i, a in enumerate(atoms(axis))}) == len(list(atoms(axis))):
        counts = {number: int(mask.sum()) for number, mask in kept.items()}
        assert size_of(axis, lambda atom: counts.get(atom.id, atom.size)) == product_size(
            axis, counts
        )
    for atom in set(atoms(axis)):
        made = [sorted(i for number, i in made if number == atom.id) for made in positions(axis)]
        if all(len(structures) <= 1 for structures in made):  # no factor of itself
            expected_index = [structures[0] if structures else -1 for structures in made]
            np.testing.assert_array_equal(index_of(axis, atom), expected_index)


@given(_RECIPES, st.integers(0, 99))
def test_sources_are_kept_positions_and_copies(recipe, seed):
    axis = build(recipe, pool())
    assume(not has_square(axis))
    kept = random_cut([axis], seed)
    chosen = {number: np.flatnonzero(mask) for number, mask in kept.items()}
    np.testing.assert_array_equal(sources(axis, chosen), np.flatnonzero(stays(axis, kept)))
    copies = {a.id: np.repeat(np.arange(a.size), 2 + np.arange(a.size) % 2) for a in atoms(axis)}
    number = [
        np.prod([2 + i % 2 for _, i in made] or [1], dtype=int) for made in positions(axis)
    ]  # each position is there as often as all its structures together
    np.testing.assert_array_equal(np.bincount(sources(axis, copies)), number)


def product_size(axis, counts):
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return counts.get(axis.id, axis.size)
    inner = [
        product_size(i, counts) for i in (axis.factors if isinstance(axis, Prod) else axis.parts)
    ]
    return int(np.prod(inner)) if isinstance(axis, Prod) else sum(inner)


@settings(max_examples=150)
@given(st.lists(st.tuples(_RECIPES, _RECIPES), min_size=1, max_size=6), st.integers(0, 99))
def test_unified_axes_are_cut_alike_ever_after(pairs, seed):
    """Whatever else is unified later, both sides of every pair keep the same positions."""
    shared = pool()
    made = [(build(one, shared), build(two, shared)) for one, two in pairs]
    made = [(one, two) for one, two in made if size_of(one) == size_of(two)]
    for one, two in made:
        unify(one, two, "a test")
    kept = random_cut([axis for pair in made for axis in pair], seed)
    for one, two in made:
        assert size_of(one) == size_of(two)
        if not has_square(one) and not has_square(two):
            np.testing.assert_array_equal(keep_mask(one, kept), keep_mask(two, kept))
            np.testing.assert_array_equal(keep_mask(one, kept), stays(two, kept))


def has_square(axis):
    """Whether an atom is a factor of itself; such atoms are pinned before any cut."""
    return any(len({number for number, _ in made}) < len(made) for made in positions(axis))


@settings(max_examples=100)
@given(
    _RECIPES,
    st.integers(1, 12),
    st.lists(st.tuples(_RECIPES, _RECIPES), max_size=3),
    st.integers(0, 99),
)
def test_a_split_axis_is_the_product_of_its_halves(recipe, lead, pairs, seed):
    shared = pool()
    axis = build(recipe, shared)
    for one, two in pairs:
        one, two = build(one, shared), build(two, shared)
        if size_of(one) == size_of(two):
            unify(one, two, "a test")
    size = size_of(axis)
    halves = split(axis, lead, "a test")
    assert size_of(axis) == size
    if halves is None:
        return
    assert (size_of(halves[0]), size_of(halves[1])) == (lead, size // lead)
    kept = random_cut([axis, *halves], seed)
    expected = np.logical_and.outer(keep_mask(halves[0], kept), keep_mask(halves[1], kept)).ravel()
    np.testing.assert_array_equal(keep_mask(axis, kept), expected)


@settings(max_examples=100)
@given(_RECIPES, st.integers(1, 40), st.integers(0, 99))
def test_an_axis_with_a_border_is_the_sum_of_its_pieces(recipe, position, seed):
    axis = build(recipe, pool())
    if not 0 < position < size_of(axis):
        return
    pieces = cut_at(axis, position)
    if pieces is None:
        return
    assert size_of(pieces[0]) == position
    kept = random_cut([axis, *pieces], seed)
    expected = np.concatenate([keep_mask(piece, kept) for piece in pieces])
    np.testing.assert_array_equal(keep_mask(axis, kept), expected)


@given(st.lists(st.tuples(_RECIPES, _RECIPES), min_size=1, max_size=5), st.integers(0, 7))
def test_facts_survive_unification(pairs, number):
    """A pinned atom stays pinned and a flagged one flagged, whatever it is bound to."""
    shared = pool()
    shared[number].pinned.setdefault("a literal")
    shared[number].inexact.setdefault("a mean")
    mark(shared[number], "head")
    shared[number].multiple = 4
    for one, two in pairs:
        one, two = build(one, shared), build(two, shared)
        if size_of(one) == size_of(two):
            unify(one, two, "a test")
    for atom in atoms(shared[number]):
        assert "a literal" in atom.pinned
        assert "a mean" in atom.inexact
        assert "head" in atom.roles
        assert atom.multiple == 4, "a kernel takes no other numbers"


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("sizes", [(12,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", [Prod, Sum])
def test_facts_reach_all_that_an_axis_becomes(kind, sizes, flipped):
    """Drawn pairs seldom have equal sizes; these have."""
    axis = Atom(
        math.prod(sizes) if kind is Prod else sum(sizes),
        pinned={"a literal": None}, inexact={"a mean": None}, multiple=4,
    )  # fmt: skip
    mark(axis, "head")
    other = kind(tuple(map(Atom, sizes)))
    unify(*((other, axis) if flipped else (axis, other)), "a test")
    assert len(list(atoms(axis))) == len(sizes)
    for atom in atoms(axis):
        assert (atom.pinned, atom.inexact) == ({"a literal": None}, {"a mean": None})
        assert atom.roles == {"head"}
        assert atom.multiple == 4, "a kernel takes no other numbers"


def test_facts_survive_a_border():
    """What holds of an axis holds of its pieces, as where gate and up come out of one product."""
    axis = Atom(12, pinned={"a literal": None}, inexact={"a mean": None}, multiple=4)
    mark(axis, "head")
    for piece in cut_at(axis, 8):
        (atom,) = atoms(piece)
        assert (atom.pinned, atom.inexact) == ({"a literal": None}, {"a mean": None})
        assert atom.roles == {"head"}
        assert atom.multiple == 4


# --- what coverage depends on: nothing is pinned without need ---


def test_an_atom_becomes_what_it_is_unified_with():
    whole, heads, width = Atom(12), Atom(3), Atom(4)
    unify(whole, Prod((heads, width)), "a view")
    assert [atom.id for atom in atoms(whole)] == [heads.id, width.id]
    assert not heads.pinned
    assert not width.pinned


def test_two_views_of_one_axis_meet_in_their_common_refinement():
    """(4, 6) and (8, 3) of 24 positions: factors 4, 2, 3."""
    one, two = Prod((Atom(4), Atom(6))), Prod((Atom(8), Atom(3)))
    unify(one, two, "views")
    assert [atom.size for atom in atoms(one)] == [4, 2, 3]
    assert not is_fixed(one)
    assert [a.id for a in atoms(one)] == [a.id for a in atoms(two)]


def test_views_without_a_common_refinement_are_pinned():
    one, two = Prod((Atom(4), Atom(3))), Prod((Atom(3), Atom(4)))
    unify(one, two, "views")
    assert is_fixed(one)
    assert is_fixed(two)


def test_two_concatenations_meet_at_all_borders():
    one, two = Sum((Atom(3), Atom(5))), Sum((Atom(4), Atom(4)))
    unify(one, two, "cat")
    assert [atom.size for atom in atoms(one)] == [3, 4]  # and a single position, which is never cut
    np.testing.assert_array_equal(
        keep_mask(one, {a.id: np.arange(a.size) > 0 for a in atoms(one) if a.size > 1}),
        keep_mask(two, {a.id: np.arange(a.size) > 0 for a in atoms(two) if a.size > 1}),
    )


def test_equal_pieces_of_a_fused_projection_share_their_inner_factors():
    """q, k, v after one another, seen as (3, heads, width): the three pieces become one."""
    q, k, v = Atom(8), Atom(8), Atom(8)
    heads, width = Atom(2), Atom(4)
    unify(Sum((q, k, v)), Prod((Atom(3), heads, width)), "fused qkv")
    assert {atom.id for axis in (q, k, v) for atom in atoms(axis)} == {heads.id, width.id}
    assert not heads.pinned


def test_an_axis_that_would_contain_itself_is_pinned():
    whole, half = Atom(4), Atom(2)
    unify(whole, Prod((Atom(2), half)), "a view")
    shifted = Sum((fixed(2, "padding"), whole))
    longer = Atom(6)
    unify(longer, shifted, "one step")
    unify(longer, Sum((whole, fixed(2, "padding"))), "a shift of itself")
    kept = random_cut([longer], 0)
    np.testing.assert_array_equal(keep_mask(longer, kept), keep_mask(shifted, kept))
    assert is_fixed(longer)


def test_sizes_that_differ_are_a_defect_of_the_rule():
    with pytest.raises(AssertionError, match="3 and 4"):
        unify(Atom(3), Atom(4), "a rule")


def test_a_unit_axis_has_nothing_to_cut():
    assert resolve(free(1)) is UNIT
    assert fixed(1, "one") is UNIT
    assert size_of(UNIT) == 1
    np.testing.assert_array_equal(keep_mask(UNIT, {}), [True])


def test_pin_and_flag_reach_every_atom_of_an_axis():
    axis = Sum((Prod((Atom(2), Atom(3))), Atom(4)))
    flag(axis, "a mean")
    assert not is_fixed(axis)
    pin(axis, "a literal")
    assert is_fixed(axis)
    assert all(list(atom.inexact) == ["a mean"] for atom in atoms(axis))
