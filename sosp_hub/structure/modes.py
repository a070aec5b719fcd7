"""The two modes that watch a forward pass: tensors below Python's arguments, sizes above them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sosp_hub.structure import rules
from sosp_hub.structure.axes import Axis, size_of, split
from sosp_hub.structure.ints import TracedInt
from sosp_hub.structure.terms import Step, Terms


class DispatchWatch(TorchDispatchMode):
    """Runs the rule of each operation after it, and writes the step down."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = terms
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            self.paused or func.namespace == "prim"
        ):  # prim: questions about a tensor, such as its device
            return func(*args, **kwargs)
        inputs = tuple(self.terms.of(tensor) for tensor in rules.tensors((args, kwargs)))
        out = func(*args, **kwargs)
        self.terms.mixes = False
        rules.apply_rule(self.terms, func, args, kwargs, out)
        self.note(str(func), inputs, out)
        return out

    def note(self, name: str, inputs: tuple[tuple[Axis, ...], ...], out: Any) -> None:
        """Appends a step to the record."""
        outputs = tuple(self.terms.of(tensor) for tensor in rules.tensors(out))
        self.terms.steps.append(
            Step(name, self.terms.modules[-1], inputs, outputs, self.terms.mixes)
        )


class FunctionWatch(TorchFunctionMode):
    """Hands out traced sizes, and compares size arguments with the axes of what they make."""

    def __init__(self, terms: Terms, dispatch: DispatchWatch) -> None:
        super().__init__()
        self.terms = terms
        self.dispatch = dispatch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.shape:
            return self._sizes(args[0])
        if name == "size" and args and isinstance(args[0], Tensor):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            sizes = self._sizes(args[0])
            return sizes if dim is None else sizes[dim]
        if name == "scaled_dot_product_attention":
            return self._attention(func, args, kwargs)
        out = func(*args, **kwargs)
        check = _CHECKS.get(name)
        if check is not None:
            check(self.terms, args, kwargs, out)
        return out

    def _sizes(self, tensor: Tensor) -> torch.Size:
        return torch.Size(
            [
                TracedInt(size_of(axis), axis) if size_of(axis) > 1 else 1
                for axis in self.terms.of(tensor)
            ]
        )

    def _attention(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.dispatch.paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.dispatch.paused = False
        query, key, value, mask = (given.get(name) for name in names[:4])
        inputs = tuple(
            self.terms.of(tensor) for tensor in (query, key, value, mask) if tensor is not None
        )
        self.terms.mixes = False
        try:
            rules.attention(
                self.terms, query, key, value, mask, out, given.get("scale") is not None
            )
        except (AssertionError, ValueError, IndexError):
            rules.unknown(
                self.terms, rules.Operation("scaled_dot_product_attention", args, kwargs, out)
            )
        self.dispatch.note("scaled_dot_product_attention", inputs, out)
        return out


Check = Callable[[Terms, Any, Any, Any], None]
_CHECKS: dict[str, Check] = {}


def _check(*names: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        _CHECKS.update(dict.fromkeys(names, function))
        return function

    return register


def _flat(sizes: Any) -> list[Any]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else list(sizes)


@_check("view", "reshape", "expand", "broadcast_to", "view_copy")
def _check_view(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    sizes = _flat(args[1:]) or list(kwargs.get("shape", kwargs.get("size", ())))
    axes = terms.of(out)
    for size, axis in zip(reversed(sizes), reversed(axes), strict=False):
        terms.constrain(size, axis, "a view")


@_check("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def _check_factory(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    sizes = _flat(args[1:] if args and isinstance(args[0], Tensor) else args) or list(
        kwargs.get("size", ())
    )
    sizes = sizes[: out.dim()]
    for size, axis in zip(sizes, terms.of(out), strict=False):
        if isinstance(size, TracedInt):
            terms.constrain(size, axis, "a new tensor")
        else:
            terms.fix(axis, "a new tensor of a fixed size")


@_check("arange", "linspace", "eye")
def _check_series(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    for value in args:
        if isinstance(value, TracedInt):
            terms.leaks.append((value.expr, terms.where))


@_check("unflatten")
def _check_unflatten(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].dim()
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    for offset, size in enumerate(sizes):
        terms.constrain(size, terms.of(out)[dim + offset], "unflatten")


@_check("split", "split_with_sizes")
def _check_split(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    sizes = (
        args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    )
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    sizes = [sizes] * len(out) if isinstance(sizes, int) else sizes
    for size, piece in zip(sizes, out, strict=False):
        if int(size) == piece.shape[dim]:
            terms.constrain(size, terms.of(piece)[dim], "split")


@_check("chunk", "tensor_split")
def _check_chunk(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    for piece in out[1:]:
        if piece.shape[dim] == out[0].shape[dim]:
            terms.constrain(
                TracedInt(int(piece.shape[dim]), terms.of(out[0])[dim]),
                terms.of(piece)[dim],
                "chunk",
            )


@_check("narrow")
def _check_narrow(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    if len(args) == 4:
        _border(terms, args[2], terms.of(args[0])[args[1]], terms.of(out)[args[1]])
        terms.constrain(args[3], terms.of(out)[args[1]], "narrow")


@_check("__getitem__")
def _check_getitem(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    tensor, key = args
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(item, Tensor | list) for item in keys) or not isinstance(out, Tensor):
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
            axis = terms.of(out)[result]
            if item.step in {None, 1} and size_of(axis) != tensor.shape[source]:
                _check_slice(terms, item, tensor, source, axis)
            source, result = source + 1, result + 1
        else:
            source += 1


def _check_slice(terms: Terms, item: slice, tensor: Tensor, dim: int, axis: Axis) -> None:
    whole = terms.of(tensor)[dim]
    start, stop = item.start, item.stop
    length = int(tensor.shape[dim])
    for border in (start, stop):
        if (
            border is not None
            and not isinstance(border, TracedInt)
            and border != 0
            and abs(border) < length
        ):
            terms.fix(whole, f"the number {border} is written into the code (a slice)")
            return
    total = TracedInt(length, whole)
    begin = 0 if start is None else (total + start if start < 0 else start)
    end = total if stop is None or stop >= length else (total + stop if stop < 0 else stop)
    terms.constrain(end - begin, axis, "a slice")
    _border(terms, begin, whole, axis)


def _border(terms: Terms, start: Any, whole: Axis, piece: Axis) -> None:
    """A slice that begins in the middle: what lies before it must keep the length that ``start``
    says.
    """
    if isinstance(start, TracedInt) and 0 < start < size_of(whole):
        from sosp_hub.structure.axes import cut_at

        pieces = cut_at(whole, int(start))
        if pieces is not None:
            terms.constrain(start, pieces[0], "a slice")


@_check("layer_norm", "rms_norm")
def _check_layer_norm(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    for size, axis in zip(reversed(shape), reversed(terms.of(out)), strict=False):
        if isinstance(size, TracedInt):
            terms.constrain(size, axis, "normalized_shape")


@_check("group_norm")
def _check_group_norm(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    groups = args[1] if len(args) > 1 else kwargs["num_groups"]
    halves = split(terms.of(out)[1], int(groups), "group norm")
    if halves is not None:
        terms.constrain(groups, halves[0], "num_groups")


@_check("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
def _check_convolution(terms: Terms, args: Any, kwargs: Any, out: Any) -> None:
    transposed = "out_padding" in kwargs or len(args) > 7
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    if transposed or int(groups) == 1:
        return
    halves = split(terms.of(args[1])[0], int(groups), "a grouped convolution")
    if halves is not None:
        terms.constrain(groups, halves[0], "groups")
