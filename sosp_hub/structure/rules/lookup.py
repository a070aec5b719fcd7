"""New tensors, and elements picked by an index."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sosp_hub.structure.axes import Axis, Prod, Sum, fixed, free, size_of, unify
from sosp_hub.structure.rules.registry import (
    Operation,
    broadcast,
    carry_source,
    picks,
    position_of,
    rule,
    tensors,
)
from sosp_hub.structure.terms import Terms


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "empty_strided",
    "rand",
    "randn",
)
def _constant(terms: Terms, op: Operation) -> None:
    terms.set(op.out, [free(int(size)) for size in op.out.shape])


@rule("arange", "linspace", "randint", "eye", "randperm", "scalar_tensor", "tensor")
def _series(terms: Terms, op: Operation) -> None:
    terms.set(op.out, [fixed(int(size), f"`{op.name}` in {terms.where}") for size in op.out.shape])


@rule("embedding")
def _embedding(terms: Terms, op: Operation) -> None:
    vocabulary, width = terms.of(op.tensor)
    terms.fix(vocabulary, "rows are looked up by number")
    terms.set(op.out, [*terms.of(op.args[1]), width])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(terms: Terms, op: Operation) -> None:
    vocabulary, width = terms.of(op.tensor)
    terms.fix(vocabulary, "rows are looked up by number")
    bags, *others = op.out
    terms.set(bags, [fixed(int(bags.shape[0]), f"bags in {terms.where}"), width])
    for other in others:
        terms.set(other, [fixed(int(size), f"bags in {terms.where}") for size in other.shape])


@rule("_pack_padded_sequence")
def _packed(terms: Terms, op: Operation) -> None:
    """Rows of all samples that are no padding, step by step, and how many each step has."""
    reason = "steps of samples of different lengths are packed"
    _, _, *inside = terms.of(op.tensor)
    for axis in terms.of(op.tensor)[:2]:
        terms.fix(axis, reason)
    rows, numbers = op.out
    terms.set(rows, [fixed(len(rows), f"{reason} in {terms.where}"), *inside])
    terms.set(numbers, [fixed(len(numbers), f"{reason} in {terms.where}")])


@rule("bucketize", "searchsorted")
def _bins(terms: Terms, op: Operation) -> None:
    values, borders = op.args[:2] if op.name == "bucketize" else (op.args[1], op.args[0])
    for axis in terms.of(borders):
        terms.fix(axis, "the places of values among them are counted")
    terms.set(op.out, terms.of(values) if isinstance(values, Tensor) else ())


@rule("masked_scatter")
def _masked_scatter(terms: Terms, op: Operation) -> None:
    """Whole rows that a mask chooses are set to the rows of another tensor, in their order."""
    tensor, mask, source = op.args[:3]
    inside = tensor.dim() - _differs_along(mask)
    axes = terms.of(tensor)
    rows = terms.of(source)
    if mask.dim() != tensor.dim() or not inside:
        raise ValueError("a mask of single elements")
    for one, two in zip(axes[-inside:], rows[-inside:], strict=True):
        unify(one, two, f"`{op.name}` in {terms.where}")
    _follow_mask(terms, op, mask, axes, tensor.dim() - inside)
    for axis in (*axes[:-inside], *rows[:-inside]):
        terms.fix(axis, "positions along it are picked by a mask")
    terms.set(op.out, axes)


def _follow_mask(
    terms: Terms, op: Operation, mask: Tensor, axes: Sequence[Axis], start: int
) -> None:
    """From that dimension on an expanded mask is as long as what it chooses of."""
    for one, two in zip(axes[start:], terms.of(mask)[start:], strict=False):
        if size_of(two) != 1:
            unify(one, two, f"`{op.name}` in {terms.where}")


def _differs_along(mask: Tensor) -> int:
    """Number of leading dimensions of a mask; along the others it is of size one or expanded."""
    count = mask.dim()
    while count and (mask.shape[count - 1] == 1 or not mask.stride(count - 1)):
        count -= 1
    return count


@rule("index", "index_put")
def _index(terms: Terms, op: Operation) -> None:
    tensor, indices = op.tensor, list(op.args[1])
    axes = list(terms.of(tensor))
    if op.name == "index" and len(indices) == 1 and indices[0].dtype == torch.bool:
        chosen = _differs_along(indices[0])
        rows = prod(tensor.shape[chosen : indices[0].dim()])
        if rows > 1:  # the mask was expanded, as the one of `masked_scatter` is
            for axis in axes[:chosen]:
                terms.fix(axis, "positions along it are picked by a mask")
            _follow_mask(terms, op, indices[0], axes, chosen)
            number = fixed(int(op.out.shape[0]) // rows, f"a mask in {terms.where}")
            whole = Prod((number, *axes[chosen : indices[0].dim()]))
            terms.set(op.out, [whole, *axes[indices[0].dim() :]])
            return
    used = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in used:
        width = indices[dim].dim() if indices[dim].dtype in {torch.bool, torch.uint8} else 1
        for covered in range(dim, dim + width):
            if not picks(terms, indices[dim], axes[covered]):
                terms.fix(axes[covered], "positions along it are picked by an index")
    if any(indices[dim].dtype in {torch.bool, torch.uint8} for dim in used):
        first, width = used[0], indices[used[0]].dim()
        if len(used) > 1:
            raise ValueError("several masks")
        rest = [*axes[:first], *axes[first + width :]]
        picked: list[Axis] | None = None
        at = first
    else:
        picked = broadcast(terms, [terms.of(indices[dim]) for dim in used], op.name)
        rest = [axis for dim, axis in enumerate(axes) if dim not in used]
        at = used[0] if used == list(range(used[0], used[0] + len(used))) else 0
    if op.name == "index_put":
        terms.set(op.out, axes)
        places = [*rest[:at], *([None] if picked is None else picked), *rest[at:]]
        for axis, value in zip(reversed(places), reversed(terms.of(op.args[2])), strict=False):
            if axis is None:
                terms.fix(value, "it is put, in its order, where a mask says")
            elif size_of(axis) == size_of(value) and size_of(value) != 1:
                unify(axis, value, f"`{op.name}` in {terms.where}")
        return
    if picked is None:
        number = fixed(int(op.out.shape[at]), f"a mask in {terms.where}")
        terms.set(op.out, [*rest[:at], number, *rest[at:]])
        return
    terms.set(op.out, [*rest[:at], *picked, *rest[at:]])
    if terms.source.get(tensor) is not None and not rest:
        return
    carry_source(terms, tensor, op.out)


@rule(
    "index_select",
    "gather",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "take_along_dim",
    "index_fill",
)
def _along(terms: Terms, op: Operation) -> None:
    tensor, dim = op.tensor, position_of(op.args[1], op.tensor)
    axes = list(terms.of(tensor))
    if not picks(terms, op.args[2], axes[dim]):
        terms.fix(axes[dim], "positions along it are picked by an index")
    for other in tensors(op.args[2:]):
        if other.dim() == len(axes):
            for i, (mine, theirs) in enumerate(zip(axes, terms.of(other), strict=True)):
                if i == dim:
                    terms.fix(theirs, f"`{op.name}`")
                elif size_of(mine) == size_of(theirs):
                    unify(mine, theirs, f"`{op.name}` in {terms.where}")
                else:
                    terms.fix(Sum((mine, theirs)), f"`{op.name}`")
    if op.out.shape != tensor.shape or op.name in {"gather", "index_select"}:
        axes = [
            a if size_of(a) == s and i != dim else fixed(int(s), f"`{op.name}`")
            for i, (a, s) in enumerate(zip(axes, op.out.shape, strict=True))
        ]
    terms.set(op.out, axes)
