"""Whole numbers that remember where they come from.

While a model is traced, its int attributes, its config values and the sizes of its tensors are
``TracedInt``s. When one
arrives as a size argument (``view``, ``split``, ``layer_norm``, ...) the trace learns that the
attribute must equal the
size of that axis, and so which attribute a cut has to rewrite. One that is turned into a float is
a size used as a value.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from typing import Any, NamedTuple

from sosp_hub.structure.axes import Atom, Axis, atoms, size_of


@dataclass(frozen=True, slots=True)
class Attribute:
    """An int attribute of a module; a name may be dotted, ``item`` is a tuple position."""

    module: str
    name: str
    item: int | None = None
    dense: int = field(default=0, compare=False)

    def __str__(self) -> str:
        item = "" if self.item is None else f"[{self.item}]"
        return f"{self.module}.{self.name}{item}".lstrip(".")


@dataclass(frozen=True, slots=True)
class Op:
    """A binary operation on two expressions; a comparison is 1 where it holds, else 0."""

    symbol: str
    left: "Expr"
    right: "Expr"


Expr = int | Attribute | Op | Axis

_OPS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_OPPOSITE = {"<": ">=", ">": "<=", "<=": ">", ">=": "<", "==": "!=", "!=": "=="}


class Listener(NamedTuple):
    """Receives sizes used as values, sizes found equal, and other facts about them.

    Also of sizes that became plain numbers: their value, their expression, and those of the sizes
    that were told as used as values on the way, which they were not.
    """

    leak: Callable[[Expr], None]
    equal: Callable[[Expr, Expr], None]
    true: Callable[["Op"], None]
    whole: Callable[[int, Expr, Sequence[Expr]], None] = lambda _value, _expr, _leaked: None


_DEAF = Listener(lambda _: None, lambda _one, _two: None, lambda _: None)
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, ``listener`` hears what the code does with traced sizes."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


def deaf() -> AbstractContextManager[None]:
    """Within it nobody listens: what is computed with sizes is no business of the model's."""
    return listening(_DEAF)


class TracedInt(int):
    """An int with an expression."""

    expr: Expr

    def __new__(cls, value: int, expr: Expr) -> "TracedInt":
        """An int of this value that remembers ``expr``."""
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __int__(self) -> int:
        value = int.__int__(self)
        if _listeners and _listeners[-1] is not _DEAF:
            _listeners[-1].whole(value, self.expr, ())
        return value

    def __float__(self) -> float:
        return float(self._leaked())

    def __truediv__(self, other: Any) -> Any:
        return _share(self, 1, other) if isinstance(other, int | float) else NotImplemented

    def __rtruediv__(self, other: Any) -> float:
        return _leaked(other) / self._leaked()

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        if type(other) in {int, TracedInt} and other >= 0 and mod is None:
            power = int.__int__(self) ** int.__int__(other)
            return TracedInt(power, Op("**", self.expr, expr_of(other)))
        return pow(self._leaked(), _leaked(other), mod)

    def __rpow__(self, other: Any) -> Any:
        return _leaked(other) ** self._leaked()

    def __bool__(self) -> bool:
        return self != 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """What numpy computes with a size uses it as a value."""
        return getattr(ufunc, method)(*map(_leaked, inputs), **kwargs)

    __hash__ = int.__hash__

    def __neg__(self) -> int:
        return TracedInt(-int.__int__(self), Op("*", -1, self.expr))

    def __deepcopy__(self, memo: Any) -> "TracedInt":
        return self

    def __reduce__(self) -> Any:
        return int, (int.__int__(self),)

    def _leaked(self) -> int:
        if _listeners:
            _listeners[-1].leak(self.expr)
        return int.__int__(self)


class TracedFloat(float):
    """A whole number that is written as a float: a size times or divided by another number.

    It counts as used as a value unless the code makes an int of it again, as in
    ``int(channels / 0.5)``.
    """

    expr: Expr
    leaked: tuple[Expr, ...]

    def __int__(self) -> int:
        value = int(float.__int__(self))
        if _listeners:
            _listeners[-1].whole(value, self.expr, self.leaked)
        return value

    __trunc__ = __floor__ = __ceil__ = __int__

    def __reduce__(self) -> Any:
        return float, (float.__float__(self),)


_LARGEST_RATIO = 64


