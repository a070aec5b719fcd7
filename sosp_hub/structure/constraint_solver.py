"""What sizes must satisfy: one attribute for several axes, halves, products of attributes.

Every size argument of the traced code gave a constraint ``expression == size of an axis``. For a
choice of counts the
constraints determine the attributes of the cut model. Constraints that fail for arbitrary counts
are turned into ties
(groups that keep equally many structures), or where that does not help their axes are pinned.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from sosp_hub.errors import TraceError
from sosp_hub.structure.axes import (
    UNIT,
    Atom,
    Axis,
    Sum,
    atoms,
    fixed,
    is_fixed,
    paired,
    pin,
    resolve,
    size_of,
    split,
)
from sosp_hub.structure.terms import Constraint
from sosp_hub.structure.traced_int import (
    Attribute,
    Expr,
    Op,
    attributes,
    evaluate,
    expr_atoms,
    solve,
)

Count = Callable[[Atom], int]

_CLEAN_DRAWS = 8
"""Small sizes agree by chance."""

_TRIED_COUNTS = 16
"""So many counts of an atom are tried, to see whether a number changes with it."""


def solve_attributes(
    constraints: Sequence[Constraint], count: Count
) -> tuple[dict[Attribute, int], list[Constraint]]:
    """Attribute values with ``count`` structures left, and the constraints that then fail.

    What has several unknown attributes when nothing else is left to solve keeps all of them, or
    all but one, at the values of the dense model; where that cannot be, it fails.
    """
    values: dict[Attribute, int] = {}
    violated: list[Constraint] = []
    waiting = list(constraints)
    while waiting:
        open_ones, waiting = waiting, []
        for constraint in open_ones:
            if attributes(constraint.expr) <= values.keys():
                if not _holds(constraint, values, count):
                    violated.append(constraint)
                continue
            solution = solve(constraint.expr, size_of(constraint.axis, count), values, count)
            if solution is None:
                waiting.append(constraint)
            else:
                values[solution[0]] = solution[1]
                if not _holds(constraint, values, count):
                    violated.append(constraint)
        if len(waiting) == len(open_ones):
            stuck = waiting.pop(0)
            solution = _keep_most(stuck, values, count)
            if solution is None:
                violated.append(stuck)
            else:
                values.update(solution)
    return values, violated


def _keep_most(
    constraint: Constraint, values: Mapping[Attribute, int], count: Count
) -> dict[Attribute, int] | None:
    """Values of the unknown attributes of which at most one, rather a large one, is not dense."""
    dense = {a: a.dense for a in attributes(constraint.expr) if a not in values}
    if _holds(constraint, {**values, **dense}, count):
        return dense
    target = size_of(constraint.axis, count)
    for free in sorted(dense, key=lambda a: (-a.dense, str(a))):
        held = {attribute: value for attribute, value in dense.items() if attribute != free}
        solution = solve(constraint.expr, target, {**values, **held}, count)
        if solution is not None and _holds(
            constraint, {**values, **held, free: solution[1]}, count
        ):
            return {**held, free: solution[1]}
    return None


def _holds(constraint: Constraint, values: Mapping[Attribute, int], count: Count) -> bool:
    return evaluate(constraint.expr, values, count) == size_of(constraint.axis, count)


def settle(
    constraints: Sequence[Constraint],
    leaks: Iterable[tuple[object, str]],
    comparisons: Sequence[Constraint] = (),
    seed: int = 0,
) -> dict[int, int]:
    """Finds ties, pins and barred counts until everything holds for whatever counts are left.

    Args:
        constraints: What must hold; it gives the attributes of a cut model.
        leaks: Expressions that the code uses as values, and where.
        comparisons: What decides the way through the code, and must go on deciding it so.
        seed: Of the counts that are tried.

    Returns:
        The representative of each tied atom (ids); atoms with one representative must keep equally
        many structures.
    """
    representative: dict[int, int] = {}
    relevant = _relevant(constraints)
    quotients, others = [], []
    for leak in leaks:
        (quotients if _is_quotient(leak[0]) else others).append(leak)
    _pin_leaks(relevant, others)
    generator = random.Random(seed)

    def find(number: int) -> int:
        while representative.get(number, number) != number:
            number = representative[number]
        return number

    _satisfy(relevant, find, representative, generator)
    if _pin_quotients(_distinct_leaks(quotients), relevant, find, generator):
        _satisfy(relevant, find, representative, generator)
    if bar_counts(_distinct(comparisons), relevant, find, generator):
        _satisfy(relevant, find, representative, generator)
    members = {atom.id for c in relevant for atom in (*atoms(c.axis), *expr_atoms(c.expr))}
    return {number: find(number) for number in members}


class _Index:
    """Constraints, and those that an attribute has to do with, in their order."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        self.by_attribute: dict[Attribute, dict[int, Constraint]] = {}
        for position, constraint in enumerate(constraints):
            for attribute in attributes(constraint.expr):
                self.by_attribute.setdefault(attribute, {})[position] = constraint

    def of(self, wanted: Iterable[Attribute]) -> list[Constraint]:
        """The constraints on any of these attributes."""
        constraints: dict[int, Constraint] = {}
        for attribute in wanted:
            constraints |= self.by_attribute.get(attribute, {})
        return [constraints[position] for position in sorted(constraints)]


