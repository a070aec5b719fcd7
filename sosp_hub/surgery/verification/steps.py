"""The steps that a pass takes, and the shapes that a trace and a plan predict of each."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sosp_hub.compat.torch import DispatchMode, FakeMode
from sosp_hub.errors import VerificationError
from sosp_hub.plan import Plan
from sosp_hub.structure import rules
from sosp_hub.structure.axes import Axis, size_of
from sosp_hub.structure.constraint_solver import Count
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.isolation import isolated
from sosp_hub.structure.modes import body_of
from sosp_hub.structure.routes import faster_without_data
from sosp_hub.structure.shadow import shadow
from sosp_hub.structure.terms import Step
from sosp_hub.structure.trace import Program, call, without_fake_log

_LOG = logging.getLogger("sosp_hub")

_AnyStep = TypeVar("_AnyStep", Step, "_Taken")

Shapes = list[list[int]]
Scaled = Callable[[str, float], float]


def unscaled(_: str, number: float) -> float:
    """Numbers stay as they are."""
    return number


def outputs_instead(model: nn.Module, which: str) -> bool:
    """Whether outputs can be compared where shapes cannot; what is done is told."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        _LOG.info("%s takes other steps than were traced: its outputs are compared", which)
        return True
    _LOG.warning(
        "%s takes other steps than were traced, so that not all of its shapes were compared; load "
        "the weights and apply with verify='thorough' to compare what it computes", which,
    )  # fmt: skip
    return False


def check_shapes(
    pruned: nn.Module,
    graph: Graph,
    plan: Plan,
    run: Program = call,
    scaled: Scaled = unscaled,
) -> bool:
    """Compares the shapes of a pass of the cut model with the predicted ones.

    Args:
        pruned: The cut model.
        graph: The trace of that pass before the cut.
        plan: The cut.
        run: Makes the pass.
        scaled: As for ``compare_steps``.

    Returns:
        Whether all could be compared: else the model takes other steps than were traced.
    """
    # Traces have no data: with it, code leaves out a mask of ones, say.
    for fake in dict.fromkeys((faster_without_data(pruned, graph), True)):
        try:
            taken = steps_taken(pruned, graph.example_inputs, run, fake=fake)
        except Exception as error:
            raise VerificationError(
                f"the cut model does not run: {type(error).__name__}: {error}"
            ) from error
        if compare_steps(taken, graph, plan, scaled=scaled):
            return True
    return False


def steps_taken(
    model: nn.Module, inputs: Any, run: Program = call, *, fake: bool = True
) -> "list[_Taken]":
    """The steps of a pass: without data unless ``fake`` is False, or code looks at values.

    Two models with the same weights that take the same steps compute the same.
    """
    if fake:
        try:
            return _steps_of(model, inputs, run, FakeMode())
        except Exception:
            if any(parameter.is_meta for parameter in model.parameters()):
                raise
    return _steps_of(model, inputs, run, None)


def _steps_of(model: nn.Module, inputs: Any, run: Program, fake: FakeMode | None) -> "list[_Taken]":
    recorder = Recorder()
    twin, given = shadow(model, fake).eval(), copy_inputs(inputs, fake)
    off = isolated(model), torch.no_grad(), without_fake_log()
    with ExitStack() as stack:
        for mode in (*off, fake or nullcontext(), recorder, AttentionSteps(recorder)):
            stack.enter_context(mode)
        run(twin, given)
    return recorder.taken


@dataclass(frozen=True)
class _Taken:
    """A step of the cut model: the shapes it gives and the numbers it computes with."""

    name: str
    shapes: list[list[int]]
    floats: tuple[float, ...]