def _share(size: TracedInt, times: float, divided_by: float) -> float:
    """``size * times / divided_by``, one of which is one."""
    factors = [f for f in (times, divided_by) if isinstance(f, TracedInt)]
    value = size._leaked() * _leaked(times) / _leaked(divided_by)
    expr: Expr = size.expr
    if factors:
        expr = Op("//", expr, factors[0].expr)
    else:
        ratio = Fraction(times) / Fraction(divided_by) if isfinite(times + divided_by) else 0
        if not ratio > 0 or max(ratio.as_integer_ratio()) > _LARGEST_RATIO:
            return value
        expr = expr if ratio.numerator == 1 else Op("*", expr, ratio.numerator)
        expr = expr if ratio.denominator == 1 else Op("//", expr, ratio.denominator)
    if not value.is_integer():
        return value
    whole = TracedFloat(value)
    whole.expr, whole.leaked = expr, (size.expr, *(factor.expr for factor in factors))
    return whole


def _leaked(value: Any) -> Any:
    return value._leaked() if isinstance(value, TracedInt) else value


def _binary(symbol: str, flipped: bool) -> Callable[[TracedInt, Any], Any]:
    compute = _OPS[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            if isinstance(other, float):
                if symbol == "*":
                    return _share(self, other, 1)
                value = self._leaked()
                return compute(other, value) if flipped else compute(value, other)  # type: ignore[arg-type]
            return NotImplemented
        left, right = (other, self) if flipped else (self, other)
        return TracedInt(
            compute(int.__int__(left), int.__int__(right)),
            Op(symbol, expr_of(left), expr_of(right)),
        )

    return method


def _comparison(symbol: str) -> Callable[[TracedInt, Any], Any]:
    compute = _COMPARISONS[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        plain = (
            int.__int__(other) if isinstance(other, int) else other
        )  # a traced one would be asked first
        truth = compute(int.__int__(self), plain)
        if not _listeners or isinstance(other, float):
            return truth
        sign = symbol if truth else _OPPOSITE[symbol]
        if isinstance(other, TracedInt) and sign == "==":
            _listeners[-1].equal(self.expr, other.expr)
        else:
            _listeners[-1].true(Op(sign, self.expr, expr_of(other)))
        return truth

    return method


for _symbol, _compute in _COMPARISONS.items():
    setattr(TracedInt, f"__{_compute.__name__}__", _comparison(_symbol))

for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(TracedInt, f"__{_name}__", _binary(_symbol, flipped=False))
    setattr(TracedInt, f"__r{_name}__", _binary(_symbol, flipped=True))


def expr_of(value: int) -> Expr:
    """The expression of a number; a plain int is a literal of the code."""
    return value.expr if isinstance(value, TracedInt) else int.__int__(value)


def attributes(expr: Expr) -> set[Attribute]:
    """Attributes an expression depends on."""
    if isinstance(expr, Attribute):
        return {expr}
    return attributes(expr.left) | attributes(expr.right) if isinstance(expr, Op) else set()


def expr_atoms(expr: Expr) -> list[Atom]:
    """Root atoms of the tensor sizes an expression depends on."""
    if isinstance(expr, Op):
        return expr_atoms(expr.left) + expr_atoms(expr.right)
    return [] if isinstance(expr, int | Attribute) else list(atoms(expr))


def evaluate(expr: Expr, values: Mapping[Attribute, int], count: Callable[[Atom], int]) -> int:
    """Value of an expression when ``count`` structures are left of each atom."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, Attribute):
        return values[expr]
    if isinstance(expr, Op):
        left, right = evaluate(expr.left, values, count), evaluate(expr.right, values, count)
        if expr.symbol in _COMPARISONS:
            return int(_COMPARISONS[expr.symbol](left, right))
        return _OPS[expr.symbol](left, right) if right or expr.symbol not in {"//", "%"} else 0
    return size_of(expr, count)


def solve(
    expr: Expr, target: int, values: Mapping[Attribute, int], count: Callable[[Atom], int]
) -> tuple[Attribute, int] | None:
    """The one unknown attribute of ``expr == target`` and its value, if a whole number."""
    while isinstance(expr, Op):
        in_left = not attributes(expr.left) <= values.keys()
        if in_left and not attributes(expr.right) <= values.keys():
            return None
        known = evaluate(expr.right if in_left else expr.left, values, count)
        if expr.symbol == "+":
            target -= known
        elif expr.symbol == "-":
            target = target + known if in_left else known - target
        elif expr.symbol == "*":
            if not known or target % known:
                return None
            target //= known
        elif expr.symbol == "**" and in_left:
            root = round(target ** (1 / known)) if known > 0 and target > 0 else 0
            if root**known != target:
                return None
            target = root
        elif expr.symbol == "//" and in_left:
            target *= known
        elif expr.symbol == "//" and target and known % target == 0:
            target = known // target
        else:
            return None
        expr = expr.left if in_left else expr.right
    return (expr, target) if isinstance(expr, Attribute) else None