def _satisfy(
    relevant: Sequence[Constraint],
    find: Callable[[int], int],
    representative: dict[int, int],
    generator: random.Random,
) -> None:
    """Ties and pins until every constraint holds for counts drawn at random.

    Raises:
        TraceError: Some hold for no counts.
    """
    clean = 0
    index = _Index(relevant)

    def violated_of(constraints: Sequence[Constraint]) -> list[Constraint]:
        draw: dict[int, int] = {}

        def count(atom: Atom) -> int:
            if atom.pinned:
                return atom.size
            return draw.setdefault(find(atom.id), generator.randint(1, atom.size))

        return solve_attributes(constraints, count)[1]

    while clean < _CLEAN_DRAWS:
        violated = violated_of(relevant)
        clean = 0 if violated else clean + 1
        refined = [_refine(c, index, find, representative) for c in violated]
        if any(refined):
            continue
        touched: set[int] = set()
        repaired = not violated
        for constraint in violated:
            involved = _involved(constraint, index)
            stale = not touched.isdisjoint(find(atom.id) for atom in involved)
            if not stale or constraint in violated_of(_bound(constraint, index)):
                repaired |= _repair(constraint, involved, find, representative)
                touched |= {find(atom.id) for atom in involved}
        if not repaired:
            _pin_bound(violated[0], index)


def bar_counts(
    comparisons: Sequence[Constraint],
    constraints: Sequence[Constraint],
    find: Callable[[int], int],
    generator: random.Random,
) -> bool:
    """Rules out, on the atoms, counts with which a comparison would come out otherwise.

    A repeat factor may well become one where the code asks whether it is: both ways are right.

    Returns:
        Whether atoms were pinned, since no other count was left or several counts decide together.
    """
    pinned = False
    index = _Index(constraints)
    live = index.by_attribute.keys()
    for comparison in comparisons:
        asked = attributes(comparison.expr)
        if _dead(comparison) and not asked & live:
            continue
        if _may_differ_otherwise(comparison.expr) and asked <= live:
            continue
        bound = _bound(comparison, index)
        involved = [a for c in (comparison, *bound) for a in (*atoms(c.axis), *expr_atoms(c.expr))]
        asks_for_one = isinstance(comparison.expr, Op) and comparison.expr.right == 1
        loose = {
            find(atom.id): atom
            for atom in involved
            if not atom.pinned and not (asks_for_one and "copies" in atom.roles)
        }

        flips = partial(_flips, comparison, bound, find)
        for number, atom in loose.items():
            atom.barred |= {kept for kept in range(1, atom.size) if flips({number: kept})}
        stuck = [atom for atom in loose.values() if len(atom.barred) == atom.size - 1]
        left = {
            number: [kept for kept in range(1, atom.size + 1) if kept not in atom.barred]
            for number, atom in loose.items()
        }
        if len(loose) > 1:
            few = {number: counts[0] for number, counts in left.items()}
            most = max(loose, key=lambda number: loose[number].size)
            if flips(few):  # several that are few at once: the largest may be what is not
                wrong = {kept for kept in left[most][:-1] if flips({**few, most: kept})}
                loose[most].barred |= wrong
                left[most] = [kept for kept in left[most] if kept not in wrong]
            if any(
                flips({number: generator.choice(counts) for number, counts in left.items()})
                for _ in range(3)
            ):
                stuck = list(loose.values())
        for atom in stuck:
            atom.pinned.setdefault(f"its size decides {comparison.where}")
        pinned |= bool(stuck)
    return pinned


