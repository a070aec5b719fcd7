"""Attributes and the counts they bind, against trying every combination of counts."""

import itertools

import pytest

from sosp_hub.errors import TraceError
from sosp_hub.structure import axes, constraint_solver
from sosp_hub.structure.axes import UNIT, Atom, Prod, Sum, fixed, size_of
from sosp_hub.structure.constraint_solver import settle, solve_attributes
from sosp_hub.structure.terms import Constraint
from sosp_hub.structure.traced_int import Attribute, Op, attributes

HEADS, WIDTH, DIM = Attribute("a", "heads"), Attribute("a", "width"), Attribute("a", "dim")
BEFORE = Attribute("a", "before", dense=4)


def says(expr, axis):
    return Constraint(expr, axis, "a test")


def allowed(constraints, atoms, tied):
    """Every choice of counts that pins and ties allow."""
    ranges = [
        [atom.size] if atom.pinned else [n for n in range(1, atom.size + 1) if n not in atom.barred]
        for atom in atoms
    ]
    for counts in itertools.product(*ranges):
        chosen = dict(zip((atom.id for atom in atoms), counts, strict=True))
        groups = {}
        for number, count in chosen.items():
            groups.setdefault(tied.get(number, number), set()).add(count)
        if all(len(found) == 1 for found in groups.values()):
            yield chosen


def check(constraints, atoms, comparisons=()):
    """Every allowed choice of counts satisfies every constraint; gives how many are allowed."""
    tied = settle(constraints, (), comparisons)
    number = 0
    factors = {factor.id: factor for atom in atoms for factor in axes.atoms(atom)}.values()
    for chosen in allowed(constraints, factors, tied):
        everything = [*constraints, *comparisons]
        _, violated = solve_attributes(everything, lambda atom: chosen[atom.id])  # noqa: B023
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


def test_a_stream_gets_the_borders_of_halves_that_a_rotation_exchanges():
    """Both halves of a head are cut alike, so those of a block of the stream may be as well."""
    heads, pair, stream = Atom(3), Atom(2), Atom(24, roles={"stream"})
    rows = fixed(2, "rows and columns")
    half = Prod((rows, pair))
    constraints = [says(stream, Prod((heads, Sum((half, half)))))]
    assert check(constraints, [heads, rows, pair, stream]) == 6
    assert size_of(stream, lambda atom: {3: 1}.get(atom.size, atom.size)) == 8
    assert {atom.size for atom in axes.atoms(stream) if not atom.pinned} == {3, 2}


def test_blocks_of_two_streams_of_halves_are_told_apart():
    """One of four halves, the other of halves of two pieces: no borders fit both."""
    heads, quarter, pair, more = Atom(3), Atom(2), Atom(2), Atom(2)
    stream = Atom(24, roles={"stream"})
    constraints = [
        says(stream, Prod((heads, Sum((quarter,) * 4)))),
        says(stream, Prod((heads, Sum((Prod((pair, more)),) * 2)))),
    ]
    assert check(constraints, [heads, quarter, pair, more, stream])


def test_two_layers_of_heads_share_a_stream():
    """Another number of heads in the second layer: the blocks are those that fit both."""
    heads, dim, more, less, stream = Atom(4), Atom(6), Atom(12), Atom(2), Atom(24)
    constraints = [says(stream, Prod((heads, dim))), says(stream, Prod((more, less)))]
    assert check(constraints, [heads, dim, more, less, stream]) == 4 * 3 * 2


def test_a_stream_of_two_pieces_gets_the_borders_of_heads_and_dim():
    """As many heads in the first piece as it has blocks; the blocks of both are equally wide."""
    heads, dim, one, two = Atom(4), Atom(3), Atom(6), Atom(6)
    stream = Sum((one, two))
    constraints = [says(stream, Prod((heads, dim))), says(HEADS, heads)]
    assert check(constraints, [heads, dim, one, two]) == 2 * 2 * 3
    assert not any(atom.pinned for atom in axes.atoms(stream))


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


# --- constraints with several unknown attributes ---

PATHS = Attribute("a", "paths", dense=3)


def test_of_two_unknown_attributes_one_stays_as_it_is():
    """reshape(B, paths * dim): only dim is the size of anything cuttable."""
    part, three = Atom(8), Atom(3, pinned={"a literal": None})
    dim = Attribute("a", "dim", dense=8)
    constraint = says(Op("*", PATHS, dim), Prod((three, part)))
    assert check([constraint], [part, three]) == 8
    values, _ = solve_attributes([constraint], lambda atom: 3 if atom.pinned else 5)
    assert values == {PATHS: 3, dim: 5}


