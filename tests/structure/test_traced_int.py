"""Traced ints against plain ints, and the solver against trying every number."""

import copy
import math
import operator

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sosp_hub.structure.axes import Atom, Prod
from sosp_hub.structure.traced_int import (
    Attribute,
    Listener,
    Op,
    TracedInt,
    attributes,
    evaluate,
    expr_atoms,
    listening,
    solve,
)

WIDTH, HEADS = Attribute("layer", "width"), Attribute("layer", "heads")
_OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul,
    "//": operator.floordiv, "%": operator.mod,
}  # fmt: skip


@pytest.fixture
def told():
    """What a listener hears: sizes used as values, pairs found equal, and other truths."""
    leaks, equals, truths = [], [], []
    with listening(Listener(leaks.append, lambda *pair: equals.append(pair), truths.append)):
        yield leaks, equals, truths


@pytest.mark.parametrize("symbol", _OPERATIONS)
@given(one=st.integers(1, 50), two=st.integers(1, 50))
def test_arithmetic_gives_the_same_number_and_remembers_how(symbol, one, two):
    apply = _OPERATIONS[symbol]
    for left, right in ((TracedInt(one, WIDTH), two), (one, TracedInt(two, WIDTH))):
        result = apply(left, right)
        assert result == apply(one, two)
        assert isinstance(result, TracedInt)
        value = one if left is not one else two
        assert evaluate(result.expr, {WIDTH: value}, size) == result
    both = apply(TracedInt(one, WIDTH), TracedInt(two, HEADS))
    assert both == evaluate(both.expr, {WIDTH: one, HEADS: two}, size) == apply(one, two)


def size(atom):
    return atom.size


def test_a_negative_size_is_remembered_too():
    result = -TracedInt(6, WIDTH)
    assert result == -6
    assert evaluate(result.expr, {WIDTH: 4}, size) == -4


@pytest.mark.parametrize(
    ("use", "then"),
    [
        (int, 4), (lambda n: int(n / 0.5), 8), (lambda n: int(n * 0.5), 2),
        (lambda n: int(n / 2), 2), (lambda n: int(n * 1.5), 6), (lambda n: math.floor(n / 4), 1),
        (lambda n: int(n / TracedInt(2, HEADS)), 2),
    ],
)  # fmt: skip
def test_a_size_that_becomes_a_plain_number_is_remembered(use, then):
    """Floats in between are no use as a value."""
    leaks, plain = [], []

    def whole(value, expr, leaked):
        plain.append((value, expr))
        leaks[:] = [leak for leak in leaks if not any(leak is each for each in leaked)]

    with listening(Listener(leaks.append, lambda *_: None, lambda _: None, whole)):
        number = use(TracedInt(16, WIDTH))
    assert type(number) is int
    value, expr = plain[-1]
    assert value == number == use(16)
    assert evaluate(expr, {WIDTH: 4, HEADS: 2}, size) == then
    assert not leaks


@pytest.mark.parametrize(
    "use",
    [
        float, math.sqrt, lambda n: n / 2, lambda n: 2 / n, lambda n: n**-0.5, lambda n: 2**n,
        lambda n: n * 0.5, lambda n: n**-1, lambda n: pow(n, 2.0),
    ],
)  # fmt: skip
def test_a_size_that_becomes_a_value_is_told(use, told):
    """All but a float on the left (``1.0 / n``), which Python answers without asking the int."""
    assert use(TracedInt(16, WIDTH)) == pytest.approx(use(16))
    assert told == ([WIDTH], [], [])


def test_a_power_is_remembered(told):
    number = TracedInt(16, WIDTH) ** 2
    assert int(number) == 256
    assert number.expr == Op("**", WIDTH, 2)
    assert evaluate(number.expr, {WIDTH: 3}, size) == 9
    assert told == ([], [], [])


