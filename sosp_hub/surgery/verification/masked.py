"""The masked model: what a cut model must compute.

It is the dense one in which every removed position is zero, and in which operations that combine
values along a cut axis (normalisations, means) see the kept positions only.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sosp_hub.compat.torch import TensorTable, result_aliases
from sosp_hub.errors import VerificationError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure import rules
from sosp_hub.structure.axes import keep_mask, size_of
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.deferred import data_of, deferred, where_read
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.isolation import isolated, random_numbers_kept
from sosp_hub.structure.terms import Axes, Step
from sosp_hub.structure.trace import Program, call, output_tensors, trace, wanted_outputs
from sosp_hub.surgery.attributes import follow_scales
from sosp_hub.surgery.layers import bypassed
from sosp_hub.surgery.verification.steps import (
    COPIES,
    AttentionSteps,
    Shapes,
    StepMode,
    essential,
    plain_name,
)
from sosp_hub.surgery.verification.twins import twin_of


def zeros_mask(graph: Graph, plan: PruningPlan) -> bool:
    """Whether zeros in the weights that read the groups make the masked model."""
    return all(graph.groups[name].exact and not graph.fold_obstacle(name) for name in plan.kept)


def zeroed_model(model: nn.Module, graph: Graph, plan: PruningPlan) -> nn.Module:
    """A copy of the model, in which weights that read removed structures are zero there."""
    masks: dict[str, list[tuple[int, Tensor]]] = {}
    for name in plan.kept:
        mask = torch.zeros(graph.groups[name].size + 1)
        mask[[*plan.kept[name], -1]] = 1  # positions of other groups have index -1
        for member in graph.readers(name):
            masks.setdefault(member.tensor, []).append(
                (member.dim, mask[torch.as_tensor(member.index)])
            )

    def zeroed(name: str, weight: Tensor) -> Tensor:
        weight = weight.clone()
        for dim, mask in masks[name]:
            shape = [-1 if i == dim else 1 for i in range(weight.dim())]
            weight.mul_(mask.to(weight).view(shape))
        return weight

    changed: set[str] = set()

    def instead(name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if name not in masks:
            return None
        changed.add(name)
        return deferred(lambda: zeroed(name, data_of(parameter)), parameter)

    model = twin_of(model, graph, instead=instead)
    for name in masks.keys() - changed:
        parameter = model.get_parameter(name)
        parameter.data = zeroed(name, parameter.detach())
    return model


class OtherPathError(VerificationError):
    """The code does not take the steps that were traced."""


def masked_outputs(model: nn.Module, graph: Graph, plan: PruningPlan) -> list[Tensor]:
    """Outputs of the masked model."""

    def with_data() -> Graph:
        return trace(model, graph.example_inputs, graph.outputs, fake=False)

    return masked_pass(model, graph, plan, call, graph, with_data)[0]


def masked_pass(
    model: nn.Module,
    traced: Graph,
    plan: PruningPlan,
    run: Program,
    graph: Graph,
    with_data: Callable[[], Graph],
    *,
    loops: bool = False,
) -> tuple[list[Tensor], Graph, list[Shapes]]:
    """Outputs of the masked model, the trace whose steps it takes, and the shapes of each step.

    Where it takes other steps with data than without, they are those of a trace ``with_data``.
    With ``loops`` it may go through those steps another number of times, as values tell a loop
    over experts.
    """
    twin = twin_of(model, traced).eval().requires_grad_(False)  # matmul takes its path by it
    follow_scales(twin, graph, plan)
    try:
        outputs, shapes = _replayed(twin, traced, plan, run, loops)
        return outputs, traced, shapes
    except Exception:  # noqa: BLE001 - whatever comes of steps that are not those of this pass
        real = with_data()
        twin = twin_of(model, real).eval().requires_grad_(False)
        follow_scales(twin, graph, plan)
        outputs, shapes = _replayed(twin, real, plan, run, loops)
        return outputs, real, shapes


def _replayed(
    twin: nn.Module, real: Graph, plan: PruningPlan, run: Program, loops: bool
) -> tuple[list[Tensor], list[Shapes]]:
    replay = _Replay(list(real.steps), real.keep(plan), loops)
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    inputs = copy_inputs(real.example_inputs)
    with torch.no_grad():
        for name, axes in real.tensors.items():
            if isinstance(tensors[name], nn.Parameter) and name not in real.written:
                replay.parameters[tensors[name]] = axes  # masked where it is used
            else:
                tensors[name].copy_(replay.masked(tensors[name], axes))
        bypassed(twin, real, plan)
        with isolated(twin), where_read(twin), replay, AttentionSteps(replay):
            result = run(twin, inputs)
    replay.finish()
    return output_tensors(wanted_outputs(result, real.outputs)), replay.shapes


_CONTEXT = 8
"""Operations by which a place in a loop is told from others."""


Mask = NDArray[np.bool_]


class _Replay(StepMode):
    """Runs the dense model with masked tensors, step by step beside the record of its trace.

    Args:
        steps: The record.
        masks: Keep masks by atom id.
        loops: Whether it may go back in the record, or leave steps out, as a loop does whose length
            values tell.
    """

    def __init__(self, steps: list[Step], masks: dict[int, Mask], loops: bool = False) -> None:
        super().__init__()
        self.steps = essential(steps)
        self.at = 0
        self.ran: list[str] = []
        self.masks = masks
        self.loops = loops
        self.shapes: list[Shapes] = []
        self.parameters = TensorTable()
        self._masks: dict[Axes, list[Mask | None]] = {}

    def finish(self) -> None:
        """Raises VerificationError where the record goes on."""
        if self.at < len(self.steps):
            step = self.steps[self.at]
            raise OtherPathError(
                f"the model takes another path with other values: it ends before {step.name}"
            )

    def masks_of(self, axes: Axes) -> list[Mask | None]:
        """Keep mask along each axis; None = all stay."""
        if axes not in self._masks:
            found = [keep_mask(axis, self.masks) for axis in axes]
            self._masks[axes] = [None if mask.all() else mask for mask in found]
        return self._masks[axes]

    def masked(self, tensor: Tensor, axes: Axes) -> Tensor:
        """The tensor with zeros at removed positions, laid out in memory as it was."""
        masks = self.masks_of(axes) if tensor.dim() == len(axes) else []
        if any(mask is not None for mask in masks):
            tensor = tensor.clone()
        for dim, mask in enumerate(masks):
            if mask is not None:
                tensor.index_fill_(dim, _positions(~mask, tensor), 0)
        return tensor

    def step(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a step with masked parameters and masks what it gives."""
        if len(self.parameters):
            args, kwargs = self._with_masks(args), self._with_masks(kwargs)
        if plain_name(name) in COPIES:
            return func(*args, **kwargs)
        step = self._next(name, args, kwargs)
        out = self._masked(step, func, args, kwargs)
        self.shapes.append([list(tensor.shape) for tensor in rules.tensors(out)])
        return out

    def _next(self, name: str, args: Any, kwargs: Any) -> Step:
        """The step of the record that an operation is."""
        plain = plain_name(name)
        given = list(rules.tensors((args, kwargs))) if self.loops else []

        def fits(place: int) -> bool:
            step = self.steps[place] if place < len(self.steps) else None
            return (
                step is not None
                and plain_name(step.name) == plain
                and (not self.loops or self._takes(step, given))
            )

        if not fits(self.at):
            places = [place for place in range(len(self.steps)) if fits(place)]
            if not self.loops or not places:
                told = self.steps[self.at].name if self.at < len(self.steps) else None
                raise OtherPathError(
                    f"the model takes another path with other values: {name} for {told}"
                )
            self.at = max(places, key=lambda place: (self._alike(place), -abs(place - self.at)))
        step = self.steps[self.at]
        self.at += 1
        self.ran.append(plain)
        return step

    def _takes(self, step: Step, given: Sequence[Tensor]) -> bool:
        """Whether tensors are as long as a step's along what is masked."""
        return len(step.inputs) != len(given) or all(
            tensor.dim() == len(axes)
            and all(
                mask is None or size == len(mask)
                for size, mask in zip(tensor.shape, self.masks_of(axes), strict=True)
            )
            for tensor, axes in zip(given, step.inputs, strict=True)
        )

    def _alike(self, place: int) -> int:
        """How many of the last operations are those before a place of the record, up to a few.

        What a wrong place would make of the masked model is seen: it differs from the cut one.
        """
        before = reversed(self.steps[max(0, place - _CONTEXT) : place])
        pairs = zip((plain_name(step.name) for step in before), reversed(self.ran), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _with_masks(self, value: Any) -> Any:
        """Arguments in which parameters are masked."""
        if isinstance(value, nn.Parameter):
            axes = self.parameters.get(value)
            return value if axes is None else self.masked(value.detach(), axes)
        if isinstance(value, tuple | list):
            return type(value)(self._with_masks(item) for item in value)
        if isinstance(value, dict):
            return {key: self._with_masks(item) for key, item in value.items()}
        return value

    def _masked(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        if step.mixes or step.draws:
            return self._on_kept(step, func, args, kwargs)
        out = func(*args, **kwargs)
        if step.counts:
            return out
        aliases = [alias for alias in result_aliases(func) if alias is not None]
        if aliases:
            if any(alias.is_write for alias in aliases):
                for tensor, axes in zip(rules.tensors(out), step.outputs, strict=True):
                    tensor.copy_(self.masked(tensor, axes))
            return out  # a view of what is masked already
        if isinstance(out, Tensor):
            return self.masked(out, step.outputs[0])
        if isinstance(out, tuple | list):
            axes = iter(step.outputs)
            return type(out)(
                self.masked(item, next(axes)) if isinstance(item, Tensor) else item for item in out
            )
        return out

    def _on_kept(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation on the kept positions and puts its result back among zeros."""
        axes = iter(step.inputs)

        def shrink(value: Any) -> Any:
            if isinstance(value, Tensor):
                for dim, mask in enumerate(self.masks_of(next(axes))):
                    if mask is not None:
                        value = value.index_select(dim, _positions(mask, value))
                return value
            if isinstance(value, tuple | list):
                return type(value)(shrink(item) for item in value)
            return value

        small = [shrink(value) for value in args]
        small_kwargs = {key: shrink(value) for key, value in kwargs.items()}
        name = step.name.split(".")[-2] if "." in step.name else step.name
        if name in {"native_layer_norm", "_fused_rms_norm"}:
            small[1] = list(small[0].shape[-len(args[1]) :])
        if name == "native_group_norm":
            groups = size_of(step.inputs[0][1]) // args[6]
            kept = keep_mask(step.inputs[0][1], self.masks).reshape(args[6], groups).any(1).sum()
            small[4], small[6] = small[0].shape[1], int(kept)
        if name in {"rand", "randn"}:
            small[0] = [int(keep_mask(axis, self.masks).sum()) for axis in step.outputs[0]]
        keeps = random_numbers_kept if step.draws else nullcontext
        with keeps():  # the cut model draws as many numbers as there are elements left
            full = func(*args, **kwargs)  # for its memory layout, which later operations may see
        parts = list(rules.tensors(func(*small, **small_kwargs)))
        for result, part, result_axes in zip(rules.tensors(full), parts, step.outputs, strict=True):
            if step.picked is not None and part is parts[-1]:  # values come first
                part = _positions(keep_mask(step.picked, self.masks), part)[part]
            result.copy_(self._grow(part, result_axes))
        return full

    def _grow(self, tensor: Tensor, axes: Axes) -> Tensor:
        for dim, mask in enumerate(self.masks_of(axes)):
            if mask is not None:
                shape = list(tensor.shape)
                shape[dim] = len(mask)
                full = tensor.new_zeros(shape)
                tensor = full.index_copy(dim, _positions(mask, tensor), tensor)
        return tensor


def _positions(mask: Mask, like: Tensor) -> Tensor:
    """Where a mask is true, on the device of ``like``."""
    return torch.from_numpy(mask.nonzero()[0]).to(like.device)