def test_two_unknown_attributes_that_no_change_of_one_satisfies_pin():
    """A width of 24 = 3 * 8 of which 7 are left: neither 3 nor 8 can stay."""
    atom = Atom(24)
    dim = Attribute("a", "dim", dense=8)
    assert check([says(Op("*", PATHS, dim), atom)], [atom]) == 1
    assert atom.pinned


# --- comparisons ---


def true(symbol, left, right):
    return says(Op(symbol, left, right), UNIT)


def test_sizes_that_contradict_each_other_are_refused():
    """The search for pins would go on for ever."""
    constraints = [says(HEADS, Atom(4)), says(HEADS, fixed(4, "a test")), says(HEADS, fixed(6, ""))]
    with pytest.raises(TraceError, match=r"contradict each other in a test: .* is to be 6 there"):
        settle(constraints, ())


def test_a_count_that_would_flip_a_branch_is_barred():
    """if self.heads > 2: ..."""
    atom = Atom(6)
    assert check([says(HEADS, atom)], [atom], [true(">", HEADS, 2)]) == 4
    assert atom.barred == {1, 2}
    assert not atom.pinned


def test_a_width_does_not_become_one_that_it_is_compared_with_and_no_cut_changes():
    """if self.before != self.width: project; what was before is a number that nothing uses."""
    atom = Atom(6)
    assert check([says(WIDTH, atom)], [atom], [true("!=", BEFORE, WIDTH)]) == 5
    assert atom.barred == {4}


def test_two_widths_that_differ_may_differ_otherwise():
    wide, narrow = Atom(6), Atom(4)
    says_both = [says(WIDTH, wide), says(HEADS, narrow)]
    settle(says_both, (), [true("!=", WIDTH, HEADS)])
    assert [atom.barred or atom.pinned for atom in (wide, narrow)] == [{}, {}]


def test_a_group_is_pinned_where_every_count_flips_a_branch():
    """if self.radix > 1: softmax, else: sigmoid; the radix is two."""
    atom = Atom(2)
    assert check([says(HEADS, atom)], [atom], [true(">", HEADS, 1)]) == 1
    assert list(atom.pinned) == ["its size decides a test"]


def test_a_comparison_that_no_count_can_flip_costs_nothing():
    atom = Atom(6)
    comparisons = [true(">", HEADS, 0), true("!=", Op("*", HEADS, 4), 3), true("<", HEADS, 9)]
    assert check([says(HEADS, atom)], [atom], comparisons) == 6


def test_a_width_that_must_stay_a_multiple():
    """assert width % 4 == 0"""
    atom = Atom(12)
    assert check([says(WIDTH, atom)], [atom], [says(Op("==", Op("%", WIDTH, 4), 0), UNIT)]) == 3


def test_two_counts_that_decide_a_branch_together():
    """if narrow > wide: ..., between two free widths."""
    wide, narrow = Atom(6), Atom(4)
    assert check([], [wide, narrow], [true(">", wide, narrow)]) >= 1


def test_of_several_counts_that_must_not_all_be_one_the_largest_is_not():
    """Weights of one column in all cannot be standardised."""
    groups, width = Atom(4), Atom(8)
    more_than_one = true(">", Op("*", groups, width), 1)
    assert check([], [groups, width], [more_than_one]) == 4 * 7
    assert (groups.barred, width.barred) == (set(), {1})


def test_a_repeat_factor_may_become_one():
    copies = Atom(4, roles={"copies"})
    settle([says(HEADS, copies)], (), [true(">", HEADS, 1)])
    assert not copies.barred


def test_copies_among_which_a_choice_is_made_are_not_too_few():
    """scores.view(-1, groups, -1).topk(2), after a mask of the groups was expanded to it."""
    copies = Atom(4, roles={"copies"})
    assert check([says(HEADS, copies)], [copies], [true(">=", HEADS, 2)]) == 3


def work_of(monkeypatch, layers):
    """How many expressions are taken apart for so many layers, each with a tie and a choice."""
    constraints, comparisons = [], []
    for i in range(layers):
        heads, width = Attribute(f"{i}", "heads"), Attribute(f"{i}", "width")
        one, two, whole = Atom(4), Atom(4), Atom(8)
        constraints += [says(heads, one), says(heads, two), says(Op("*", heads, width), whole)]
        comparisons.append(says(Op(">", heads, 1), UNIT))
    count = itertools.count()
    monkeypatch.setattr(
        constraint_solver, "attributes", lambda expr: (next(count), attributes(expr))[1]
    )
    settle(constraints, [(Op("*", Attribute("0", "heads"), 2), "a test")], comparisons)
    return next(count)


def test_work_does_not_grow_with_the_square_of_the_number_of_layers(monkeypatch):
    """Eight times the layers, and up to four times the draws until all of them hold."""
    assert work_of(monkeypatch, 320) < 32 * work_of(monkeypatch, 40)
