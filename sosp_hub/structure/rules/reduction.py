"""Reductions and normalisations: values combined along an axis."""

from torch import Tensor

from sosp_hub.structure.axes import (
    UNIT,
    cut_at,
    fixed,
    free,
    is_fixed,
    mark,
    size_of,
    split,
    unify,
)
from sosp_hub.structure.rules.registry import (
    Operation,
    carry_normalised,
    dims_of,
    elementwise,
    position_of,
    rule,
    tensors,
)
from sosp_hub.structure.terms import Terms


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean",
    "logsumexp", "norm", "linalg_vector_norm", "any", "all", "argmax", "argmin", "median",
)  # fmt: skip
def _reduce(terms: Terms, op: Operation) -> None:
    tensor = op.tensor
    axes = terms.of(tensor)
    results = list(tensors(op.out))
    if op.name in {"max", "min"} and len(op.args) > 1 and isinstance(op.args[1], Tensor):
        elementwise(terms, op)
        return
    position = 2 if op.name in {"linalg_vector_norm", "norm"} else 1
    dims = op.args[position] if len(op.args) > position else op.kwargs.get("dim")
    dims = None if isinstance(dims, bool) else dims
    reduced = dims_of(dims, tensor)
    if op.name in {"argmax", "argmin"} or (op.name in _CHOOSING and len(results) == 2):
        _choose(terms, tensor, reduced, results[-1])
    keep = results[0].dim() == tensor.dim()
    for dim in reduced:
        terms.mix(axes[dim], f"`{op.name}` runs over it")
        if (
            op.name in {"mean", "var", "var_mean", "std", "linalg_vector_norm"}
            and len(reduced) == 1
        ):
            mark(axes[dim], "normalised")
    result = [
        UNIT if dim in reduced else axis
        for dim, axis in enumerate(axes)
        if keep or dim not in reduced
    ]
    for tensor_out in results:
        terms.set(tensor_out, result)


_CHOOSING = frozenset({"max", "min", "median"})
"""Along a dimension they also say where; over all they do not."""


def _choose(terms: Terms, tensor: Tensor, dims: set[int], index: Tensor) -> None:
    """Remembers that whole numbers are positions along an axis."""
    axes = terms.of(tensor)
    if len(dims) == 1:
        (dim,) = dims
        terms.numbers[index] = terms.picked = axes[dim]
    else:
        for dim in dims:
            terms.fix(axes[dim], "positions are counted along several axes")


@rule(
    "_softmax",
    "_log_softmax",
    "softmax",
    "log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
)
def _along_dim(terms: Terms, op: Operation) -> None:
    axes = terms.of(op.tensor)
    if op.tensor in terms.tallies:
        terms.counts = True
    elif axes:
        terms.mix(axes[position_of(op.args[1], op.tensor)], f"`{op.name.strip('_')}` runs over it")
    terms.set(op.out, axes)


@rule("topk", "sort", "argsort", "kthvalue", "cummax", "cummin")
def _order(terms: Terms, op: Operation) -> None:
    tensor = op.tensor
    position = {"topk": 2, "kthvalue": 2}.get(op.name, 1)
    dim = (
        op.args[position]
        if len(op.args) > position and not isinstance(op.args[position], bool)
        else op.kwargs.get("dim", -1)
    )
    axes = list(terms.of(tensor))
    dim = position_of(dim, tensor)
    first = next(iter(tensors(op.out)))
    if op.name == "topk" and not is_fixed(axes[dim]):
        terms.mix(axes[dim], "`topk` chooses among them")
        _choose(terms, tensor, {dim}, op.out[1])
        terms.take(int(first.shape[dim]), axes[dim])
    else:
        terms.fix(axes[dim], f"`{op.name}` orders the elements along it")
    if first.dim() == tensor.dim():
        axes[dim] = fixed(int(first.shape[dim]), f"`{op.name}` in {terms.where}")
    else:  # the k-th of them alone
        del axes[dim]
    for result in tensors(op.out):
        terms.set(result, axes)


