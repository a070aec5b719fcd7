"""Views, transpositions, slices, concatenations: where the algebra is made."""

from sosp_hub.structure.axes import (
    UNIT,
    Axis,
    Prod,
    Sum,
    cut_at,
    fixed,
    free,
    mark,
    resolve,
    size_of,
    split,
    unify,
)
from sosp_hub.structure.rules.registry import (
    Operation,
    broadcast,
    carry_source,
    dims_of,
    position_of,
    rule,
    tensors,
)
from sosp_hub.structure.terms import Terms


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(terms: Terms, op: Operation) -> None:
    source = op.tensor
    axes = reshape(terms, list(terms.of(source)), [int(size) for size in op.out.shape], op.name)
    terms.set(op.out, axes)
    carry_source(terms, source, op.out)


def reshape(terms: Terms, axes: list[Axis], sizes: list[int], operation: str) -> list[Axis]:
    """Row-major regrouping: factors are taken from the left, split where a border falls inside.

    Where a factor cannot be split there, it and what it is regrouped with stay whole, and no more.
    """
    factors: list[Axis] = [axis for axis in axes if size_of(axis) != 1]
    result: list[Axis] = []
    while len(result) < len(sizes):
        taken: list[Axis] = []
        missing = sizes[len(result)]
        while missing > 1:
            factor = resolve(factors.pop(0))
            length = size_of(factor)
            if missing % length == 0:
                taken.append(factor)
                missing //= length
                continue
            if isinstance(factor, Prod):
                factors[:0] = factor.factors
                continue
            halves = (
                split(factor, missing, f"{operation} in {terms.where}")
                if length % missing == 0
                else None
            )
            if halves is None:
                taken.append(factor)
                break
            taken.append(halves[0])
            factors.insert(0, halves[1])
            missing = 1
        else:
            result.append(Prod(tuple(taken)) if len(taken) != 1 else taken[0])
            continue
        number = _regroup(taken, factors, sizes[len(result) :])
        for axis in taken:
            terms.fix(axis, f"`{operation}` regroups {[size_of(a) for a in axes]} as {sizes}")
        result += [
            fixed(size, f"`{operation}` in {terms.where}")
            for size in sizes[len(result) : len(result) + number]
        ]
    return result


def _regroup(taken: list[Axis], rest: list[Axis], sizes: list[int]) -> int:
    """Takes more axes from the rest until they are as many elements as the first sizes; how many.

    Args:
        taken: Axes that must be regrouped; more are added.
        rest: The axes after them; those that are added are removed.
        sizes: What is made of all of them.
    """
    have, wanted, number = size_of(Prod(tuple(taken))), sizes[0], 1
    while have != wanted:
        if have < wanted:
            taken.append(rest.pop(0))
            have *= size_of(taken[-1])
        else:
            wanted *= sizes[number]
            number += 1
    return number


@rule("t", "transpose", "numpy_T", "mT", "swapaxes")
def _transpose(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    one, two = (op.args[1], op.args[2]) if len(op.args) > 2 else (-2, -1)
    if len(axes) > 1:
        axes[one], axes[two] = axes[two], axes[one]
    terms.set(op.out, axes)
    carry_source(terms, op.tensor, op.out)


@rule("permute")
def _permute(terms: Terms, op: Operation) -> None:
    axes = terms.of(op.tensor)
    terms.set(op.out, [axes[dim] for dim in op.args[1]])
    carry_source(terms, op.tensor, op.out)


@rule("unsqueeze")
def _unsqueeze(terms: Terms, op: Operation) -> None:
    axes = list(terms.was(op.tensor))
    axes.insert(op.args[1] % op.out.dim(), UNIT)
    terms.set(op.out, axes)
    carry_source(terms, op.tensor, op.out)


@rule("squeeze")
def _squeeze(terms: Terms, op: Operation) -> None:
    axes = terms.was(op.tensor)
    dims = op.args[1] if len(op.args) > 1 else range(len(axes))
    gone = {dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims) if axes}
    terms.set(op.out, [a for i, a in enumerate(axes) if not (i in gone and size_of(a) == 1)])
    carry_source(terms, op.tensor, op.out)