def compare_steps(
    taken: Sequence[_Taken],
    graph: Graph,
    plan: Plan,
    masked: Sequence[Shapes] | None = None,
    scaled: Scaled = unscaled,
) -> bool:
    """Raises where a step gives another shape than the trace and the plan predict.

    Args:
        taken: Steps of the cut model.
        graph: The trace.
        plan: The cut.
        masked: Shapes in the masked model, step by step: how many rows values choose, such as those
            of an expert, the trace of the dense model does not tell.
        scaled: What becomes of a number that a module of this name computes with.

    Returns:
        Whether all steps could be compared; else the outputs decide.
    """
    count = graph.count(plan.num_kept())
    steps, taken = essential(graph.steps), essential(taken)
    if [plain_name(step.name) for step in steps] != [plain_name(step.name) for step in taken]:
        return False  # another path through the code (a repeat factor of one)
    for number, (before, after) in enumerate(zip(steps, taken, strict=True)):
        floats = tuple(scaled(before.module, value) for value in before.floats)
        if _by_dtype(floats) != _by_dtype(after.floats):
            raise VerificationError(
                f"{before.name} in {before.module or 'the model'} computes with {after.floats}, "
                f"expected {floats}: the code uses a size as a value"
            )
        dense = [[size_of(axis) for axis in axes] for axes in before.outputs]
        ran = dense if masked is None else masked[number]
        for axes, real, found in zip(before.outputs, ran, after.shapes, strict=True):
            expected = [_after(axis, size, count) for axis, size in zip(axes, real, strict=True)]
            if expected != found and _without_ones(expected) == _without_ones(found):
                return False  # `einsum` moves axes of size one about
            if expected != found:
                raise VerificationError(
                    f"{before.name} in {before.module or 'the model'} gives shape {found}, "
                    f"expected {expected}"
                )
    return True


_LIMITS = {
    getattr(torch.finfo(dtype), limit): limit
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for limit in ("min", "max", "tiny", "eps")
}


def _by_dtype(floats: Sequence[float]) -> list[Any]:
    """Numbers by which two passes are told apart: limits of a dtype and NaN by their names."""
    return ["nan" if math.isnan(number) else _LIMITS.get(number, number) for number in floats]


def _after(axis: Axis, masked: int, count: Count) -> int:
    """Length after the cut of an axis that is so long in the masked model."""
    dense, left = size_of(axis), size_of(axis, count)
    if left == dense:
        return masked
    return left if masked == dense else masked * left // dense


def _without_ones(sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size != 1]


class StepMode(DispatchMode):
    """Is handed the steps of a pass, one after the other.

    Attributes:
        paused: Whether operations are parts of a step that it was handed already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        return self.step(str(func), func, args, kwargs or {})

    def step(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a step and returns what it gives."""
        raise NotImplementedError


class Recorder(StepMode):
    """Writes down the steps of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[_Taken] = []

    def step(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a step and notes its shapes."""
        out = func(*args, **kwargs)
        floats = tuple(arg for arg in args if type(arg) is float) if not self.paused else ()
        self.taken.append(_Taken(name, [list(t.shape) for t in rules.tensors(out)], floats))
        return out


@functools.cache
def plain_name(name: str) -> str:
    """``view`` and ``_unsafe_view`` are one operation here."""
    return name.removeprefix("aten.").partition(".")[0].removeprefix("_unsafe_").rstrip("_") or name


def essential(steps: Sequence[_AnyStep]) -> list[_AnyStep]:
    """Without copies, which depend on the memory layout alone."""
    return [step for step in steps if plain_name(step.name) not in COPIES]


COPIES = {"clone", "contiguous", "as_strided", "_to_copy"}


class AttentionSteps(TorchFunctionMode):
    """Attention is one step of a trace, whatever kernel runs it."""

    def __init__(self, steps: StepMode) -> None:
        super().__init__()
        self.steps = steps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:
                return body_of(func)(*args, **(kwargs or {}))
        if name != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        self.steps.paused = True
        try:
            return self.steps.step("scaled_dot_product_attention", func, args, kwargs or {})
        finally:
            self.steps.paused = False
