"""Every cut is checked: shapes of each operation, then outputs against the masked model.

The masked model is the dense one in which every removed position is zero, and in which operations
that combine values
along a cut axis (normalisations, means) see the kept positions only.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sosp_hub.compat.torch import (
    DispatchMode,
    FakeMode,
    TensorTable,
    buffer_table,
    out_of_memory,
    result_aliases,
)
from sosp_hub.errors import SospHubError, VerificationError
from sosp_hub.plan import GrowthPlan, Plan, PruningPlan
from sosp_hub.structure import rules
from sosp_hub.structure.axes import Axis, keep_mask, size_of
from sosp_hub.structure.constraint_solver import Count
from sosp_hub.structure.copies import copy_inputs, map_tensors, share_model
from sosp_hub.structure.deferred import WhereRead, at_once, data_of, deferred, is_deferred
from sosp_hub.structure.graph import Graph, Route
from sosp_hub.structure.isolation import isolated, random_numbers_kept
from sosp_hub.structure.modes import body_of
from sosp_hub.structure.routes import (
    Run,
    alike,
    all_ways,
    find_routes,
    tell_unchecked,
    ways_apart,
)
from sosp_hub.structure.shadow import shadow
from sosp_hub.structure.terms import Axes, Step
from sosp_hub.structure.trace import (
    Program,
    call,
    output_tensors,
    trace,
    wanted_outputs,
    without_fake_log,
)
from sosp_hub.surgery.attributes import follow_scales
from sosp_hub.surgery.layers import bypassed

_AnyStep = TypeVar("_AnyStep", Step, "_Taken")

TOLERANCE = 1e-4
"""Largest error relative to the largest output, in float32. Rounding gives up to 1e-5 in deep
networks, wrong cuts 1e-2.
"""

_ROUNDING = 1e-2
"""A smaller error in float32 may be rounding; it is computed again in float64."""

Cut = Callable[[nn.Module, Graph, PruningPlan], nn.Module]
"""Puts new tensors in the place of a model's; those of other models may lie in the same memory."""
Grow = Callable[[nn.Module, Graph, GrowthPlan], nn.Module]
_Shapes = list[list[int]]
_LOG = logging.getLogger("sosp_hub")


def twin_of(
    model: nn.Module,
    graph: Graph,
    own: Iterable[str] = (),
    instead: Callable[[str, nn.Parameter], nn.Parameter | None] | None = None,
) -> nn.Module:
    """A copy that shares all parameters but those that its pass writes to, and ``own``."""
    return share_model(model, graph.written.union(own), instead)


def check_cut(model: nn.Module, graph: Graph, plan: PruningPlan, thorough: bool, cut: Cut) -> None:
    """Compares a cut copy with the masked model; run it ``isolated``.

    Beside the model itself one of its tensors is held at a time, masked or cut. Where its code
    wants more of a weight than operations on it, the copies are made as a whole.

    Raises:
        Exception: It differs (VerificationError), or whatever the cut or the cut model raises.
    """
    if not thorough and _same_steps_on_all_ways(model, graph, plan, cut):
        return
    try:
        _check_outputs(model, graph, plan, cut, double=is_coarse(model))
    except Exception as error:  # what code asks of a weight without data
        if out_of_memory(error):
            raise
        _LOG.debug("verified again with copies of the weights: %s", error)
    else:
        return
    with at_once():
        _check_outputs(model, graph, plan, cut, double=False)


def _same_steps_on_all_ways(model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut) -> bool:
    """Whether the shapes of every step could be compared, or else outputs cannot (no weights)."""
    find_routes(model, graph)
    pruned = cut(twin_of(model, graph), graph, plan)
    others = [] if check_shapes(pruned, graph, plan) else [""]
    for route in graph.routes.known:
        with _on(route):
            if not check_shapes(pruned, route.graph, plan, route.run):
                others.append(f" with {route.name}")
    return not others or not _outputs_instead(model, f"the cut model{others[0]}")


