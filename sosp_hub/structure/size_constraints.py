"""What the traced code demands of sizes: each size argument, and the axis that it must equal.

A number that carries its origin gives a constraint on attributes; a plain number is written into
the code and pins its axis.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sosp_hub.structure.axes import Axis, cut_at, size_of, split
from sosp_hub.structure.rules import Operation
from sosp_hub.structure.terms import Terms
from sosp_hub.structure.traced_int import Op, TracedInt

Demand = Callable[[Terms, Operation], None]
_DEMANDS: dict[str, Demand] = {}


def has_demands(name: str) -> bool:
    """Whether calls of a function of this name have size arguments."""
    return name in _DEMANDS


def note_demands(terms: Terms, op: Operation) -> None:
    """Collects constraints from a call's size arguments; unreadable ones pin the result."""
    try:
        _DEMANDS[op.name](terms, op)
    except (AssertionError, IndexError, KeyError, TypeError, ValueError):
        for tensor in [op.out] if isinstance(op.out, Tensor) else op.out:
            for axis in terms.of(tensor):
                terms.fix(axis, f"the arguments of `{op.name}` could not be read")


def _demand(*names: str) -> Callable[[Demand], Demand]:
    def register(function: Demand) -> Demand:
        _DEMANDS.update(dict.fromkeys(names, function))
        return function

    return register


def _flat(sizes: Any) -> list[Any]:
    nested = len(sizes) == 1 and isinstance(sizes[0], tuple | list)
    return list(sizes[0] if nested else sizes)


@_demand("view", "reshape", "expand", "broadcast_to", "view_copy")
def _view(terms: Terms, op: Operation) -> None:
    sizes = _flat(op.args[1:]) or list(op.kwargs.get("shape", op.kwargs.get("size", ())))
    for size, axis in zip(reversed(sizes), reversed(terms.of(op.out)), strict=False):
        terms.constrain(size, axis, "a view")


@_demand(
    *("zeros", "ones", "empty", "full", "rand", "randn"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
)
def _factory(terms: Terms, op: Operation) -> None:
    given = op.args[1:] if op.args and isinstance(op.tensor, Tensor) else op.args
    sizes = _flat(given[:1] if "full" in op.name else given) or list(op.kwargs.get("size", ()))
    for size, axis in zip(sizes[: op.out.dim()], terms.of(op.out), strict=False):
        if isinstance(size, TracedInt):
            terms.constrain(size, axis, "a new tensor")
        else:
            terms.fix(axis, "a new tensor of a fixed size")


@_demand("empty_strided", "new_empty_strided")
def _strided(terms: Terms, op: Operation) -> None:
    for axis in terms.of(op.out):
        terms.fix(axis, "a new tensor of given strides")


@_demand("as_strided")
def _as_strided(terms: Terms, op: Operation) -> None:
    for size, axis in zip(op.argument(1, "size"), terms.of(op.out), strict=True):
        terms.constrain(size, axis, "as_strided")


@_demand("pad")
def _pad(terms: Terms, op: Operation) -> None:
    widths = op.argument(1, "pad")
    for back, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True), 1):
        if before < 0 or after < 0:
            terms.fix(terms.of(op.tensor)[-back], "a negative padding cuts off what it says")
            continue
        axis = terms.of(op.out)[-back]
        _lead(terms, before, axis)
        pieces = cut_at(axis, size_of(axis) - int(after)) if 0 < after < size_of(axis) else None
        if pieces is not None and isinstance(after, TracedInt):
            terms.constrain(after, pieces[1], "a padding")


@_demand("repeat", "tile")
def _repeat(terms: Terms, op: Operation) -> None:
    times = _flat(op.args[1:]) or list(op.kwargs.get("repeats", op.kwargs.get("dims", ())))
    sizes = [1] * op.out.dim() + [*op.tensor.shape]
    for number, axis, size in zip(
        reversed(times), reversed(terms.of(op.out)), reversed(sizes), strict=False
    ):
        if size == 1:
            terms.constrain(number, axis, "a repeat")


@_demand("repeat_interleave")
def _repeat_interleave(terms: Terms, op: Operation) -> None:
    repeats, dim = op.argument(1, "repeats"), op.argument(2, "dim")
    if not isinstance(op.tensor, Tensor) or not isinstance(repeats, int):
        return  # a tensor of numbers picks what it repeats
    axis = terms.of(op.out)[0 if dim is None else dim]
    dense = op.tensor.numel() if dim is None else op.tensor.shape[dim]
    halves = split(axis, int(dense), "repeat_interleave")
    if halves is not None:
        terms.constrain(repeats, halves[1], "repeat_interleave")


@_demand("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(terms: Terms, op: Operation) -> None:
    groups = op.argument(1, "groups")
    halves = split(terms.of(op.tensor)[1], int(groups), "a channel shuffle")
    if halves is not None:
        terms.constrain(groups, halves[0], "groups")


@_demand("batch_norm")
def _batch_norm(terms: Terms, op: Operation) -> None:
    """One value for each channel is refused, as where weights of one column are standardised."""
    if op.argument(5, "training", False):
        _, _, *rest = axes = terms.of(op.tensor)
        values = functools.reduce(functools.partial(Op, "*"), rest, axes[0])
        terms.hold(Op(">", values, 1), "a norm of each channel")


@_demand("histc")
def _histogram(terms: Terms, op: Operation) -> None:
    terms.constrain(op.argument(1, "bins", 100), terms.of(op.out)[0], "bins")


@_demand("tolist", "item", "numpy")
def _values(terms: Terms, op: Operation) -> None:
    """What Python reads, it may count with."""
    terms.use(op.tensor)
    for axis in (*terms.of(op.tensor), terms.numbers.get(op.tensor)):
        if axis is not None and not op.tensor.is_floating_point():
            terms.fix(axis, "its whole numbers are read")


@_demand("arange", "linspace", "eye")
def _series(terms: Terms, op: Operation) -> None:
    for value in op.args:
        if isinstance(value, TracedInt):
            terms.leak(value.expr)


_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "pow")