@rule("expand", "broadcast_to")
def _expand(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    axes = [UNIT] * (op.out.dim() - len(axes)) + axes
    result: list[Axis] = []
    for axis, size in zip(axes, op.out.shape, strict=True):
        if size_of(axis) == 1 and size != 1:
            axis = free(int(size))
            mark(axis, "copies")
        result.append(axis)
    terms.set(op.out, result)
    carry_source(terms, op.tensor, op.out)


@rule("repeat", "tile")
def _repeat(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    axes = [UNIT] * (op.out.dim() - len(axes)) + axes
    reason = f"`{op.name}` in {terms.where}"
    result: list[Axis] = []
    for axis, size in zip(axes, op.out.shape, strict=True):
        if size_of(axis) == 1 and size != 1:
            result.append(free(int(size)))
            mark(result[-1], "copies")
        else:
            result.append(Prod((fixed(int(size) // size_of(axis), reason), axis)))
    terms.set(op.out, result)


@rule("cat", "concatenate", "concat")
def _cat(terms: Terms, op: Operation) -> None:
    pieces = [piece for piece in op.tensor if piece.dim() == op.out.dim()]  # none of shape [0]
    dim = position_of(op.argument(1, "dim", 0), op.out)
    axes = [terms.of(piece) for piece in pieces]
    result = list(axes[0])
    for other in axes[1:]:
        for i in range(op.out.dim()):
            if i != dim:
                unify(result[i], other[i], f"`cat` in {terms.where}")
    parts = [a[dim] for a in axes if size_of(a[dim])]
    result[dim] = Sum(tuple(parts)) if parts else axes[0][dim]
    terms.set(op.out, result)


@rule("stack")
def _stack(terms: Terms, op: Operation) -> None:
    dim = position_of(op.argument(1, "dim", 0), op.out)
    axes = broadcast(terms, [terms.of(piece) for piece in op.tensor], op.name)
    axes.insert(dim, fixed(len(op.tensor), f"`stack` in {terms.where}"))
    terms.set(op.out, axes)


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "split_copy",
)
def _split(terms: Terms, op: Operation) -> None:
    dim = position_of(op.argument(2, "dim", 0), op.tensor)
    axes = list(terms.of(op.tensor))
    rest = axes[dim]
    for piece in op.out:
        size = int(piece.shape[dim])
        if size == size_of(rest):
            head = rest
        else:
            pieces = cut_at(rest, size) if size else (fixed(0, "empty"), rest)
            if pieces is None:
                terms.fix(rest, "a border falls inside a block of the axis")
                reason = f"a piece in {terms.where}"
                pieces = fixed(size, reason), fixed(size_of(rest) - size, reason)
            head, rest = pieces
        axes[dim] = head
        terms.set(piece, axes)
        carry_source(terms, op.tensor, piece)


@rule("slice", "narrow")
def _slice(terms: Terms, op: Operation) -> None:
    tensor = op.tensor
    dim = position_of(op.args[1] if len(op.args) > 1 else 0, tensor)
    size, kept = int(tensor.shape[dim]), int(op.out.shape[dim])
    start = (op.args[2] if len(op.args) > 2 else None) or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = op.args[4] if op.name == "slice" and len(op.args) > 4 else 1
    axes = list(terms.of(tensor))
    if step != 1:
        reason = f"every {step}th element is taken"
        halves = (
            split(axes[dim], size // step, op.name)
            if size % step == 0 and kept * step == size
            else None
        )
        terms.fix(axes[dim] if halves is None else halves[1], reason)
        axes[dim] = fixed(kept, f"{reason} in {terms.where}") if halves is None else halves[0]
    elif kept != size:
        axes[dim] = _piece(terms, axes[dim], start, kept)
    terms.set(op.out, axes)
    carry_source(terms, tensor, op.out)


def _piece(terms: Terms, axis: Axis, start: int, length: int) -> Axis:
    """``length`` positions of an axis from ``start``; a border inside a factor pins the axis."""
    whole = axis
    if length == 0:
        return fixed(0, "empty")
    for position, keep_right in ((start, True), (length, False)):
        if 0 < position < size_of(axis):
            pieces = cut_at(axis, position)
            if pieces is None:
                terms.fix(whole, "a slice ends inside a block of the axis")
                return fixed(length, f"a slice in {terms.where}")
            axis = pieces[1] if keep_right else pieces[0]
    return axis


@rule("select", "unbind")
def _select(terms: Terms, op: Operation) -> None:
    dim = position_of(op.argument(1, "dim", 0), op.tensor)
    axes = list(terms.of(op.tensor))
    axis, reason = axes.pop(dim), "single elements of this axis are picked by their position"
    if op.name == "select" and op.argument(2, "index") in {0, -1}:  # there whatever is cut
        terms.fix_if_used(op.out, axis, reason)
    else:
        terms.fix(axis, reason)
    for result in tensors(op.out):
        terms.set(result, axes)
        carry_source(terms, op.tensor, result)


@rule("constant_pad_nd", "pad")
def _pad(terms: Terms, op: Operation) -> None:
    axes, widths = list(terms.of(op.tensor)), op.args[1]
    for back in range(len(widths) // 2):
        before, after = widths[2 * back], widths[2 * back + 1]
        axis = axes[-1 - back]
        if before < 0 or after < 0:
            axis = _piece(
                terms, axis, max(-before, 0), size_of(axis) + min(before, 0) + min(after, 0)
            )
        reason = f"padding in {terms.where}"
        parts = [
            fixed(before, reason) if before > 0 else None,
            axis,
            fixed(after, reason) if after > 0 else None,
        ]
        present = tuple(part for part in parts if part is not None)
        axes[-1 - back] = Sum(present) if len(present) > 1 else axis
    terms.set(op.out, axes)


@rule("as_strided")
def _as_strided(terms: Terms, op: Operation) -> None:
    if op.out is op.tensor and list(op.args[1]) == list(op.out.shape):
        terms.set(op.out, terms.of(op.tensor))  # another layout, as convolutions give an output
        return
    before, after = (list(zip(t.shape, t.stride(), strict=True)) for t in (op.tensor, op.out))
    axes: list[Axis] = []
    rest = list(terms.of(op.tensor))
    for position, place in enumerate(after):
        others = after[:position] + after[position + 1 :]
        if place in before and _stands_alone(*place, others):
            axes.append(rest[before.index(place)])
            rest[before.index(place)] = UNIT
        else:
            axes.append(fixed(place[0], "overlapping windows"))
    for axis in rest:
        terms.fix(axis, "windows on the memory overlap along it")
    terms.set(op.out, axes)


def _stands_alone(size: int, stride: int, others: list[tuple[int, int]]) -> bool:
    """Whether all other dimensions move within one element of this one, or by all of them."""
    inside = sum((n - 1) * step for n, step in others if step < stride)
    return inside < stride and all(
        step % (size * stride) == 0 for n, step in others if step >= stride and n > 1
    )


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    halves = split(axes[1], int(op.args[1]), f"a channel shuffle in {terms.where}")
    assert halves is not None
    axes[1] = Prod((halves[1], halves[0]))
    terms.set(op.out, axes)


@rule("roll", "flip")
def _move(terms: Terms, op: Operation) -> None:
    axes = terms.of(op.tensor)
    for dim in dims_of(op.args[-1], op.tensor):
        terms.fix(axes[dim], f"`{op.name}` moves elements along it")
    terms.set(op.out, axes)