def _outputs_instead(model: nn.Module, which: str) -> bool:
    """Whether outputs can be compared where shapes cannot; what is done is told."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        _LOG.info("%s takes other steps than were traced: its outputs are compared", which)
        return True
    _LOG.warning(
        "%s takes other steps than were traced, so that not all of its shapes were compared; load "
        "the weights and apply with verify='thorough' to compare what it computes", which,
    )  # fmt: skip
    return False


def is_coarse(model: nn.Module) -> bool:
    """Whether rounding of 16 bits and fewer would hide what is wrong."""
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    return any(parameter.element_size() <= 2 for parameter in floating)


def _check_outputs(
    model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut, *, double: bool
) -> None:
    plain = _without_zeros(model, graph)
    dense = doubled(plain, graph.written) if double else plain

    def in_use(traced: Graph) -> Graph:
        return _in_double(traced) if double else traced

    def error_in(traced: Graph, run: Program, double: bool) -> tuple[float, _Ran]:
        """Of what is rounding less is left in double precision, also in what is chosen by it."""
        dense, used = (
            (doubled(plain, graph.written), _in_double(traced)) if double else (plain, traced)
        )

        def with_data() -> Graph:
            inputs, outputs = traced.example_inputs, traced.outputs
            real = trace(plain, inputs, outputs, fake=False, program=run)
            return _in_double(real) if double else real

        pruned = cut(_deferred_copy(dense, traced), graph, plan)
        choices = _Choices()
        try:
            with choices.noted():
                expected, real, shapes = _masked(dense, used, plan, run, graph, with_data)
        except _OtherPathError as error:
            _LOG.info("only outputs are compared: %s", error)
            way = [(run, used.example_inputs)]
            with choices.noted():
                if _zeros_mask(graph, plan):
                    zeroed = _zeroed(dense, graph, plan)
                    expected = output_tensors(_results(zeroed, graph, way)[0])
                else:
                    expected, *_ = _masked(dense, used, plan, run, graph, with_data, loops=True)
            with choices.repeated():
                outputs = _results(pruned, graph, way)[0]
            return _difference(output_tensors(outputs), expected), (pruned, outputs)
        with choices.repeated():
            outputs = _checked_outputs(pruned, real, plan, run, shapes)
        return _difference(output_tensors(outputs), expected), (pruned, outputs)

    def check(route: Route | None) -> _Ran:
        traced, run = (graph, call) if route is None else (route.graph, route.run)
        with _on(route):
            try:
                error, ran = error_in(traced, run, double)
            except VerificationError:
                if not _chooses(traced):
                    raise
                error, ran = error_in(traced, run, True)
            if TOLERANCE < error < (float("inf") if _chooses(traced) else _ROUNDING):
                try:
                    error, _ = error_in(traced, run, True)
                except Exception as failure:  # float32 may be written into the code
                    if out_of_memory(failure):
                        raise
            if not error <= TOLERANCE:
                raise VerificationError(
                    "the cut model's outputs differ from the masked model's by "
                    f"{error:.1e} (relative)"
                )
        return ran

    pruned, outputs = check(None)
    if not _equal_on_all_ways(dense, in_use(graph), plan, pruned, outputs):
        find_routes(model, graph, one_call=True)  # what other ways read is then cut as well
        pruned = cut(_deferred_copy(dense, graph), graph, plan)
        if not _equal_on_all_ways(dense, in_use(graph), plan, pruned, outputs):
            find_routes(model, graph)
            for route in graph.routes.known:
                try:
                    check(route)
                except VerificationError:
                    if _has_numbers(dense, in_use(route.graph), route.run):
                        raise
                    tell_unchecked(graph, route.name, "the model itself gives no finite number")
            del pruned
            _check_each_way(dense, in_use(graph), plan, cut)


def _chooses(graph: Graph) -> bool:
    """Whether values decide what goes on, so that rounding may change all that follows."""
    return any(step.picked is not None or _plain(step.name) in _CHOICES for step in graph.steps)


_CHOICES = {"topk", "sort", "argsort", "nms", "nonzero", "argmax", "argmin", "bucketize"}


class _Choices(DispatchMode):
    """What the masked model chooses, the cut one chooses too if it chooses among the same values.

    Of values that are equal but for rounding, such as the scores of a plain background, one model
    takes others than the other one, and both are right.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[str, list[Tensor], Any]] = []
        self._notes = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it choices are written down, in place of what was written down before."""
        self._made, self._notes = [], True
        with self:
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Within it those choices are made again, in their order, each where its values return."""
        self._notes = False
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _CHOICES:
            return out
        given = list(rules.tensors((args, kwargs)))
        if self._notes:
            self._made.append((name, *map_tensors((given, out), Tensor.clone)))
            return out
        for place, (made, values, choice) in enumerate(self._made):
            if made == name and _alike(given, values):
                del self._made[: place + 1]
                return choice
        return out