def _may_differ_otherwise(expr: Expr) -> bool:
    """Whether two sizes of the model were found to differ: any two others may differ instead.

    They are not kept from meeting, unless one is a number that no cut changes.
    """
    return isinstance(expr, Op) and expr.symbol == "!=" and not isinstance(expr.right, int)


def _flips(
    comparison: Constraint,
    bound: Sequence[Constraint],
    find: Callable[[int], int],
    counts: Mapping[int, int],
) -> bool:
    def count(atom: Atom) -> int:
        return atom.size if atom.pinned else counts.get(find(atom.id), atom.size)

    return comparison in solve_attributes([*bound, comparison], count)[1]


def _bound(comparison: Constraint, index: _Index) -> list[Constraint]:
    """The constraints that determine the attributes of a comparison."""
    bound: dict[int, Constraint] = {}
    wanted, asked = attributes(comparison.expr), set[Attribute]()
    while wanted - asked:
        added = {id(c): c for c in index.of(wanted - asked) if id(c) not in bound}
        asked |= wanted
        bound |= added
        wanted = wanted.union(*(attributes(c.expr) for c in added.values()))
    return list(bound.values())


def _relevant(constraints: Sequence[Constraint]) -> list[Constraint]:
    """One of each kind that has to do with something cuttable, simple ones first."""
    seen = _distinct(constraints)
    live = {a for c in seen if not _dead(c) for a in attributes(c.expr)}
    chosen = [c for c in seen if not _dead(c) or attributes(c.expr) & live]
    return sorted(chosen, key=lambda c: not isinstance(c.expr, Attribute))


def _distinct(constraints: Sequence[Constraint]) -> list[Constraint]:
    seen: dict[tuple[object, ...], Constraint] = {}
    for constraint in constraints:
        key = (
            _key(constraint.expr),
            tuple(atom.id for atom in atoms(constraint.axis)),
            size_of(constraint.axis),
        )
        seen.setdefault(key, constraint)
    return list(seen.values())


def _dead(constraint: Constraint) -> bool:
    return is_fixed(constraint.axis) and all(atom.pinned for atom in expr_atoms(constraint.expr))


def _key(expr: object) -> object:
    if isinstance(expr, int | Attribute):
        return expr
    if hasattr(expr, "symbol"):
        return (expr.symbol, _key(expr.left), _key(expr.right))  # type: ignore[attr-defined]
    return tuple(atom.id for atom in atoms(expr))  # type: ignore[arg-type]


def _pin_leaks(constraints: Sequence[Constraint], leaks: Iterable[tuple[object, str]]) -> None:
    index = _Index(constraints)
    for expr, where in leaks:
        touched = list(expr_atoms(expr))  # type: ignore[arg-type]
        for attribute in attributes(expr):  # type: ignore[arg-type]
            says = [c for c in index.of([attribute]) if c.expr == attribute]
            touched += [atom for c in says for atom in atoms(c.axis)]
        for atom in touched:
            atom.pinned.setdefault(f"the code in {where} computes with its size")


def _is_quotient(expr: object) -> bool:
    """Whether an expression shares a size out by another number of the model, such as its heads."""
    return isinstance(expr, Op) and expr.symbol == "//" and not isinstance(expr.right, int)


def _pin_quotients(
    leaks: Iterable[tuple[Expr, str]],
    constraints: Sequence[Constraint],
    find: Callable[[int], int],
    generator: random.Random,
) -> bool:
    """Pins what a quotient that the code computes with depends on.

    A width by a number of heads is the width of a head, whatever heads are left: where both were
    found to follow the heads, only the width of a head has to stay.

    Returns:
        Whether atoms were pinned.
    """
    index = _Index(constraints)
    pinned = False
    for expr, where in leaks:
        dense = evaluate(expr, {a: a.dense for a in attributes(expr)}, lambda atom: atom.size)
        keeps = Constraint(Op("==", expr, dense), UNIT, where)
        bound = _bound(keeps, index)
        involved = [a for c in (keeps, *bound) for a in (*atoms(c.axis), *expr_atoms(c.expr))]
        loose = {find(atom.id): atom for atom in involved if not atom.pinned}
        flips = partial(_flips, keeps, bound, find)

        def some(atom: Atom) -> Iterable[int]:
            few = min(atom.size, _TRIED_COUNTS)
            return {1, *(generator.randint(1, atom.size) for _ in range(few))}

        moved = [
            atom
            for number, atom in loose.items()
            if any(flips({number: kept}) for kept in some(atom))
        ]
        rest = {number: atom for number, atom in loose.items() if atom not in moved}
        if any(
            flips({number: generator.randint(1, atom.size) for number, atom in rest.items()})
            for _ in range(_CLEAN_DRAWS * (len(rest) > 1))
        ):
            moved = list(loose.values())
        for atom in moved:
            atom.pinned.setdefault(f"the code in {where} computes with its size")
        pinned |= bool(moved)
    return pinned


