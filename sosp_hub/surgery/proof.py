"""What becomes of a cut that verification refuses: the group whose cut goes wrong stays whole."""

import logging
from collections.abc import Sequence

from torch import nn

from sosp_hub.compat.torch import out_of_memory
from sosp_hub.errors import SospHubError, VerificationError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.isolation import isolated
from sosp_hub.structure.trace import describe
from sosp_hub.surgery.verification.check import Cut, check_cut
from sosp_hub.surgery.verification.outputs import outputs_of
from sosp_hub.surgery.verification.twins import twin_of

_LOG = logging.getLogger("sosp_hub")

_MOST_WHOLE = 8
"""Where more groups than these go wrong, it is not the groups."""


def verified_plan(
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    *,
    thorough: bool,
    cut: Cut,
    strict: bool = False,
) -> PruningPlan:
    """The part of a plan by which ``cut`` makes what ``model`` masked by that part computes.

    The groups whose cut goes wrong stay whole: ``graph.unproved`` and one line
    of the log say which, and why. Gates and shifts make up for what all groups lose, so that a
    plan with any is cut as it is or not at all.

    Raises:
        VerificationError: ``strict`` or gates, and the cut goes wrong; no group was found where it
            does, or too many were; or memory does not suffice.
    """
    strict = strict or bool(plan.gates or plan.shifts)
    with isolated(model):
        while True:
            part = plan if strict else graph.provable(plan)
            try:
                check_cut(model, graph, part, thorough and bool(part.kept), cut)
                break
            except Exception as error:  # noqa: BLE001 - whatever a wrong cut makes the code raise
                failure = error
            _check_memory(failure, thorough)
            _check_dense(model, graph, thorough)
            names = _culprit(model, graph, part, thorough, cut)
            told = _told(failure)
            if not names:
                raise VerificationError(
                    f"{told}. No group causes it: verification fails with nothing cut as well; "
                    "report the model"
                ) from failure
            group = _in_words(names)
            if strict or len(graph.unproved) >= _MOST_WHOLE:
                raise VerificationError(
                    f"{told}. Group {group} causes it; drop it from the saliency (it then stays "
                    "whole) and report the model",
                    names,
                ) from failure
            graph.unproved.update(dict.fromkeys(names, told))
    for name in plan.kept:
        if strict:
            graph.unproved.pop(name, None)
        elif name in graph.unproved:
            told = graph.unproved[name]
            _LOG.warning("group %r fails verification and stays whole: %s", name, told)
    return part


def _in_words(names: Sequence[str]) -> str:
    first, *tied = names
    more = f" and {len(tied) - 2} more" if len(tied) > 2 else ""
    return repr(first) + (f" (tied to {', '.join(map(repr, tied[:2]))}{more})" if tied else "")


def _told(failure: Exception) -> str:
    return str(failure) if isinstance(failure, SospHubError) else f"the cut fails: {failure!r}"


def _check_memory(failure: Exception, thorough: bool) -> None:
    """Tells a lack of memory from a cut that goes wrong."""
    if not out_of_memory(failure):
        return
    advice = "free memory, or trace with smaller example inputs"
    if thorough:
        advice = "free memory, trace with smaller example inputs, or give verify='fast'"
    raise VerificationError(f"memory does not suffice to verify the cut: {advice}") from failure


def _check_dense(model: nn.Module, graph: Graph, thorough: bool) -> None:
    """Tells inputs on which the model itself fails from a cut that fails."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    try:
        outputs = outputs_of(twin_of(model, graph), graph)
    except Exception as error:
        _check_memory(error, thorough)
        raise VerificationError(
            f"{type(model).__name__} itself does not run on the example inputs "
            f"{describe(graph.example_inputs)}: {type(error).__name__}: {error}. Trace it again, "
            "with inputs that it runs on, such as token numbers below its vocabulary's size"
        ) from error
    if not any(bool(tensor.isfinite().any()) for tensor in outputs):
        raise VerificationError(
            f"{type(model).__name__} itself returns no finite number for the example inputs "
            f"{describe(graph.example_inputs)}, so that no cut of it can be compared: give weights "
            "and inputs for which it does"
        )


def _culprit(
    model: nn.Module, graph: Graph, plan: PruningPlan, thorough: bool, cut: Cut
) -> tuple[str, ...]:
    """One group, and what is tied to it, without which those before it are cut rightly.

    Found by halving; none where it goes wrong with nothing cut.
    """
    tied = {name: tie for tie in graph.ties for name in tie}
    sets = list(dict.fromkeys(tuple(tied.get(name, (name,))) for name in plan.kept))

    def fails(number: int) -> bool:
        names = [name for names in sets[:number] for name in names if name in plan.kept]
        part = PruningPlan({n: plan.kept[n] for n in names}, {n: plan.sizes[n] for n in names})
        try:
            check_cut(model, graph, part, thorough, cut)
        except Exception as error:  # noqa: BLE001 - whatever the broken model raises, it is in here
            _check_memory(error, thorough)
            return True
        return False

    right, wrong = 0, len(sets)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (right, middle) if fails(middle) else (middle, wrong)
    if not sets or (wrong == 1 and fails(0)):
        return ()
    return tuple(name for name in sets[wrong - 1] if name in plan.kept)