def _alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether numbers are equal but for rounding, and all else is equal."""
    return len(found) == len(expected) and all(
        one.shape == two.shape
        and (_difference([one], [two]) <= TOLERANCE if _has_values(two) else torch.equal(one, two))
        for one, two in zip(found, expected, strict=True)
    )


def _zeros_mask(graph: Graph, plan: PruningPlan) -> bool:
    """Whether zeros in the weights that read the groups make the masked model."""
    return all(graph.groups[name].exact and not graph.fold_obstacle(name) for name in plan.kept)


_Ran = tuple[nn.Module, Any]
"""A cut model and what it returned for the traced inputs."""


def _in_double(graph: Graph) -> Graph:
    """The same trace with inputs in double precision."""
    inputs = map_tensors(graph.example_inputs, lambda t: t.double() if t.is_floating_point() else t)
    return dataclasses.replace(graph, example_inputs=inputs)


def _equal_on_all_ways(
    dense: nn.Module, graph: Graph, plan: PruningPlan, pruned: nn.Module, plain: Any
) -> bool:
    """Whether cut and masked model are seen to be equal on all other ways without a trace of them.

    Where zeros in the weights that read the groups make the masked model, that is run. Else the cut
    model must give what it gave for the traced inputs, where the dense model does.

    Args:
        dense: The model before the cut.
        graph: Its trace.
        plan: The cut.
        pruned: The cut model; is changed.
        plain: What it returned for the traced inputs.
    """
    way = all_ways(dense, graph)
    if way is None or graph.only_in_training:
        return way is None
    try:
        if _zeros_mask(graph, plan):
            zeroed = _zeroed(dense, graph, plan)
            ran = [_results(model, graph, [(way.run, way.inputs)]) for model in (pruned, zeroed)]
            return _difference(*map(output_tensors, ran)) <= TOLERANCE
        *_, together = ways_apart(dense, graph)
        return (
            _change(pruned, graph, together, plain) <= TOLERANCE
            and _change(twin_of(dense, graph), graph, together) <= TOLERANCE
        )
    except Exception:  # noqa: BLE001 - the traces tell whose fault it is
        return False


def _check_each_way(model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut) -> None:
    """Raises where outputs of the cut model depend on how it is run, and those of ``model`` do not.

    Equal to a masked model in each way, it may still differ from itself: a fused kernel finds a
    scale by the width that is left, code that is not fused keeps it as a number.
    """

    def errors(model: nn.Module, ways: Sequence[Run], graph: Graph) -> tuple[float, float]:
        try:
            before = _change(twin_of(model, graph), graph, ways)
        except Exception:  # noqa: BLE001 - a way that the model does not take
            return math.inf, math.inf
        if before > _ROUNDING:
            return before, math.inf
        return before, _change(cut(_deferred_copy(model, graph), graph, plan), graph, ways)

    fine = _in_double(graph)
    for ways, exact in zip(ways_apart(model, graph), ways_apart(model, fine), strict=True):
        before, after = errors(model, ways, graph)
        if TOLERANCE < before < _ROUNDING or TOLERANCE < after < _ROUNDING:
            before, after = errors(doubled(model, graph.written), exact, fine)
        if before <= TOLERANCE and not after <= TOLERANCE:
            names = " and ".join(way.name for way in ways)
            raise VerificationError(
                f"with {names}: the cut model's outputs differ from those for the traced inputs by "
                f"{after:.1e} (relative), which the model's own do not; trace it as it will run"
            )


def _change(model: nn.Module, graph: Graph, ways: Sequence[Run], plain: Any = None) -> float:
    """How much outputs of a model change, relatively, with the ways in which it is run.

    Args:
        model: The model; is changed.
        graph: Tells the traced inputs and the outputs that matter.
        ways: Of ``ways_apart``.
        plain: What it returned for the traced inputs.
    """
    runs = [(way.run, way.inputs) for way in ways]
    if plain is None:
        plain, *found = _results(model, graph, [(call, graph.example_inputs), *runs])
    else:
        found = _results(model, graph, runs)
    pairs = alike(ways, found, plain)
    if not any(_has_values(tensor) for tensor, _ in pairs):
        return math.inf
    return _difference(*zip(*pairs, strict=True))


def _zeroed(model: nn.Module, graph: Graph, plan: PruningPlan) -> nn.Module:
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


def _deferred_copy(model: nn.Module, graph: Graph) -> nn.Module:
    """A copy whose parameters are read where its code reads them, for `cut` to change."""
    return twin_of(model, graph, instead=lambda _, p: deferred(lambda: data_of(p), p))


def doubled(model: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """A copy in double precision; run it ``WhereRead``.

    Args:
        model: Any module.
        own: Parameters that a pass writes to.
    """

    def instead(_: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not parameter.is_floating_point():
            return None
        return deferred(lambda: data_of(parameter).double(), parameter, dtype=torch.float64)

    twin = share_model(model, set(own), instead)
    for parameter in twin.parameters():
        if parameter.is_floating_point() and not is_deferred(parameter):
            parameter.data = parameter.data.double()
    for module in twin.modules():
        buffers = buffer_table(module)
        for name, buffer in buffers.items():
            if buffer is not None and buffer.is_floating_point():
                buffers[name] = buffer.double()
    return twin


@contextmanager
def _on(route: Route | None) -> Iterator[None]:
    """Says on which way of running the model it went wrong, where that is not the traced one."""
    try:
        yield
    except Exception as error:
        if route is None:
            raise
        told = error if isinstance(error, SospHubError) else f"the cut model fails: {error!r}"
        raise VerificationError(f"with {route.name}: {told}") from error


def check_shapes(pruned: nn.Module, graph: Graph, plan: Plan, run: Program = call) -> bool:
    """Compares the shapes of a pass of the cut model, without data, with the predicted ones.

    Returns:
        Whether all could be compared: else the model takes other steps than were traced.
    """
    try:
        taken = steps_taken(pruned, graph.example_inputs, run)
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run: {type(error).__name__}: {error}"
        ) from error
    return _compare_steps(taken, graph, plan)


def steps_taken(model: nn.Module, inputs: Any, run: Program = call) -> "list[_Taken]":
    """The steps of a pass: without data, or with where the code looks at values.

    Two models with the same weights that take the same steps compute the same.
    """
    try:
        return _steps_of(model, inputs, run, FakeMode())
    except Exception:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        return _steps_of(model, inputs, run, None)


def _steps_of(model: nn.Module, inputs: Any, run: Program, fake: FakeMode | None) -> "list[_Taken]":
    recorder = _Recorder()
    twin, given = shadow(model, fake).eval(), copy_inputs(inputs, fake)
    off = isolated(model), torch.no_grad(), without_fake_log()
    with ExitStack() as stack:
        for mode in (*off, fake or nullcontext(), recorder, _AttentionSteps(recorder)):
            stack.enter_context(mode)
        run(twin, given)
    return recorder.taken


@dataclass(frozen=True)
class _Taken:
    """A step of the cut model: the shapes it gives and the numbers it computes with."""

    name: str
    shapes: list[list[int]]
    floats: tuple[float, ...]


def _compare_steps(
    taken: Sequence[_Taken], graph: Graph, plan: Plan, masked: Sequence[_Shapes] | None = None
) -> bool:
    """Raises where a step gives another shape than the trace and the plan predict.

    Args:
        taken: Steps of the cut model.
        graph: The trace.
        plan: The cut.
        masked: Shapes in the masked model, step by step: how many rows values choose, such as those
            of an expert, the trace of the dense model does not tell.

    Returns:
        Whether all steps could be compared; else the outputs decide.
    """
    count = graph.count(plan.num_kept())
    steps, taken = _essential(graph.steps), _essential(taken)
    if [_plain(step.name) for step in steps] != [_plain(step.name) for step in taken]:
        return False  # another path through the code (a repeat factor of one)
    for number, (before, after) in enumerate(zip(steps, taken, strict=True)):
        if _by_dtype(before.floats) != _by_dtype(after.floats):
            raise VerificationError(
                f"{before.name} in {before.module or 'the model'} computes with {after.floats}, "
                f"expected {before.floats}: the code uses a size as a value"
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
    """Numbers by which two passes are told apart; the limits of a dtype by their names."""
    return [_LIMITS.get(number, number) for number in floats]


def _after(axis: Axis, masked: int, count: Count) -> int:
    """Length after the cut of an axis that is so long in the masked model."""
    dense, left = size_of(axis), size_of(axis, count)
    if left == dense:
        return masked
    return left if masked == dense else masked * left // dense


def _without_ones(sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size != 1]


class _OtherPathError(VerificationError):
    """The code does not take the steps that were traced."""


class _Recorder(DispatchMode):
    """Writes down the steps of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[_Taken] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        return self.step(str(func), func, args, kwargs or {})

    def step(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        floats = tuple(arg for arg in args if type(arg) is float) if not self.paused else ()
        self.taken.append(_Taken(name, [list(t.shape) for t in rules.tensors(out)], floats))
        return out


def _checked_outputs(
    pruned: nn.Module, graph: Graph, plan: PruningPlan, run: Program, masked: Sequence[_Shapes]
) -> Any:
    """Outputs of the cut model, each of whose steps must give the predicted shape."""
    recorder = _Recorder()
    inputs = copy_inputs(graph.example_inputs)
    pruned.eval().requires_grad_(False)
    try:
        with isolated(pruned), torch.no_grad(), WhereRead(), recorder, _AttentionSteps(recorder):
            result = run(pruned, inputs)
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run: {type(error).__name__}: {error}"
        ) from error
    _compare_steps(recorder.taken, graph, plan, masked)
    return wanted_outputs(result, graph.outputs)


