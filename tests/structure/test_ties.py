"""Attributes and the counts they bind, against trying every combination of counts."""

import itertools

import pytest

from sosp_hub.structure import axes
from sosp_hub.structure.axes import Atom, Prod, Sum
from sosp_hub.structure.ints import Attribute, Op
from sosp_hub.structure.terms import Constraint
from sosp_hub.structure.ties import settle, solve_attributes

HEADS, WIDTH, DIM = Attribute("a", "heads"), Attribute("a", "width"), Attribute("a", "dim")


def says(expr, axis):
    return Constraint(expr, axis, "a test")


def allowed(constraints, atoms, tied):
    """Every choice of counts that pins and ties allow."""
    ranges = [[atom.size] if atom.pinned else range(1, atom.size + 1) for atom in atoms]
    for counts in itertools.product(*ranges):
        chosen = dict(zip((atom.id for atom in atoms), counts, strict=True))
        groups = {}
        for number, count in chosen.items():
            groups.setdefault(tied.get(number, number), set()).add(count)
        if all(len(found) == 1 for found in groups.values()):
            yield chosen


def check(constraints, atoms):
    """Every allowed choice of counts satisfies every constraint; gives how many are allowed."""
    tied = settle(constraints, ())
    number = 0
    factors = [factor for atom in atoms for factor in axes.atoms(atom)]
    for chosen in allowed(constraints, factors, tied):
        _, violated = solve_attributes(constraints, lambda atom: chosen[atom.id])  # noqa: B023
        assert not violated, f"{violated[0]} fails for {chosen}"
        number += 1
    return number


def test_one_attribute_is_rewritten_to_its_axis():
    atom = Atom(6)
    values, violated = solve_attributes([says(HEADS, atom)], lambda _: 4)
    assert values == {HEADS: 4}
    assert not violated
    assert check([says(HEADS, atom)], [atom]) == 6


def test_one_attribute_of_two_axes_ties_them():
    one, two = Atom(4), Atom(4)
    assert check([says(HEADS, one), says(HEADS, two)], [one, two]) == 4
    assert not one.pinned


def test_one_attribute_of_a_free_and_a_pinned_axis_pins_both():
    one, two = Atom(4), Atom(4, pinned={"an input": None})
    assert check([says(HEADS, one), says(HEADS, two)], [one, two]) == 1
    assert one.pinned


def test_width_is_heads_times_dim():
    """view(heads, dim) of a width that is an attribute of its own: two free counts."""
    heads, dim = Atom(4), Atom(3)
    constraints = [says(HEADS, heads), says(DIM, dim), says(WIDTH, Prod((heads, dim)))]
    assert check(constraints, [heads, dim]) == 12


def test_dim_computed_from_width_and_heads():
    heads, dim = Atom(4), Atom(3)
    constraints = [
        says(Op("//", WIDTH, HEADS), dim),
        says(HEADS, heads),
        says(WIDTH, Prod((heads, dim))),
    ]
    assert check(constraints, [heads, dim]) == 12


def test_width_hard_wired_to_a_residual_stream_binds_heads_and_dim():
    """heads * dim is the stream's width, a pinned one: neither can be cut alone."""
    heads, dim, stream = Atom(4), Atom(3), Atom(12, pinned={"an output": None})
    constraints = [
        says(WIDTH, stream), says(HEADS, heads), says(Op("//", WIDTH, HEADS), dim),
        says(WIDTH, Prod((heads, dim))),
    ]  # fmt: skip
    check(constraints, [heads, dim, stream])


def test_a_stream_as_wide_as_heads_times_dim_gets_their_borders():
    """``view(B, N, C)`` where C is the stream's width: as many blocks as heads, each as wide."""
    heads, dim, stream = Atom(4), Atom(3), Atom(12)
    constraints = [
        says(Op("//", stream, HEADS), dim), says(HEADS, heads), says(stream, Prod((heads, dim))),
    ]  # fmt: skip
    assert check(constraints, [heads, dim, stream]) == 12
    assert not any(atom.pinned for atom in axes.atoms(stream))


def test_two_layers_of_heads_share_a_stream():
    """Another number of heads in the second layer: the blocks are those that fit both."""
    heads, dim, more, less, stream = Atom(4), Atom(6), Atom(12), Atom(2), Atom(24)
    constraints = [says(stream, Prod((heads, dim))), says(stream, Prod((more, less)))]
    assert check(constraints, [heads, dim, more, less, stream]) == 4 * 3 * 2


def test_a_width_that_is_computed_with_gets_the_borders_too():
    """``C // heads`` channels a head, put back together by ``view(B, N, -1)``."""
    heads, dim, stream = Atom(4), Atom(3), Atom(12)
    constraints = [says(HEADS, heads), says(Op("//", stream, HEADS), dim)]
    assert check(constraints, [heads, dim, stream]) == 12


def test_halves_of_a_width_are_equally_long():
    """chunk(2): the second half is as long as the first."""
    one, two = Atom(5), Atom(5)
    assert check([says(one, two)], [one, two]) == 5


def test_a_slice_at_half_of_the_width():
    one, two = Atom(4), Atom(4)
    whole = Sum((one, two))
    assert check([says(Op("//", whole, 2), one)], [one, two]) >= 4


@pytest.mark.parametrize("multiple", [2, 3])
def test_query_heads_are_a_multiple_of_kv_heads(multiple):
    kv, copies = Atom(3), Atom(multiple)
    queries = Attribute("a", "queries")
    constraints = [
        says(HEADS, kv), says(queries, Prod((kv, copies))), says(Op("//", queries, HEADS), copies),
    ]  # fmt: skip
    assert check(constraints, [kv, copies]) == 3 * multiple


def test_a_size_used_as_a_value_is_pinned_through_its_attribute():
    atom, other = Atom(6), Atom(6)
    settle([says(WIDTH, atom), says(HEADS, other)], [(WIDTH, "the block")])
    assert list(atom.pinned) == ["the code in the block computes with its size"]
    assert not other.pinned


def test_a_size_used_as_a_value_is_pinned_through_its_axis():
    atom = Atom(6)
    settle([], [(Op("*", atom, 2), "the block")])
    assert atom.pinned
