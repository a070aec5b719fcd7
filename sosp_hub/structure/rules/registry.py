"""One rule per operation: how the axes of its outputs follow from those of its inputs.

A rule runs after the operation, unifies what must be cut alike and sets the outputs' axes. An
operation without a rule pins everything it touches: correctness stays, only coverage is lost.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sosp_hub.structure.axes import UNIT, Axis, fixed, mark, size_of, unify
from sosp_hub.structure.terms import Axes, Terms


@dataclass(frozen=True)
class Operation:
    """One operation that has run; ``name`` is its ATen name without overload and in-place mark."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def tensor(self) -> Any:
        """Its first argument."""
        return self.args[0]

    @property
    def operands(self) -> list[Tensor]:
        """Its tensor arguments."""
        return list(tensors((self.args, self.kwargs)))

    def argument(self, position: int, key: str, default: Any = None) -> Any:
        """An argument that may have been given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(key, default)


Rule = Callable[[Terms, Operation], None]
RULES: dict[str, Rule] = {}

# Elementwise operations that PyTorch does not tag as such.
_ELEMENTWISE = frozenset(
    [
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "floor_divide",
        "prelu",
        "_prelu_kernel",
        "_to_copy",
        "copy",
        "native_dropout",
        "dropout",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "lift_fresh",
        "lift_fresh_copy",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "masked_fill",
        "where",
        "fill",
        "zero",
        "softplus",
        "log_sigmoid_forward",
        "elu",
        "mish",
        *("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random"),
        "uniform",
        "to",
        "type_as",
        "bitwise_not",
        "logical_not",
    ]
)
_COPIES = frozenset({"detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh"})


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations by their ATen name."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def apply_rule(terms: Terms, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Runs the rule of one operation; one without a rule, or that no rule fits, is ``unknown``."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    operation = Operation(plain, args, kwargs, out)
    chosen = RULES.get(plain)
    if chosen is None:
        tagged = torch.Tag.pointwise in getattr(func, "tags", ())
        chosen = elementwise if tagged or plain in _ELEMENTWISE else unknown
    terms.draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    try:
        chosen(terms, operation)
    except (ArithmeticError, AssertionError, IndexError, TypeError, ValueError):
        unknown(terms, operation)
    _follow_numbers(terms, operation)


def tensors(values: Any) -> Iterable[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, Mapping):
        yield from tensors(tuple(values.values()))


def unknown(terms: Terms, op: Operation) -> None:
    """No rule: pin the inputs, start afresh with fixed outputs."""
    reason = f"operation `{op.name}` has no rule"
    for tensor in op.operands:
        for axis in terms.of(tensor):
            terms.fix(axis, reason)
    where = f"{reason} in {terms.where}"
    for tensor in tensors(op.out):
        terms.axes[tensor] = tuple(fixed(size, where) for size in tensor.shape)


def broadcast(terms: Terms, operands: Sequence[Axes], operation: str) -> list[Axis]:
    """Axes of the broadcast of several operands, aligned at the right."""
    result: list[Axis] = [UNIT] * max((len(axes) for axes in operands), default=0)
    for axes in operands:
        for position, axis in enumerate(reversed(axes), 1):
            if size_of(axis) == 1:
                continue
            if size_of(result[-position]) == 1:
                result[-position] = axis
            else:
                unify(result[-position], axis, f"{operation} in {terms.where}")
    return result


def elementwise(terms: Terms, op: Operation) -> None:
    """Every output element depends on the elements at the same place."""
    operands = op.operands
    axes = broadcast(terms, [terms.of(operand) for operand in operands], op.name)
    if op.name in {"add", "sub"} and len(operands) == 2:
        one, two = operands
        made = not terms.is_parameter(one) and not terms.is_parameter(two)
        if made and one.shape == two.shape and one.dim() > 1:
            for axis in axes:
                mark(axis, "stream")
    for tensor in tensors(op.out):
        terms.set(tensor, axes if tensor.dim() == len(axes) else ())
    if len(operands) == 1 and op.name in _COPIES:
        carry_source(terms, operands[0], op.out)


def carry_source(terms: Terms, tensor: Tensor, out: Any) -> None:
    """A rearranged parameter is still that parameter."""
    name = terms.source.get(tensor)
    if name is not None:
        for result in tensors(out):
            terms.source[result] = name


def carry_normalised(terms: Terms, tensor: Tensor, out: Tensor) -> None:
    """A parameter divided by a norm of itself still reads, but to scale it changes nothing."""
    carry_source(terms, tensor, out)
    name = terms.source.get(tensor)
    if name is not None:
        terms.normalised.add(name)


# Operations that hand on the values of their first argument, in another order or shape.
_CARRIERS = frozenset(
    [
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "permute"),
        *("transpose", "t", "unsqueeze", "squeeze", "expand", "repeat", "slice", "select"),
        *("clone", "_to_copy", "contiguous", "detach", "alias", "sort", "index", "gather"),
        *("index_select", "cat", "stack", "split", "unbind"),
    ]
)
_LOOKUPS = frozenset({"index", "gather", "scatter", "index_select", "histc"})


def _follow_numbers(terms: Terms, op: Operation) -> None:
    """Positions along an axis mean others once it is cut, so each use of them must be known."""
    operands = op.operands
    known = [terms.numbers[tensor] for tensor in operands if tensor in terms.numbers]
    if not known:
        return
    values = list(tensors(op.tensor))  # several for `cat`
    if op.name in _CARRIERS and all(tensor in terms.numbers for tensor in values):
        for axis in known:
            unify(known[0], axis, f"`{op.name}` in {terms.where}")
        results = list(tensors(op.out))
        for result in results[:1] if op.name == "sort" else results:
            terms.numbers[result] = known[0]
        if op.name == "cat" and position_of(op.argument(1, "dim", 0), op.out) == op.out.dim() - 1:
            number = int(op.out.shape[-1])  # picked one after the other, each from what was left
            terms.take(min(number, size_of(known[0])), known[0])
    elif op.name not in _LOOKUPS:
        for axis in known:
            terms.fix(axis, f"`{op.name}` computes with positions along it")


def picks(terms: Terms, index: Tensor, axis: Axis) -> bool:
    """Whether an index holds positions along this very axis, so that it is cut with what it picks.

    So a router picks its experts: those that are left get new numbers.
    """
    numbered = terms.numbers.get(index)
    if numbered is None:
        return False
    if size_of(numbered) != size_of(axis):
        terms.fix(numbered, "positions along it are used along another axis")
        return False
    unify(numbered, axis, f"a choice in {terms.where}")
    mark(axis, "expert")
    return True


def position_of(dim: int, tensor: Tensor) -> int:
    """A dimension counted from the front."""
    return dim % tensor.dim() if tensor.dim() else 0


def dims_of(dims: Any, tensor: Tensor) -> set[int]:
    """Dimensions an operation runs over; none given means all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return set(range(tensor.dim()))
    return {position_of(dim, tensor) for dim in ([dims] if isinstance(dims, int) else dims)}