def verify_growth(
    model: nn.Module,
    wide: nn.Module,
    graph: Graph,
    growth: GrowthPlan,
    *,
    thorough: bool,
    grow: Grow,
) -> None:
    """Raises unless ``wide`` has the predicted shapes and computes what ``model`` computes."""
    same_steps = check_shapes(wide, graph, growth)
    if not thorough and (same_steps or not _outputs_instead(model, "the widened model")):
        return
    dense = _without_zeros(model, graph)
    expected = outputs_of(twin_of(dense, graph), graph)
    error = _difference(outputs_of(grow(twin_of(dense, graph), graph, growth), graph), expected)
    if error <= TOLERANCE:
        return
    for name in growth.copies:
        part = GrowthPlan({name: growth.copies[name]})
        tied = any(name in tie for tie in graph.ties)
        if (
            not tied
            and _difference(outputs_of(grow(twin_of(dense, graph), graph, part), graph), expected)
            > TOLERANCE
        ):
            break
    else:
        name = " and ".join(list(growth.copies)[:3])
    raise VerificationError(
        f"the widened model's outputs differ from the model's by {error:.1e} (relative). "
        f"Group {name!r} causes it; leave it out"
    )


def outputs_of(model: nn.Module, graph: Graph) -> list[Tensor]:
    """The outputs that matter, on the example inputs, in evaluation."""
    return output_tensors(_results(model, graph, [(call, graph.example_inputs)]))


