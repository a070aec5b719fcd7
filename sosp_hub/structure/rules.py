"""One rule per operation: how the axes of its outputs follow from those of its inputs.

A rule runs after the operation, unifies what must be cut alike and sets the outputs' axes. An operation without a rule
pins everything it touches: correctness stays, only coverage is lost.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sosp_hub.structure.axes import (
    UNIT,
    Axis,
    Prod,
    Sum,
    cut_at,
    fixed,
    free,
    mark,
    pin,
    resolve,
    size_of,
    split,
    unify,
)
from sosp_hub.structure.terms import Axes, Terms

Rule = Callable[[Terms, str, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}

# Elementwise operations that PyTorch does not tag as such.
_ELEMENTWISE = {
    "hardswish", "hardsigmoid", "hardtanh", "prelu", "_prelu_kernel", "_to_copy", "copy", "native_dropout", "dropout",
    "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "zeros_like", "ones_like", "full_like",
    "empty_like", "rand_like", "randn_like", "masked_fill", "where", "fill", "zero", "softplus", "log_sigmoid_forward",
    "elu", "mish", "bernoulli", "to", "type_as", "bitwise_not", "logical_not",
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations by their ATen name."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def apply_rule(terms: Terms, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
    """Runs the rule of one operation; what has none, or a rule that does not fit, pins all that it touches."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    chosen = RULES.get(plain)
    if chosen is None and (plain in _ELEMENTWISE or torch.Tag.pointwise in getattr(func, "tags", ())):
        chosen = elementwise
    try:
        (chosen or unknown)(terms, plain, args, kwargs, out)
    except (AssertionError, IndexError, TypeError, ValueError):
        unknown(terms, plain, args, kwargs, out)


def tensors(values: Any) -> Iterable[Tensor]:  # noqa: ANN401
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(tuple(values.values()))


