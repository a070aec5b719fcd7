"""New tensors, and elements picked by an index."""

import torch

from sosp_hub.structure.axes import Axis, Sum, fixed, free, size_of, unify
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
)
def _constant(terms: Terms, op: Operation) -> None:
    terms.set(op.out, [free(int(size)) for size in op.out.shape])


@rule(
    "arange", "linspace", "rand", "randn", "randint", "eye", "randperm", "scalar_tensor", "tensor"
)
def _series(terms: Terms, op: Operation) -> None:
    terms.set(op.out, [fixed(int(size), f"`{op.name}` in {terms.where}") for size in op.out.shape])


@rule("embedding")
def _embedding(terms: Terms, op: Operation) -> None:
    vocabulary, width = terms.of(op.tensor)
    terms.fix(vocabulary, "rows are looked up by number")
    terms.set(op.out, [*terms.of(op.args[1]), width])


@rule("index", "index_put")
def _index(terms: Terms, op: Operation) -> None:
    tensor, indices = op.tensor, list(op.args[1])
    axes = list(terms.of(tensor))
    used = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in used:
        width = indices[dim].dim() if indices[dim].dtype in {torch.bool, torch.uint8} else 1
        for covered in range(dim, dim + width):
            if not picks(terms, indices[dim], axes[covered]):
                terms.fix(axes[covered], "positions along it are picked by an index")
    if op.name == "index_put":
        terms.set(op.out, axes)
        for axis, value in zip(reversed(axes), reversed(terms.of(op.args[2])), strict=False):
            if size_of(axis) == size_of(value) and size_of(value) != 1:
                unify(axis, value, f"`{op.name}` in {terms.where}")
        return
    if any(indices[dim].dtype in {torch.bool, torch.uint8} for dim in used):
        first, width = used[0], indices[used[0]].dim()
        if len(used) > 1:
            raise ValueError("several masks")
        picked: list[Axis] = [fixed(int(op.out.shape[first]), f"a mask in {terms.where}")]
        terms.set(op.out, [*axes[:first], *picked, *axes[first + width :]])
        return
    picked = broadcast(terms, [terms.of(indices[dim]) for dim in used], op.name)
    rest = [axis for dim, axis in enumerate(axes) if dim not in used]
    together = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if together else 0
    terms.set(op.out, [*rest[:at], *picked, *rest[at:]])
    if terms.source.get(tensor) is not None and not rest:
        return
    carry_source(terms, tensor, op.out)


@rule(
    "index_select",
    "gather",
    "scatter",
    "scatter_add",
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