def test_arithmetic_with_plain_ints_tells_nothing(told):
    number = TracedInt(16, WIDTH)
    assert int((number * 3 + 1) // 7 % 5 - 1) == (16 * 3 + 1) // 7 % 5 - 1
    assert hash(number) == hash(16)
    assert told == ([], [], [])


@pytest.mark.parametrize(
    ("ask", "true"),
    [
        (lambda n: n > 3, Op(">", WIDTH, 3)), (lambda n: n < 3, Op(">=", WIDTH, 3)),
        (lambda n: n == 16, Op("==", WIDTH, 16)), (lambda n: n >= 17, Op("<", WIDTH, 17)),
        (lambda n: n == 1, Op("!=", WIDTH, 1)), (lambda n: n != 1, Op("!=", WIDTH, 1)),
        (bool, Op("!=", WIDTH, 0)), (lambda n: not n % 8, Op("==", Op("%", WIDTH, 8), 0)),
        (lambda n: n in {16}, Op("==", WIDTH, 16)),
        (lambda n: n > TracedInt(3, HEADS), Op(">", WIDTH, HEADS)),
    ],
)  # fmt: skip
def test_what_decides_a_branch_is_told(ask, true, told):
    """In a cut model it has to come out the same."""
    ask(TracedInt(16, WIDTH))
    assert told == ([], [], [true])
    assert evaluate(true, {WIDTH: 16, HEADS: 3}, size) == 1


def test_sizes_that_are_found_equal_are_told(told):
    """``if x.shape[1] != self.width: raise`` has to stay true in a cut model."""
    width, heads = TracedInt(16, WIDTH), TracedInt(16, HEADS)
    assert width == heads
    assert told == ([], [(WIDTH, HEADS)], [])
    assert (width != heads) is False
    assert told == ([], [(WIDTH, HEADS)] * 2, [])
    assert width != TracedInt(3, HEADS)
    assert told == ([], [(WIDTH, HEADS)] * 2, [Op("!=", WIDTH, HEADS)])


def test_copies_stay_traced_and_what_is_stored_is_plain():
    number = TracedInt(16, WIDTH)
    assert copy.deepcopy([number])[0] is number
    build, parts = number.__reduce__()  # what any serialisation stores
    assert type(build(*parts)) is int


def test_a_traced_int_is_a_size_to_torch():
    assert torch.zeros(6).view(TracedInt(2, WIDTH), -1).shape == (2, 3)


# --- expressions ---

_KNOWN = {HEADS: 3}
_ATOM = Atom(4)
_LEAVES = st.sampled_from([1, 2, 3, 5, HEADS, _ATOM])


def _grow(inner):
    return st.builds(Op, st.sampled_from(sorted(_OPERATIONS)), inner, inner)


_WITHOUT = st.recursive(_LEAVES, _grow, max_leaves=3)
_WITH = st.recursive(
    st.just(WIDTH),
    lambda inner: (
        st.builds(Op, st.sampled_from(sorted(_OPERATIONS)), inner, _WITHOUT)
        | st.builds(Op, st.sampled_from(sorted(_OPERATIONS)), _WITHOUT, inner)
    ),
    max_leaves=3,
)


def number_of(expr, width):
    """The value by plain recursion; None where Python would divide by zero."""
    if isinstance(expr, Op):
        left, right = number_of(expr.left, width), number_of(expr.right, width)
        if left is None or right is None or (right == 0 and expr.symbol in {"//", "%"}):
            return None
        return _OPERATIONS[expr.symbol](left, right)
    return {WIDTH: width, HEADS: 3, _ATOM: 4}.get(expr, expr)


@given(_WITH, st.integers(0, 30))
def test_evaluate_is_plain_arithmetic(expr, width):
    expected = number_of(expr, width)
    assume(expected is not None)
    assert evaluate(expr, {**_KNOWN, WIDTH: width}, size) == expected


@given(_WITH, st.integers(1, 30))
def test_what_solve_finds_is_a_solution(expr, width):
    """A found value solves the equation wherever trying every number finds a solution at all."""
    target = number_of(expr, width)
    assume(target is not None)
    solutions = [n for n in range(-200, 201) if number_of(expr, n) == target]
    found = solve(expr, target, _KNOWN, size)
    if found is not None and target != 0:
        assert found[0] == WIDTH
        reached = number_of(expr, found[1])
        assert reached == target or _has(expr, "//"), f"{found[1]}, one of {solutions} was right"


def _has(expr, symbol):
    return isinstance(expr, Op) and (
        expr.symbol == symbol or _has(expr.left, symbol) or _has(expr.right, symbol)
    )


@given(_WITH, st.integers(1, 30))
def test_without_remainders_solve_finds_the_one_solution(expr, width):
    assume(not _has(expr, "%") and not _has(expr, "//"))
    target = number_of(expr, width)
    solutions = [n for n in range(-300, 301) if number_of(expr, n) == target]
    assume(len(solutions) == 1)
    assert solve(expr, target, _KNOWN, size) == (WIDTH, width)


@pytest.mark.parametrize(
    ("expr", "target", "expected"),
    [
        (WIDTH, 6, (WIDTH, 6)),
        (Op("*", HEADS, WIDTH), 12, (WIDTH, 4)),
        (Op("*", HEADS, WIDTH), 10, None),
        (Op("//", WIDTH, HEADS), 4, (WIDTH, 12)),
        (Op("//", _ATOM, WIDTH), 2, (WIDTH, 2)),
        (Op("-", HEADS, WIDTH), 1, (WIDTH, 2)),
        (Op("+", Op("*", 2, WIDTH), HEADS), 11, (WIDTH, 4)),
        (Op("*", WIDTH, WIDTH), 9, None),
        (Op("%", WIDTH, 4), 1, None),
        (Op("**", WIDTH, 2), 49, (WIDTH, 7)),
        (Op("**", WIDTH, 2), 50, None),
        (HEADS, 3, None),
    ],
)
def test_solve(expr, target, expected):
    known = {} if expr is HEADS else _KNOWN
    result = solve(expr, target, known, size)
    assert result == ((HEADS, 3) if expr is HEADS else expected)


def test_an_expression_knows_its_attributes_and_axes():
    expr = Op("+", Op("*", WIDTH, HEADS), Prod((_ATOM, Atom(2))))
    assert attributes(expr) == {WIDTH, HEADS}
    assert [atom.size for atom in expr_atoms(expr)] == [4, 2]
    with pytest.raises(KeyError):
        evaluate(expr, {}, size)