def unknown(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
    """No rule: pin the inputs, start afresh with fixed outputs."""
    reason = f"operation `{name}` has no rule"
    for tensor in tensors((args, kwargs)):
        for axis in terms.of(tensor):
            terms.fix(axis, reason)
    for tensor in tensors(out):
        terms.axes[tensor] = tuple(fixed(size, f"{reason} in {terms.where}") for size in tensor.shape)


def broadcast(terms: Terms, operands: Sequence[Axes], what: str) -> list[Axis]:
    """Axes of the broadcast of several operands, aligned at the right."""
    result: list[Axis] = [UNIT] * max((len(axes) for axes in operands), default=0)
    for axes in operands:
        for position, axis in enumerate(reversed(axes), 1):
            if size_of(axis) == 1:
                continue
            if size_of(result[-position]) == 1:
                result[-position] = axis
            else:
                unify(result[-position], axis, f"{what} in {terms.where}")
    return result


def elementwise(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
    """Every output element depends on the elements at the same place."""
    operands = list(tensors((args, kwargs)))
    axes = broadcast(terms, [terms.of(operand) for operand in operands], name)
    if name in {"add", "sub"} and len(operands) == 2:  # noqa: PLR2004
        full = [o for o in operands if not terms.is_parameter(o) and o.dim() == len(axes) and o.dim() > 1]
        if len(full) == 2 and full[0].shape == full[1].shape:  # noqa: PLR2004
            for axis in axes:
                mark(axis, "stream")
    for tensor in tensors(out):
        terms.set(tensor, axes if tensor.dim() == len(axes) else ())
    if len(operands) == 1 and name in {"detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh"}:
        _carry_source(terms, operands[0], out)


def _carry_source(terms: Terms, tensor: Tensor, out: Any) -> None:  # noqa: ANN401
    """A rearranged parameter is still that parameter."""
    name = terms.source.get(tensor)
    if name is not None:
        for result in tensors(out):
            terms.source[result] = name


def _axis(dim: int, tensor: Tensor) -> int:
    return dim % tensor.dim() if tensor.dim() else 0


def _dims(dims: Any, tensor: Tensor) -> set[int]:  # noqa: ANN401
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return set(range(tensor.dim()))
    return {_axis(dim, tensor) for dim in ([dims] if isinstance(dims, int) else dims)}


# --- shape ------------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source = args[0]
    axes = reshape(terms, list(terms.of(source)), [int(size) for size in out.shape], name)
    terms.set(out, axes)
    _carry_source(terms, source, out)


def reshape(terms: Terms, axes: list[Axis], sizes: list[int], what: str) -> list[Axis]:
    """Row-major regrouping: factors are consumed from the left and split where an output border falls inside one."""
    factors: list[Axis] = [axis for axis in axes if size_of(axis) != 1]
    result: list[Axis] = []
    for position, size in enumerate(sizes):
        taken: list[Axis] = []
        missing = size
        while missing > 1:
            factor = resolve(factors.pop(0))
            length = size_of(factor)
            if missing % length == 0:
                taken.append(factor)
                missing //= length
                continue
            parts = list(factor.factors) if isinstance(factor, Prod) else None
            if parts:
                factors[:0] = parts
                continue
            halves = split(factor, missing, f"{what} in {terms.where}") if length % missing == 0 else None
            if halves is None:
                for axis in (*taken, factor, *factors):
                    terms.fix(axis, f"`{what}` regroups {[size_of(a) for a in axes]} as {sizes}")
                return result + [fixed(rest, f"`{what}` in {terms.where}") for rest in sizes[position:]]
            taken.append(halves[0])
            factors.insert(0, halves[1])
            missing = 1
        result.append(Prod(tuple(taken)) if len(taken) != 1 else taken[0])
    return result


@rule("t", "transpose", "numpy_T", "mT", "swapaxes")
def _transpose(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = list(terms.of(args[0]))
    one, two = (args[1], args[2]) if len(args) > 2 else (-2, -1)  # noqa: PLR2004
    if len(axes) > 1:
        axes[one], axes[two] = axes[two], axes[one]
    terms.set(out, axes)
    _carry_source(terms, args[0], out)


@rule("permute")
def _permute(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = terms.of(args[0])
    terms.set(out, [axes[dim] for dim in args[1]])
    _carry_source(terms, args[0], out)


@rule("unsqueeze")
def _unsqueeze(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = list(terms.of(args[0]))
    axes.insert(args[1] % out.dim(), UNIT)
    terms.set(out, axes)
    _carry_source(terms, args[0], out)


@rule("squeeze")
def _squeeze(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dims = _dims(args[1] if len(args) > 1 else None, args[0])
    terms.set(out, [a for i, a in enumerate(terms.of(args[0])) if not (i in dims and size_of(a) == 1)])
    _carry_source(terms, args[0], out)


@rule("expand", "broadcast_to")
def _expand(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = list(terms.of(args[0]))
    axes = [UNIT] * (out.dim() - len(axes)) + axes
    result: list[Axis] = []
    for axis, size in zip(axes, out.shape, strict=True):
        if size_of(axis) == 1 and size != 1:
            axis = free(int(size))
            mark(axis, "copies")
        result.append(axis)
    terms.set(out, result)


@rule("repeat", "tile")
def _repeat(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = list(terms.of(args[0]))
    axes = [UNIT] * (out.dim() - len(axes)) + axes
    reason = f"`{name}` in {terms.where}"
    terms.set(out, [Prod((fixed(int(s) // size_of(a), reason), a)) for a, s in zip(axes, out.shape, strict=True)])


@rule("cat", "concatenate", "concat")
def _cat(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    pieces = [piece for piece in args[0] if piece.dim() == out.dim() and piece.numel()] or list(args[0])
    dim = _axis(args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
    axes = [terms.of(piece) for piece in pieces]
    result = list(axes[0])
    for other in axes[1:]:
        for i in range(out.dim()):
            if i != dim:
                unify(result[i], other[i], f"`cat` in {terms.where}")
    result[dim] = Sum(tuple(a[dim] for a in axes))
    terms.set(out, result)


@rule("stack")
def _stack(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = _axis(args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
    axes = broadcast(terms, [terms.of(piece) for piece in args[0]], name)
    axes.insert(dim, fixed(len(args[0]), f"`stack` in {terms.where}"))
    terms.set(out, axes)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy")
def _split(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = _axis(args[2] if len(args) > 2 else kwargs.get("dim", 0), args[0])  # noqa: PLR2004
    axes = list(terms.of(args[0]))
    rest = axes[dim]
    for piece in out:
        size = int(piece.shape[dim])
        if size == size_of(rest):
            head = rest
        else:
            pieces = cut_at(rest, size) if size else (fixed(0, "empty"), rest)
            if pieces is None:
                raise ValueError("a border falls inside a factor")
            head, rest = pieces
        axes[dim] = head
        terms.set(piece, axes)
        _carry_source(terms, args[0], piece)


@rule("slice", "narrow")
def _slice(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    dim = _axis(args[1] if len(args) > 1 else 0, tensor)
    size, kept = int(tensor.shape[dim]), int(out.shape[dim])
    start = (args[2] if len(args) > 2 else None) or 0  # noqa: PLR2004
    start = min(max(start + size if start < 0 else start, 0), size)
    step = args[4] if name == "slice" and len(args) > 4 else 1  # noqa: PLR2004
    axes = list(terms.of(tensor))
    if step != 1:
        halves = split(axes[dim], size // step, name) if size % step == 0 and kept * step == size else None
        if halves is None:
            raise ValueError("a stride that does not divide the axis")
        terms.fix(halves[1], f"every {step}th element is taken")
        axes[dim] = halves[0]
    elif kept != size:
        axes[dim] = _piece(terms, axes[dim], start, kept)
    terms.set(out, axes)
    _carry_source(terms, tensor, out)


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
def _select(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = _axis(args[1] if len(args) > 1 else kwargs.get("dim", 0), args[0])
    axes = list(terms.of(args[0]))
    terms.fix(axes.pop(dim), "single elements of this axis are picked by their position")
    for result in tensors(out):
        terms.set(result, axes)
        _carry_source(terms, args[0], result)


@rule("constant_pad_nd", "pad")
def _pad(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes, widths = list(terms.of(args[0])), args[1]
    for back in range(len(widths) // 2):
        before, after = widths[2 * back], widths[2 * back + 1]
        axis = axes[-1 - back]
        if before < 0 or after < 0:
            axis = _piece(terms, axis, max(-before, 0), size_of(axis) + min(before, 0) + min(after, 0))
        reason = f"padding in {terms.where}"
        parts = [fixed(before, reason) if before > 0 else None, axis, fixed(after, reason) if after > 0 else None]
        present = tuple(part for part in parts if part is not None)
        axes[-1 - back] = Sum(present) if len(present) > 1 else axis
    terms.set(out, axes)


@rule("as_strided")
def _as_strided(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if not func_is_relayout(args, out):
        raise ValueError("a new view of the memory")
    terms.set(out, terms.of(args[0]))


def func_is_relayout(args: tuple[Any, ...], out: Tensor) -> bool:
    """Whether ``as_strided_`` only changed the memory layout of its argument (convolutions do that to an output)."""
    return out is args[0] and list(args[1]) == list(out.shape)


@rule("roll", "flip")
def _move(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = terms.of(args[0])
    for dim in _dims(args[-1], args[0]):
        terms.fix(axes[dim], f"`{name}` moves elements along it")
    terms.set(out, axes)


@rule("pixel_shuffle")
def _pixel_shuffle(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    *lead, channels, height, width = terms.of(args[0])
    halves = split(channels, int(out.shape[-3]), name)
    assert halves is not None
    terms.fix(halves[1], "`pixel_shuffle` moves it into the picture")
    spatial = [terms.spatial(a, int(s), name) for a, s in zip((height, width), out.shape[-2:], strict=True)]
    terms.set(out, [*lead, halves[0], *spatial])


@rule("pixel_unshuffle")
def _pixel_unshuffle(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    *lead, channels, height, width = terms.of(args[0])
    factor = fixed(int(out.shape[-3]) // size_of(channels), f"`{name}` in {terms.where}")
    spatial = [terms.spatial(a, int(s), name) for a, s in zip((height, width), out.shape[-2:], strict=True)]
    terms.set(out, [*lead, Prod((channels, factor)), *spatial])


@rule("im2col")
def _im2col(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    *lead, channels, height, width = terms.of(args[0])
    window = fixed(int(out.shape[-2]) // size_of(channels), f"`unfold` in {terms.where}")
    terms.spatial(height, 1, "`unfold`"), terms.spatial(width, 1, "`unfold`")
    terms.set(out, [*lead, Prod((channels, window)), fixed(int(out.shape[-1]), f"`unfold` in {terms.where}")])


# --- factories and look-ups -------------------------------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
def _constant(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    terms.set(out, [free(int(size)) for size in out.shape])


@rule("arange", "linspace", "rand", "randn", "randint", "eye", "randperm", "scalar_tensor", "tensor")
def _series(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    terms.set(out, [fixed(int(size), f"`{name}` in {terms.where}") for size in out.shape])


@rule("embedding")
def _embedding(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    vocabulary, width = terms.of(args[0])
    terms.fix(vocabulary, "rows are looked up by number")
    terms.set(out, [*terms.of(args[1]), width])


@rule("index", "index_put")
def _index(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor, indices = args[0], list(args[1])
    axes = list(terms.of(tensor))
    used = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in used:
        width = indices[dim].dim() if indices[dim].dtype in {torch.bool, torch.uint8} else 1
        for covered in range(dim, dim + width):
            terms.fix(axes[covered], "positions along it are picked by an index")
    if name == "index_put":
        terms.set(out, axes)
        for axis, value in zip(reversed(axes), reversed(terms.of(args[2])), strict=False):
            if size_of(axis) == size_of(value) and size_of(value) != 1:
                unify(axis, value, f"`{name}` in {terms.where}")
        return
    if any(indices[dim].dtype in {torch.bool, torch.uint8} for dim in used):
        first, width = used[0], indices[used[0]].dim()
        if len(used) > 1:
            raise ValueError("several masks")
        picked: list[Axis] = [fixed(int(out.shape[first]), f"a mask in {terms.where}")]
        terms.set(out, [*axes[:first], *picked, *axes[first + width :]])
        return
    picked = broadcast(terms, [terms.of(indices[dim]) for dim in used], name)
    rest = [axis for dim, axis in enumerate(axes) if dim not in used]
    together = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if together else 0
    terms.set(out, [*rest[:at], *picked, *rest[at:]])
    if terms.source.get(tensor) is not None and not rest:
        return
    _carry_source(terms, tensor, out)


@rule("index_select", "gather", "scatter", "scatter_add", "index_add", "index_copy", "take_along_dim", "index_fill")
def _along(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor, dim = args[0], _axis(args[1], args[0])
    axes = list(terms.of(tensor))
    terms.fix(axes[dim], "positions along it are picked by an index")
    for other in tensors(args[2:]):
        if other.dim() == len(axes):
            for i, (mine, theirs) in enumerate(zip(axes, terms.of(other), strict=True)):
                if i == dim:
                    terms.fix(theirs, f"`{name}`")
                elif size_of(mine) == size_of(theirs):
                    unify(mine, theirs, f"`{name}` in {terms.where}")
                else:
                    terms.fix(mine, f"`{name}`"), terms.fix(theirs, f"`{name}`")
    if out.shape != tensor.shape:
        axes = [a if size_of(a) == s else fixed(int(s), f"`{name}`") for a, s in zip(axes, out.shape, strict=True)]
    terms.set(out, axes)


# --- reductions and normalisations ------------------------------------------------------------------------------------


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "norm",
    "linalg_vector_norm", "any", "all", "argmax", "argmin", "median",
)  # fmt: skip
def _reduce(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    axes = terms.of(tensor)
    results = list(tensors(out))
    if name in {"max", "min"} and len(args) > 1 and isinstance(args[1], Tensor):
        elementwise(terms, name, args, kwargs, out)
        return
    position = 2 if name in {"linalg_vector_norm", "norm"} else 1
    dims = args[position] if len(args) > position else kwargs.get("dim")
    dims = None if isinstance(dims, bool) else dims
    reduced = _dims(dims, tensor)
    keep = results[0].dim() == tensor.dim()
    for dim in reduced:
        terms.mix(axes[dim], f"`{name}` runs over it")
        if name in {"mean", "var", "var_mean", "std", "linalg_vector_norm"} and len(reduced) == 1:
            mark(axes[dim], "normalised")
    result = [UNIT if dim in reduced else axis for dim, axis in enumerate(axes) if keep or dim not in reduced]
    for tensor_out in results:
        terms.set(tensor_out, result)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp")
def _along_dim(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = terms.of(args[0])
    if axes:
        terms.mix(axes[_axis(args[1], args[0])], f"`{name.strip('_')}` runs over it")
    terms.set(out, axes)


@rule("topk", "sort", "argsort", "kthvalue")
def _order(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    position = {"topk": 2, "kthvalue": 2}.get(name, 1)
    dim = args[position] if len(args) > position and not isinstance(args[position], bool) else kwargs.get("dim", -1)
    axes = list(terms.of(tensor))
    dim = _axis(dim, tensor)
    terms.fix(axes[dim], f"`{name}` orders the elements along it")
    first = next(iter(tensors(out)))
    axes[dim] = fixed(int(first.shape[dim]), f"`{name}` in {terms.where}")
    for result in tensors(out):
        terms.set(result, axes)


@rule("tril", "triu")
def _triangle(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = terms.of(args[0])
    for axis in axes[-2:]:
        terms.fix(axis, f"`{name}` counts positions along it")
    terms.set(out, axes)


@rule("glu")
def _glu(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    dim = _axis(args[1] if len(args) > 1 else -1, tensor)
    axes = list(terms.of(tensor))
    pieces = cut_at(axes[dim], int(out.shape[dim]))
    assert pieces is not None
    unify(pieces[0], pieces[1], f"`glu` in {terms.where}")
    axes[dim] = pieces[0]
    terms.set(out, axes)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "_native_batch_norm_legit_functional",
)  # fmt: skip
def _batch_norm(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = list(terms.of(args[0]))
    result = out[0]
    for statistic in tensors(args[1:]):
        unify(axes[1], terms.of(statistic)[0], f"batch norm in {terms.where}")
    flags = [arg for arg in args if isinstance(arg, bool)]
    training = flags[0] if flags else name == "_batch_norm_with_update"
    if training or not any(isinstance(arg, Tensor) for arg in args[3:5]):
        for dim, axis in enumerate(axes):
            if dim != 1:
                terms.mix(axis, "statistics are taken over it")
    terms.set(result, axes)
    for extra in out[1:]:
        if isinstance(extra, Tensor):
            terms.set(extra, [axes[1]] if extra.dim() == 1 and extra.numel() else [free(int(s)) for s in extra.shape])


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    axes = list(terms.of(args[0]))
    count = len(args[1])
    for scale in tensors(args[2:]):
        for mine, theirs in zip(axes[-count:], terms.of(scale), strict=True):
            unify(mine, theirs, f"layer norm in {terms.where}")
    for axis in axes[-count:]:
        terms.mix(axis, "a normalisation runs over it")
        mark(axis, "normalised")
    results = list(tensors(out))
    terms.set(results[0], axes)
    for extra in results[1:]:
        terms.set(extra, axes[:-count] + [UNIT] * (extra.dim() - len(axes) + count))


@rule("native_group_norm", "group_norm")
def _group_norm(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor, groups = args[0], int(args[6] if name == "native_group_norm" else args[1])
    axes = list(terms.of(tensor))
    for scale in tensors(args[1:]):
        unify(axes[1], terms.of(scale)[0], f"group norm in {terms.where}")
    halves = split(axes[1], groups, f"group norm in {terms.where}")
    if halves is None:
        terms.fix(axes[1], f"group norm with {groups} groups")
    else:
        terms.mix(halves[1], "a group normalisation runs over it")
    results = list(tensors(out))
    terms.set(results[0], axes)
    for extra in results[1:]:
        terms.set(extra, [axes[0], fixed(groups, "group norm")] if extra.dim() == 2 else [free(int(s)) for s in extra.shape])  # noqa: PLR2004


# --- sums over an axis: the places where activations are read ---------------------------------------------------------


def _contract(terms: Terms, left: Tensor, one: Axis, right: Tensor, two: Axis, what: str) -> None:
    unify(one, two, f"{what} in {terms.where}")
    terms.read(left, one)
    terms.read(right, two)
    if not terms.is_parameter(left) and not terms.is_parameter(right):
        mark(one, "contracted")


@rule("mm", "addmm")
def _mm(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    left, right = args[-2:]
    (rows, inner), (other, columns) = terms.of(left), terms.of(right)
    _contract(terms, left, inner, right, other, "a matrix product")
    result = [rows, columns]
    if name == "addmm":
        broadcast(terms, [tuple(result), terms.of(args[0])], name)
    terms.macs.append((rows, inner, columns))
    terms.set(out, result)


@rule("bmm", "baddbmm")
def _bmm(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    left, right = args[-2:]
    (batch, rows, inner), (batch_too, other, columns) = terms.of(left), terms.of(right)
    unify(batch, batch_too, f"a batched product in {terms.where}")
    _contract(terms, left, inner, right, other, "a batched product")
    mark(batch, "expert" if terms.is_parameter(left) or terms.is_parameter(right) else "head")
    result = [batch, rows, columns]
    if name == "baddbmm":
        broadcast(terms, [tuple(result), terms.of(args[0])], name)
    terms.macs.append((batch, rows, inner, columns))
    terms.set(out, result)


@rule("mv", "dot", "addmv")
def _mv(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    left, right = args[-2:]
    _contract(terms, left, terms.of(left)[-1], right, terms.of(right)[0], "a matrix product")
    terms.macs.append(terms.of(left))
    terms.set(out, terms.of(left)[:-1])


@rule("linear")
def _linear(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    left, right = args[:2]
    *lead, inner = terms.of(left)
    columns, other = terms.of(right)
    _contract(terms, left, inner, right, other, "a linear layer")
    for bias in tensors(args[2:]):
        unify(columns, terms.of(bias)[0], f"a bias in {terms.where}")
    terms.macs.append((*lead, inner, columns))
    terms.set(out, [*lead, columns])


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor, weight, bias = args[:3]
    transposed, groups = bool(args[6]), int(args[8])
    batch, channels, *window_in = terms.of(tensor)
    first, second, *window = terms.of(weight)
    where = f"a convolution in {terms.where}"
    halves = split(channels, groups, where), split(first, groups, where)
    if halves[0] is None or halves[1] is None:
        raise ValueError("groups do not divide the channels")
    (groups_in, inner), (groups_out, per_group) = halves
    unify(groups_in, groups_out, where)
    if transposed:
        _contract(terms, tensor, inner, weight, per_group, where)
        result: Axis = Prod((groups_out, second))
    else:
        _contract(terms, tensor, inner, weight, second, where)
        result = first
    if bias is not None:
        unify(result, terms.of(bias)[0], where)
    for axis in window:
        terms.fix(axis, "the window of a convolution")
    spatial = [terms.spatial(a, int(s), "a window slides along it") for a, s in zip(window_in, out.shape[2:], strict=True)]
    places = window_in if transposed else spatial
    terms.macs.append((batch, groups_out, per_group, second, *places, *window))
    terms.set(out, [batch, result, *spatial])


_RESAMPLE = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d",
    "max_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "reflection_pad1d", "reflection_pad2d", "replication_pad2d",
    "upsample_linear1d", "adaptive_avg_pool2d", "mkldnn_max_pool2d",
)  # fmt: skip


@rule(*_RESAMPLE)
def _resample(terms: Terms, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensor = args[0]
    axes = terms.of(tensor)
    flat = name.endswith("1d")
    num_spatial = 1 if flat else (3 if "3d" in name else 2)
    lead = list(axes[:-num_spatial])
    for result in tensors(out):
        sizes = result.shape[-num_spatial:]
        spatial = [terms.spatial(a, int(s), f"`{name}` resamples it") for a, s in zip(axes[-num_spatial:], sizes, strict=True)]
        terms.set(result, [*lead, *spatial])


def attention(terms: Terms, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, scaled: bool) -> None:
    """``scaled_dot_product_attention``: (..., heads, length, width); KV heads may be shared by several query heads."""
    *lead_q, length, width = terms.of(query)
    *lead_k, places, width_k = terms.of(key)
    *lead_v, places_v, width_v = terms.of(value)
    what = f"attention in {terms.where}"
    unify(width, width_k, what), unify(places, places_v, what)
    mark(width, "contracted")
    if not scaled:
        terms.mix(width, "attention is scaled by 1/sqrt(its size)")
    for one, two in zip(lead_k, lead_v, strict=True):
        unify(one, two, what)
    for i, (one, two) in enumerate(zip(lead_q, lead_k, strict=True)):
        if size_of(one) != size_of(two) and i == len(lead_q) - 1:
            copies = free(size_of(one) // size_of(two))
            mark(copies, "copies")
            unify(one, Prod((two, copies)), what)
        elif size_of(one) == size_of(two):
            unify(one, two, what)
    mark(lead_q[-1] if lead_q else UNIT, "head")
    pin(places, what)
    if mask is not None:
        broadcast(terms, [(*lead_q, length, places), terms.of(mask)], what)
    terms.macs += [(*lead_q, length, width, places), (*lead_q, length, places, width_v)]
    terms.set(out, [*lead_q, length, width_v])