def _distinct_leaks(leaks: Iterable[tuple[Expr, str]]) -> list[tuple[Expr, str]]:
    return list({_key(leak[0]): leak for leak in leaks}.values())


def kept_values(leaks: Iterable[tuple[Expr, str]]) -> list[Constraint]:
    """That attributes which the code uses as values keep them."""
    return [
        Constraint(
            attribute,
            fixed(attribute.dense, f"the code in {where} computes with it"),
            f"the code in {where}, which computes with it",
        )
        for expr, where in leaks
        if not _is_quotient(expr)
        for attribute in attributes(expr)
        if attribute.dense > 0
    ]


def _refine(
    constraint: Constraint,
    index: _Index,
    find: Callable[[int], int],
    tied: dict[int, int],
) -> bool:
    """Ties two axes of equal length factor by factor; False if that is not possible.

    An atom gets the borders of the other axis first: where ``reshape(B, N, C)`` puts heads and
    their channels back into a stream of width C, the stream is cut by as many blocks as heads, and
    by as many channels a block, each chosen on their own.
    """
    expr = constraint.expr
    if isinstance(expr, Op):
        left, size = expr.left, size_of(constraint.axis)
        if expr.symbol != "//" or isinstance(left, int | Attribute | Op):
            return False
        whole = resolve(left)
        if not isinstance(whole, Atom) or whole.pinned or whole.size % size:
            return False
        return 1 < size < whole.size and bool(split(whole, whole.size // size, ""))
    if isinstance(expr, Attribute):
        others: list[Axis] = [c.axis for c in index.of([expr]) if c.expr == expr]
    else:
        others = [] if isinstance(expr, int) else [expr]
    changed = False
    for one, two in (pair for other in others for pair in paired(constraint.axis, other)):
        if one is two or (one.pinned and two.pinned):
            continue
        if one.pinned or two.pinned:
            pin(Sum((one, two)), f"its size is bound to others by {constraint.where}")
            changed = True
        elif find(one.id) != find(two.id):
            tied[max(find(one.id), find(two.id))] = min(find(one.id), find(two.id))
            changed = True
    return changed


def _repair(
    constraint: Constraint,
    involved: Sequence[Atom],
    find: Callable[[int], int],
    tied: dict[int, int],
) -> bool:
    """Ties two equally long axes of a failing constraint, or pins it; whether any was left."""
    fixed_sizes = {atom.size for atom in involved if atom.pinned}
    loose = {find(atom.id): atom for atom in involved if not atom.pinned}
    for one, two in itertools.combinations(loose, 2):
        if loose[one].size == loose[two].size and loose[one].size not in fixed_sizes:
            tied[max(one, two)] = min(one, two)
            return True
    for atom in loose.values():
        atom.pinned.setdefault(f"its size is bound to others by {constraint.where}")
    return bool(loose)


def _pin_bound(constraint: Constraint, index: _Index) -> None:
    """Pins what a failing constraint is bound to by others in between.

    Raises:
        TraceError: All of it is pinned: sizes contradict each other in the dense model itself.
    """
    bound = _bound(constraint, index)
    involved = [a for c in bound for a in (*atoms(c.axis), *expr_atoms(c.expr))]
    loose = [atom for atom in involved if not atom.pinned]
    if not loose:
        raise TraceError(
            f"sizes of the model contradict each other in {constraint.where}: "
            f"{constraint.expr} is to be {size_of(constraint.axis)} there and something else "
            "elsewhere, with nothing cut"
        )
    for atom in loose:
        atom.pinned.setdefault(f"its size is bound to others by {constraint.where}")


def _involved(constraint: Constraint, index: _Index) -> list[Atom]:
    involved = [*atoms(constraint.axis), *expr_atoms(constraint.expr)]
    for other in index.of(attributes(constraint.expr)):
        if other is not constraint:
            involved += [*atoms(other.axis), *expr_atoms(other.expr)]
    return involved


def attribute_values(constraints: Sequence[Constraint], count: Count) -> Mapping[Attribute, int]:
    """Attribute values of a cut model."""
    return solve_attributes(_relevant(constraints), count)[0]
