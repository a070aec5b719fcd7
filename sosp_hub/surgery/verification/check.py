"""Every cut is checked: shapes of each operation, then outputs against the masked model."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sosp_hub.compat.torch import out_of_memory
from sosp_hub.errors import SospHubError, VerificationError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.deferred import at_once, where_read
from sosp_hub.structure.graph import Graph, Route
from sosp_hub.structure.isolation import isolated
from sosp_hub.structure.routes import (
    Run,
    alike,
    all_ways,
    faster_without_data,
    find_routes,
    tell_unchecked,
    ways_apart,
    ways_together,
)
from sosp_hub.structure.trace import Program, call, output_tensors, trace, wanted_outputs
from sosp_hub.surgery.attributes import scales_after
from sosp_hub.surgery.verification.choices import Choices, FirstOfEqual, chooses
from sosp_hub.surgery.verification.masked import (
    OtherPathError,
    masked_pass,
    zeroed_model,
    zeros_mask,
)
from sosp_hub.surgery.verification.outputs import (
    ROUNDING,
    TOLERANCE,
    has_numbers,
    has_values,
    relative_error,
    results_of,
)
from sosp_hub.surgery.verification.steps import (
    AttentionSteps,
    Recorder,
    Scaled,
    Shapes,
    check_shapes,
    compare_steps,
    outputs_instead,
    unscaled,
)
from sosp_hub.surgery.verification.twins import (
    deferred_copy,
    doubled,
    in_double,
    is_coarse,
    twin_of,
    without_zeros,
)

_LOG = logging.getLogger("sosp_hub")

Cut = Callable[[nn.Module, Graph, PruningPlan], nn.Module]
"""Puts new tensors in the place of a model's; those of other models may lie in the same memory."""


def check_cut(model: nn.Module, graph: Graph, plan: PruningPlan, thorough: bool, cut: Cut) -> None:
    """Compares a cut copy with the masked model; run it ``isolated``.

    Beside the model itself one of its tensors is held at a time, masked or cut. Where its code
    wants more of a weight than operations on it, the copies are made as a whole.

    Raises:
        Exception: It differs (VerificationError), or whatever the cut or the cut model raises.
    """
    if not thorough and _same_steps_on_all_ways(model, graph, plan, cut):
        return
    double = is_coarse(model)
    try:
        _check_outputs(model, graph, plan, cut, double=double)
    except Exception as error:  # what code asks of a weight without data
        if out_of_memory(error):
            raise
        _LOG.debug("verified again with copies of the weights: %s", error)
        # it runs in double precision: its own would hide a fault that was found
        double = double and isinstance(error, VerificationError)
    else:
        return
    with at_once():
        _check_outputs(model, graph, plan, cut, double=double)


def _same_steps_on_all_ways(model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut) -> bool:
    """Whether the shapes of every step could be compared, or else outputs cannot (no weights)."""
    if _shapes_tell_little(model, graph, plan):
        return False
    pruned = cut(twin_of(model, graph), graph, plan)
    same = check_shapes(pruned, graph, plan, scaled=_traced_scales(graph, plan))
    if not same and outputs_instead(model, "the cut model"):
        return False
    known = graph.routes.known
    find_routes(model, graph)
    if graph.routes.known is not known:  # what other ways read is then cut as well
        pruned = cut(twin_of(model, graph), graph, plan)
    scaled = scales_after(graph, plan)
    for route in graph.routes.known:
        with _on(route):
            if check_shapes(pruned, route.graph, plan, route.run, scaled) or not same:
                continue
        same = False
        if outputs_instead(model, f"the cut model with {route.name}"):
            return False
    return True


def _traced_scales(graph: Graph, plan: PruningPlan) -> Scaled:
    """What becomes of numbers on the traced way: a fused kernel is given none."""
    return unscaled if graph.scales else scales_after(graph, plan)