def _results(model: nn.Module, graph: Graph, runs: Iterable[tuple[Program, Any]]) -> list[Any]:
    """What the model returns, called in these ways with these inputs, one after the other."""
    with isolated(model), torch.no_grad(), WhereRead():
        results = [run(model.eval(), copy_inputs(inputs)) for run, inputs in runs]
    return [wanted_outputs(result, graph.outputs) for result in results]


def _has_values(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and (tensor.is_floating_point() or tensor.is_complex())


def _has_numbers(model: nn.Module, graph: Graph, run: Program) -> bool:
    """Whether any number that a model itself returns is finite."""
    outputs = output_tensors(
        _results(twin_of(model, graph), graph, [(run, graph.example_inputs)])[0]
    )
    return any(bool(tensor.isfinite().any()) for tensor in outputs if _has_values(tensor))


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error relative to the largest finite number; infinite where no number is finite.

    What is infinite or no number (NaN) must be so in both.
    """
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if one.shape != two.shape:
            raise VerificationError(
                f"an output has shape {list(one.shape)}, expected {list(two.shape)}"
            )
        if _has_values(two):
            finite = two.isfinite()
            if not finite.all():
                alike = (one == two) | (one.isnan() & two.isnan())
                if not finite.any() or not alike[~finite].all():
                    return math.inf
                one, two = one[finite], two[finite]
            scale = max(float(two.abs().max()), 1e-30)
            wide = torch.complex128 if two.is_complex() else torch.float64
            difference = float((one.to(wide) - two.to(wide)).abs().max()) / scale
            worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def masked_outputs(model: nn.Module, graph: Graph, plan: PruningPlan) -> list[Tensor]:
    """Outputs of the masked model."""

    def with_data() -> Graph:
        return trace(model, graph.example_inputs, graph.outputs, fake=False)

    return _masked(model, graph, plan, call, graph, with_data)[0]


def _masked(
    model: nn.Module,
    traced: Graph,
    plan: PruningPlan,
    run: Program,
    graph: Graph,
    with_data: Callable[[], Graph],
    *,
    loops: bool = False,
) -> tuple[list[Tensor], Graph, list[_Shapes]]:
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
) -> tuple[list[Tensor], list[_Shapes]]:
    masks = {atom: torch.as_tensor(mask) for atom, mask in real.keep(plan).items()}
    masks_of = {atom: mask.numpy() for atom, mask in masks.items()}
    replay = _Replay(list(real.steps), masks_of, loops)
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    inputs = copy_inputs(real.example_inputs)
    with torch.no_grad():
        for name, axes in real.tensors.items():
            if isinstance(tensors[name], nn.Parameter) and name not in real.written:
                replay.parameters[tensors[name]] = axes  # masked where it is used
            else:
                tensors[name].copy_(replay.masked(tensors[name], axes))
        bypassed(twin, real, plan)
        with isolated(twin), WhereRead(), replay, _AttentionSteps(replay):
            result = run(twin, inputs)
    replay.finish()
    return output_tensors(wanted_outputs(result, real.outputs)), replay.shapes


def _plain(name: str) -> str:
    """``view`` and ``_unsafe_view`` are one operation here."""
    return name.removeprefix("aten.").partition(".")[0].removeprefix("_unsafe_").rstrip("_") or name


def _essential(steps: Sequence[_AnyStep]) -> list[_AnyStep]:
    """Without copies, which depend on the memory layout alone."""
    return [step for step in steps if _plain(step.name) not in _COPIES]


_COPIES = {"clone", "contiguous", "as_strided"}


_CONTEXT = 8
"""Operations by which a place in a loop is told from others."""


class _Replay(DispatchMode):
    """Runs the dense model with masked tensors, step by step beside the record of its trace.

    Args:
        steps: The record.
        masks: Keep masks by atom id.
        loops: Whether it may go back in the record, or leave steps out, as a loop does whose length
            values tell.
    """

    def __init__(self, steps: list[Step], masks: dict[int, Any], loops: bool = False) -> None:
        super().__init__()
        self.steps = _essential(steps)
        self.at = 0
        self.ran: list[str] = []
        self.masks = masks
        self.loops = loops
        self.shapes: list[_Shapes] = []
        self.parameters = TensorTable()
        self.paused = False

    def finish(self) -> None:
        """Raises VerificationError where the record goes on."""
        if self.at < len(self.steps):
            step = self.steps[self.at]
            raise _OtherPathError(
                f"the model takes another path with other values: it ends before {step.name}"
            )

    def masks_of(self, axes: Axes) -> list[Tensor | None]:
        found = [keep_mask(axis, self.masks) for axis in axes]
        return [None if mask.all() else torch.as_tensor(mask) for mask in found]

    def masked(self, tensor: Tensor, axes: Axes) -> Tensor:
        """The tensor with zeros at removed positions, laid out in memory as it was."""
        masks = self.masks_of(axes) if tensor.dim() == len(axes) else []
        if any(mask is not None for mask in masks):
            tensor = tensor.clone()
        for dim, mask in enumerate(masks):
            if mask is not None:
                shape = [-1 if i == dim else 1 for i in range(tensor.dim())]
                tensor.masked_fill_(~mask.to(tensor.device).view(shape), 0)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or func.namespace == "prim":
            return func(*args, **kwargs)
        return self.step(str(func), func, args, kwargs)

    def step(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if len(self.parameters):
            args, kwargs = self._with_masks(args), self._with_masks(kwargs)
        if _plain(name) in _COPIES:
            return func(*args, **kwargs)
        step = self._next(name, args, kwargs)
        out = self._masked(step, func, args, kwargs)
        self.shapes.append([list(tensor.shape) for tensor in rules.tensors(out)])
        return out

    def _next(self, name: str, args: Any, kwargs: Any) -> Step:
        """The step of the record that an operation is."""
        plain = _plain(name)
        given = list(rules.tensors((args, kwargs))) if self.loops else []

        def fits(place: int) -> bool:
            step = self.steps[place] if place < len(self.steps) else None
            return (
                step is not None
                and _plain(step.name) == plain
                and (not self.loops or self._takes(step, given))
            )

        if not fits(self.at):
            places = [place for place in range(len(self.steps)) if fits(place)]
            if not self.loops or not places:
                told = self.steps[self.at].name if self.at < len(self.steps) else None
                raise _OtherPathError(
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
        pairs = zip((_plain(step.name) for step in before), reversed(self.ran), strict=False)
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
                        value = value.index_select(dim, mask.nonzero()[:, 0].to(value.device))
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
                kept = torch.as_tensor(keep_mask(step.picked, self.masks)).nonzero()[:, 0]
                part = kept.to(part.device)[part]
            result.copy_(self._grow(part, result_axes))
        return full

    def _grow(self, tensor: Tensor, axes: Axes) -> Tensor:
        for dim, mask in enumerate(self.masks_of(axes)):
            if mask is not None:
                shape = list(tensor.shape)
                shape[dim] = len(mask)
                full = tensor.new_zeros(shape)
                tensor = full.index_copy(dim, mask.nonzero()[:, 0].to(tensor.device), tensor)
        return tensor


class _AttentionSteps(TorchFunctionMode):
    """Attention is one step of a trace, whatever kernel runs it."""

    def __init__(self, replay: _Replay | _Recorder) -> None:
        super().__init__()
        self.replay = replay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            with self:
                return body_of(func)(*args, **(kwargs or {}))
        if name != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        self.replay.paused = True
        try:
            return self.replay.step("scaled_dot_product_attention", func, args, kwargs or {})
        finally:
            self.replay.paused = False


def _without_zeros(model: nn.Module, graph: Graph) -> nn.Module:
    """A copy in evaluation, with tensors filled that are (nearly) zero.

    What they hide could not be checked.
    """
    empty = {
        name
        for name, parameter in model.named_parameters()
        if parameter.numel()
        and (parameter.is_floating_point() or parameter.is_complex())
        and float(parameter.detach().abs().max()) < 1e-4
    }
    twin = twin_of(model, graph, empty).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in twin.named_parameters():
        if name in empty:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(noise)
    return twin
