"""The two modes that watch a forward pass: tensors below Python's arguments, sizes above them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sosp_hub.compat.torch import DispatchMode, storage_key, written_arguments
from sosp_hub.structure import rules
from sosp_hub.structure.axes import Axis, size_of
from sosp_hub.structure.size_constraints import has_demands, note_demands
from sosp_hub.structure.terms import Step, Terms
from sosp_hub.structure.traced_int import TracedInt, deaf


class WritesSharedError(Exception):
    """A pass would write to a parameter that is shared with the caller's model."""


class ReadOnly(DispatchMode):
    """Raises before an operation writes to memory that is not the copy's own.

    Attributes:
        refused: Whether it has raised, also where code has caught that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._shared = {storage_key(parameter) for parameter in model.parameters()}
        self.refused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in written_arguments(func, args, kwargs or {}):
            if storage_key(tensor) in self._shared:
                self.refused = True
                raise WritesSharedError(str(func))
        return func(*args, **(kwargs or {}))


class DispatchWatch(DispatchMode):
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
        inputs = []
        values = not func.overloadpacket.__name__.endswith("_like")  # these ask for sizes alone
        for tensor in rules.tensors((args, kwargs)):
            inputs.append(self.terms.of(tensor))
            self.terms.use(tensor, values=values)
        self.terms.written.update(map(storage_key, written_arguments(func, args, kwargs)))
        out = func(*args, **kwargs)
        self.terms.begin()
        rules.apply_rule(self.terms, func, args, kwargs, out)
        self.note(str(func), tuple(inputs), out, tuple(arg for arg in args if type(arg) is float))
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it operations are not the model's: none is written down."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def note(
        self,
        name: str,
        inputs: tuple[tuple[Axis, ...], ...],
        out: Any,
        floats: tuple[float, ...] = (),
    ) -> None:
        """Appends a step to the record."""
        outputs = tuple(self.terms.of(tensor) for tensor in rules.tensors(out))
        terms = self.terms
        terms.steps.append(
            Step(
                name, terms.modules[-1], inputs, outputs, terms.mixes, floats,
                terms.picked, terms.counts, terms.draws,
            )
        )  # fmt: skip


def body_of(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.nn.functional that runs its own code under any mode.

    The original hands itself to the mode, which then sees nothing of what it calls.
    """
    blind = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, blind, func.__name__, func.__defaults__, func.__closure__)


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
        if name == "numel":
            return prod(self._sizes(args[0]), start=1)
        if name == "scaled_dot_product_attention":
            return self._attention(func, args, kwargs)
        if name == "multi_head_attention_forward":
            with self:
                return body_of(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if has_demands(name):
            with deaf(), self.dispatch.pause():
                note_demands(self.terms, rules.Operation(name, args, kwargs, out))
        return out

    def _sizes(self, tensor: Tensor) -> torch.Size:
        sizes = zip(tensor.shape, self.terms.of(tensor), strict=True)
        return torch.Size([TracedInt(size_of(axis), axis) if n > 1 else n for n, axis in sizes])

    def _attention(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with self.dispatch.pause():
            out = func(*args, **kwargs)
        query, key, value = (given[name] for name in names[:3])
        mask = given.get("attn_mask")
        tensors = [tensor for tensor in (query, key, value, mask) if tensor is not None]
        inputs = tuple(map(self.terms.of, tensors))
        for tensor in tensors:
            self.terms.use(tensor)
        self.terms.begin()
        try:
            rules.attention(
                self.terms, query, key, value, mask, out,
                scaled=given.get("scale") is not None, causal=bool(given.get("is_causal")),
            )  # fmt: skip
        except (AssertionError, ValueError, IndexError):
            rules.unknown(
                self.terms, rules.Operation("scaled_dot_product_attention", args, kwargs, out)
            )
        self.dispatch.note("scaled_dot_product_attention", inputs, out)
        return out