def _shapes_tell_little(model: nn.Module, graph: Graph, plan: PruningPlan) -> bool:
    """Whether outputs can be compared and shapes need not be tried.

    Without some of its layers a model takes other steps, and with data how many tokens an expert
    is given depends on the cut.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    drops = any(graph.groups[name].kind == "layer" for name in plan.kept)
    return drops or (chooses(graph) and not faster_without_data(model, graph))


def _check_outputs(
    model: nn.Module, graph: Graph, plan: PruningPlan, cut: Cut, *, double: bool
) -> None:
    plain = without_zeros(model, graph)
    dense = doubled(plain, graph.written) if double else plain

    def in_use(traced: Graph) -> Graph:
        return in_double(traced) if double else traced

    def error_in(traced: Graph, run: Program, double: bool) -> tuple[float, _Ran]:
        """Of what is rounding less is left in double precision, also in what is chosen by it."""
        dense, used = (
            (doubled(plain, graph.written), in_double(traced)) if double else (plain, traced)
        )

        def with_data() -> Graph:
            inputs, outputs = traced.example_inputs, traced.outputs
            real = trace(plain, inputs, outputs, fake=False, program=run)
            return in_double(real) if double else real

        pruned = cut(deferred_copy(dense, traced), graph, plan)
        choices = Choices(any_made=chooses(traced))
        try:
            with choices.noted():
                expected, real, shapes = masked_pass(dense, used, plan, run, graph, with_data)
        except OtherPathError as error:
            _LOG.info("only outputs are compared: %s", error)
            way = [(run, used.example_inputs)]
            choices = Choices()
            with choices.noted():
                if zeros_mask(graph, plan):
                    zeroed = zeroed_model(dense, graph, plan)
                    expected = output_tensors(results_of(zeroed, graph, way)[0])
                else:
                    expected, *_ = masked_pass(dense, used, plan, run, graph, with_data, loops=True)
            with choices.repeated():
                outputs = results_of(pruned, graph, way)[0]
            return relative_error(output_tensors(outputs), expected), (pruned, outputs)
        scaled = (_traced_scales if traced is graph else scales_after)(graph, plan)
        with choices.repeated():
            outputs = _checked_outputs(pruned, real, plan, run, shapes, scaled)
        return relative_error(output_tensors(outputs), expected), (pruned, outputs)

    def check(route: Route | None) -> _Ran:
        traced, run = (graph, call) if route is None else (route.graph, route.run)
        with _on(route):
            try:
                error, ran = error_in(traced, run, double)
            except VerificationError:
                if not chooses(traced):
                    raise
                error, ran = error_in(traced, run, True)
            if TOLERANCE < error < (float("inf") if chooses(traced) else ROUNDING):
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
        pruned = cut(deferred_copy(dense, graph), graph, plan)
        if not _equal_on_all_ways(dense, in_use(graph), plan, pruned, outputs):
            find_routes(model, graph)
            for route in graph.routes.known:
                try:
                    check(route)
                except VerificationError:
                    if has_numbers(dense, in_use(route.graph), route.run):
                        raise
                    tell_unchecked(graph, route.name, "the model itself gives no finite number")
            del pruned
            _check_each_way(dense, in_use(graph), plan, cut)


_Ran = tuple[nn.Module, Any]
"""A cut model and what it returned for the traced inputs."""


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
        if zeros_mask(graph, plan):
            runs = [(way.run, way.inputs)]
            found = results_of(pruned, graph, runs)  # first: it may fail
            expected = results_of(zeroed_model(dense, graph, plan), graph, runs)
            return relative_error(output_tensors(found), output_tensors(expected)) <= TOLERANCE
        return any(
            _change(pruned, graph, together, plain) <= TOLERANCE
            and _change(twin_of(dense, graph), graph, together) <= TOLERANCE
            for together in ways_together(dense, graph)
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
        if before > ROUNDING:
            return before, math.inf
        return before, _change(cut(deferred_copy(model, graph), graph, plan), graph, ways)

    fine = in_double(graph)
    for ways, exact in zip(ways_apart(model, graph), ways_apart(model, fine), strict=True):
        before, after = errors(model, ways, graph)
        if TOLERANCE < before < ROUNDING or TOLERANCE < after < ROUNDING:
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
    with FirstOfEqual() if chooses(graph) else nullcontext():
        if plain is None:
            plain, *found = results_of(model, graph, [(call, graph.example_inputs), *runs])
        else:
            found = results_of(model, graph, runs)
    pairs = alike(ways, found, plain)
    if not any(has_values(tensor) for tensor, _ in pairs):
        return math.inf
    return relative_error(*zip(*pairs, strict=True))


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


def _checked_outputs(
    pruned: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    run: Program,
    masked: Sequence[Shapes],
    scaled: Scaled,
) -> Any:
    """Outputs of the cut model, each of whose steps must give the predicted shape."""
    recorder = Recorder()
    inputs = copy_inputs(graph.example_inputs)
    pruned.eval().requires_grad_(False)
    try:
        with (
            isolated(pruned),
            torch.no_grad(),
            where_read(pruned),
            recorder,
            AttentionSteps(recorder),
        ):
            result = run(pruned, inputs)
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run: {type(error).__name__}: {error}"
        ) from error
    compare_steps(recorder.taken, graph, plan, masked, scaled)
    return wanted_outputs(result, graph.outputs)