@rule("histc")
def _count(terms: Terms, op: Operation) -> None:
    numbered = terms.numbers.get(op.tensor)
    low, high = op.argument(2, "min", 0), op.argument(3, "max", 0)
    bins = int(op.out.shape[0])
    if numbered is None or bins != size_of(numbered) or (low, high) != (0, bins - 1):
        for axis in [] if numbered is None else [numbered]:
            terms.fix(axis, "positions along it are counted in other bins")
        raise ValueError("bins that are no positions")
    terms.set(op.out, [numbered])
    terms.tallies[op.out] = True


@rule("tril", "triu")
def _triangle(terms: Terms, op: Operation) -> None:
    axes = terms.of(op.tensor)
    for axis in axes[-2:]:
        terms.fix(axis, f"`{op.name}` counts positions along it")
    terms.set(op.out, axes)


@rule("glu")
def _glu(terms: Terms, op: Operation) -> None:
    tensor = op.tensor
    dim = position_of(op.args[1] if len(op.args) > 1 else -1, tensor)
    axes = list(terms.of(tensor))
    pieces = cut_at(axes[dim], int(op.out.shape[dim]))
    assert pieces is not None
    unify(pieces[0], pieces[1], f"`glu` in {terms.where}")
    axes[dim] = pieces[0]
    terms.set(op.out, axes)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
    "_native_batch_norm_legit_functional",
)  # fmt: skip
def _batch_norm(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    result = op.out[0]
    for statistic in tensors(op.args[1:]):
        unify(axes[1], terms.of(statistic)[0], f"batch norm in {terms.where}")
    flags = [arg for arg in op.args if isinstance(arg, bool)]
    training = flags[0] if flags else op.name == "_batch_norm_with_update"
    if training or not any(isinstance(arg, Tensor) for arg in op.args[3:5]):
        for dim, axis in enumerate(axes):
            if dim != 1:
                terms.mix(axis, "statistics are taken over it")
        carry_normalised(terms, op.tensor, result)  # a standardised weight
    terms.set(result, axes)
    for extra in op.out[1:]:
        if isinstance(extra, Tensor):
            terms.set(
                extra,
                [axes[1]]
                if extra.dim() == 1 and extra.numel()
                else [free(int(s)) for s in extra.shape],
            )


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    count = len(op.args[1])
    for scale in tensors(op.args[2:]):
        for mine, theirs in zip(axes[-count:], terms.of(scale), strict=True):
            unify(mine, theirs, f"layer norm in {terms.where}")
    for axis in axes[-count:]:
        terms.mix(axis, "a normalisation runs over it")
        mark(axis, "normalised")
    results = list(tensors(op.out))
    terms.set(results[0], axes)
    for extra in results[1:]:
        terms.set(extra, axes[:-count] + [UNIT] * (extra.dim() - len(axes) + count))


@rule("native_group_norm", "group_norm")
def _group_norm(terms: Terms, op: Operation) -> None:
    tensor, groups = op.tensor, int(op.args[6] if op.name == "native_group_norm" else op.args[1])
    axes = list(terms.of(tensor))
    for scale in tensors(op.args[1:]):
        unify(axes[1], terms.of(scale)[0], f"group norm in {terms.where}")
    halves = split(axes[1], groups, f"group norm in {terms.where}")
    if halves is None:
        raise ValueError("groups do not divide the channels")
    terms.mix(halves[1], "a group normalisation runs over it")
    results = list(tensors(op.out))
    terms.set(results[0], axes)
    for extra in results[1:]:
        terms.set(
            extra,
            [axes[0], halves[0]] if extra.dim() == 2 else [free(int(s)) for s in extra.shape],
        )


@rule("_weight_norm_interface")
def _weight_norm(terms: Terms, op: Operation) -> None:
    direction, length = terms.of(op.tensor), terms.of(op.args[1])
    dim = position_of(op.argument(2, "dim", 0), op.tensor)
    unify(direction[dim], length[dim], f"weight norm in {terms.where}")
    for other, axis in enumerate(direction):
        if other != dim:
            terms.mix(axis, "a weight normalisation runs over it")
    weight, norms = op.out
    terms.set(weight, direction)
    terms.set(norms, length)
    carry_normalised(terms, op.tensor, weight)