@_demand(
    "tensor",
    "as_tensor",
    *_ARITHMETIC,
    *(f"__{mark}{n}__" for n in (*_ARITHMETIC, "truediv") for mark in ("", "r", "i")),
)
def _arithmetic(terms: Terms, op: Operation) -> None:
    """A size that enters a tensor's values."""
    for value in (*op.args, *op.kwargs.values()):
        if isinstance(value, TracedInt):
            terms.leak(value.expr)
            if isinstance(op.out, Tensor) and not op.out.dim() and not op.out.is_floating_point():
                terms.counted[op.out] = value.expr


@_demand("eq", "__eq__", "ne", "__ne__")
def _equal(terms: Terms, op: Operation) -> None:
    """A number of elements, such as rows times width, that is compared is no value."""
    for value in op.args:
        if isinstance(value, Tensor) and value in terms.counted:
            terms.forgive([terms.counted[value]])


@_demand("unflatten")
def _unflatten(terms: Terms, op: Operation) -> None:
    dim = op.argument(1, "dim") % op.tensor.dim()
    for offset, size in enumerate(op.argument(2, "sizes")):
        terms.constrain(size, terms.of(op.out)[dim + offset], "unflatten")


@_demand("split", "split_with_sizes", "unsafe_split", "split_copy", "split_with_sizes_copy")
def _split(terms: Terms, op: Operation) -> None:
    key = "split_size_or_sections" if "split_size_or_sections" in op.kwargs else "split_size"
    sizes = op.argument(1, key)
    dim = op.argument(2, "dim", 0) % op.tensor.dim()
    for size, piece in zip(
        [sizes] * len(op.out) if isinstance(sizes, int) else sizes, op.out, strict=False
    ):
        if int(size) == piece.shape[dim]:
            terms.constrain(size, terms.of(piece)[dim], "split")


@_demand("chunk", "tensor_split")
def _chunk(terms: Terms, op: Operation) -> None:
    dim = op.argument(2, "dim", 0) % op.tensor.dim()
    first = op.out[0]
    for piece in op.out[1:]:
        if piece.shape[dim] == first.shape[dim]:
            size = TracedInt(int(piece.shape[dim]), terms.of(first)[dim])
            terms.constrain(size, terms.of(piece)[dim], "chunk")


@_demand("narrow")
def _narrow(terms: Terms, op: Operation) -> None:
    tensor, dim, start, length = op.args
    _lead(terms, start, terms.of(tensor)[dim])
    terms.constrain(length, terms.of(op.out)[dim], "narrow")


@_demand("__getitem__")
def _getitem(terms: Terms, op: Operation) -> None:
    tensor, key = op.args
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(item, Tensor | list) for item in keys) or not isinstance(op.out, Tensor):
        return
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        missing = tensor.dim() - sum(item is not None and item is not Ellipsis for item in keys)
        keys[at : at + 1] = [slice(None)] * missing
    source = result = 0
    for item in keys:
        if item is None:
            result += 1
        elif isinstance(item, slice):
            axis = terms.of(op.out)[result]
            if item.step in {None, 1} and size_of(axis) != tensor.shape[source]:
                _slice(terms, item, terms.of(tensor)[source], axis)
            source, result = source + 1, result + 1
        else:
            source += 1


def _slice(terms: Terms, item: slice, whole: Axis, piece: Axis) -> None:
    length = size_of(whole)
    item = slice(terms.origin(item.start), terms.origin(item.stop), item.step)
    for border in (item.start, item.stop):
        if isinstance(border, Tensor):
            terms.fix(whole, "a slice ends where a tensor says")
            return
        literal = type(border) is int
        if literal and border != 0 and abs(border) < length:
            terms.fix(whole, f"the number {border} is written into the code (a slice)")
            return
    total = TracedInt(length, whole)
    start, stop = item.start or 0, item.stop
    begin = total + start if start < 0 else start
    end = total if stop is None or stop >= length else (total + stop if stop < 0 else stop)
    terms.constrain(end - begin, piece, "a slice")
    _lead(terms, begin, whole)


def _lead(terms: Terms, start: Any, whole: Axis) -> None:
    """The part before a slice must keep the length ``start``."""
    if isinstance(start, TracedInt) and 0 < start < size_of(whole):
        pieces = cut_at(whole, int(start))
        if pieces is not None:
            terms.constrain(start, pieces[0], "a slice")


@_demand("layer_norm", "rms_norm")
def _layer_norm(terms: Terms, op: Operation) -> None:
    shape = op.argument(1, "normalized_shape")
    for size, axis in zip(reversed(shape), reversed(terms.of(op.out)), strict=False):
        if isinstance(size, TracedInt):
            terms.constrain(size, axis, "normalized_shape")


@_demand("group_norm")
def _group_norm(terms: Terms, op: Operation) -> None:
    groups = op.argument(1, "num_groups")
    halves = split(terms.of(op.out)[1], int(groups), "group norm")
    if halves is not None:
        terms.constrain(groups, halves[0], "num_groups")


@_demand("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(terms: Terms, op: Operation) -> None:
    groups = op.argument(6, "groups", 1)
    if int(groups) == 1:
        return
    weight = op.argument(1, "weight")
    halves = split(terms.of(weight)[0], int(groups), "a grouped convolution")
    if halves is not None:
        terms.constrain(groups, halves[0], "groups")
