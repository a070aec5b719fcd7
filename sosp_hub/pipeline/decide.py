"""What a run decides: saliency, the plan, and what makes up for the cut."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sosp_hub import scoring
from sosp_hub.allocation import allocate
from sosp_hub.distributed import OnDevice, from_main, logger, process_sum, to_device
from sosp_hub.errors import VerificationError
from sosp_hub.evaluate import measure_latency
from sosp_hub.pipeline import compensation
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.zoo.load import example_inputs

if TYPE_CHECKING:
    from sosp_hub.pipeline.stages import Stages
    from sosp_hub.types import Saliency


def check(stages: "Stages", graph: Graph) -> None:
    """Refuses kinds that the model does not have and a budget that cannot be met."""
    criterion = stages.recipe.criterion
    scoring.check_per(criterion, criterion.per)
    kinds = stages.recipe.structure.kinds
    able = scoring.scorable_groups(stages.chosen(graph), type(criterion), kinds)
    targets = stages.recipe.budget.targets()
    targets.pop("latency_s", None)  # is measured, and takes its time
    if targets or stages.recipe.budget.groups:
        equal = {name: torch.ones(group.size) for name, group in able.items()}
        _allocated(stages, graph, equal, targets)


def score(stages: "Stages", graph: Graph) -> "Saliency":
    """Saliency of every structure that may go."""
    if stages.scores is not None:
        return stages.scores.saliency
    tensors = stages.work.tensors("saliency")
    measured = damping = None
    if stages.recipe.criterion.uses_curvature and not stages.work.read("saliency"):
        measured = compensation.curvature(stages, graph)
        if stages.recipe.criterion.by_damping():
            damping, _ = _damping(stages, graph, measured)

    def make() -> dict[str, Any]:
        saliency = _scores(stages, graph, measured, damping)
        whole = {name: scores.contiguous() for name, scores in saliency.items()}
        stages.save(lambda: save_file(whole, tensors))
        return {}

    stages.stage("saliency", make, with_peak=True)
    return load_file(tensors)


def _scores(
    stages: "Stages", graph: Graph, measured: compensation.Curvature | None, damping: float | None
) -> "Saliency":
    criterion = stages.recipe.criterion
    if damping:
        criterion = criterion.model_copy(update={"damping": damping})
    return scoring.score(
        stages.model,
        stages.chosen(graph),
        OnDevice(stages.calibration_batches(), "score"),
        criterion=criterion,
        kinds=stages.recipe.structure.kinds,
        seed=stages.recipe.seed,
        process_sum=process_sum,
        per=criterion.per,
        curvature=measured.found if measured else None,
    )


def plan_and_cut(
    stages: "Stages", graph: Graph, saliency: "Saliency"
) -> tuple[PruningPlan, nn.Module]:
    """A plan, and the smaller model that is proved equal to a mask.

    Where that fails for some groups, they stay whole and another plan is made of the rest.
    """
    left, whole = dict(saliency), dict[str, str]()
    while True:
        try:
            made = plan(stages, graph, left, whole)
            with stages.work.timed("cut"):
                return made, stages.cut(graph, made)
        except VerificationError as failure:
            found = [name for name in failure.groups if left.pop(name, None) is not None]
            if not found or not left:
                raise
            logger.warning("%s stays whole, and the plan is made anew: %s", found, failure)
            whole |= dict.fromkeys(found, str(failure))
            stages.work.forget("plan")


def plan(
    stages: "Stages", graph: Graph, saliency: "Saliency", whole: Mapping[str, str] | None = None
) -> PruningPlan:
    """Which structures are kept, and what makes up for the others."""
    criterion = stages.recipe.criterion
    measured, damping, losses = None, 0.0, {}
    if criterion.compensates() and not stages.work.read("plan"):
        measured = compensation.curvature(stages, graph)
        damping, losses = _damping(stages, graph, measured, whole or ())

    def make() -> dict[str, Any]:
        means = compensation.bias_means(stages, graph)
        plan = _plan(stages, graph, saliency, measured, damping, means)
        if measured:
            plan = compensation.refine(stages, graph, plan, measured)
        provenance = {
            **plan.provenance,
            "criterion": criterion.provenance(),
            "calibration": stages.calibration,
            **({"not_verified": dict(whole)} if whole else {}),
        }
        if losses:
            provenance["compensation"] |= {"held_out_losses": losses}
        base = {
            "base_model": stages.loaded.base_model,
            "base_revision": stages.loaded.base_revision,
        }
        return {"plan": dataclasses.replace(plan, provenance=provenance, **base).to_json()}

    return PruningPlan.from_json(stages.stage("plan", make)["plan"])


def _plan(
    stages: "Stages",
    graph: Graph,
    saliency: "Saliency",
    measured: compensation.Curvature | None,
    damping: float,
    means: compensation.Means | None,
) -> PruningPlan:
    """The main process's, since latency is measured."""
    budget = stages.recipe.budget
    measure = _seconds_of(stages, graph) if budget.latency_s else None
    plan = _allocated(stages, graph, saliency, budget.targets(), measure)
    plan = compensation.made_up_for(stages, graph, plan, measured, damping, means)
    return PruningPlan.from_json(from_main(plan.to_json()))


def _damping(
    stages: "Stages", graph: Graph, measured: compensation.Curvature, whole: Collection[str] = ()
) -> tuple[float, dict[str, float]]:
    """As the recipe says, or the best of some, with the losses of all."""
    criterion = stages.recipe.criterion
    if stages.scores is not None and stages.scores.damping:
        return stages.scores.damping, {}
    if criterion.damping != "auto":
        return criterion.damping, {}
    fixed = None if criterion.by_damping() else score(stages, graph)
    means = compensation.bias_means(stages, graph)

    def decide(damping: float) -> PruningPlan:
        saliency = fixed or _scores(stages, graph, measured, damping)
        left = {name: scores for name, scores in saliency.items() if name not in whole}
        return _plan(stages, graph, left, measured, damping, means)

    losses = stages.stage("damping", lambda: compensation.choose_damping(stages, graph, decide))
    return float(min(losses, key=lambda name: losses[name])), losses


def _allocated(
    stages: "Stages",
    graph: Graph,
    saliency: "Saliency",
    targets: dict[str, float],
    measure: Callable[[PruningPlan], float] | None = None,
) -> PruningPlan:
    budget = stages.recipe.budget
    return allocate(
        graph,
        saliency,
        measure=measure,
        **targets,
        groups=budget.groups,
        keep_at_least=budget.keep_at_least,
        round_to=budget.round_to,
        uniform=budget.uniform,
        target=budget.target,
        kinds=stages.recipe.structure.kinds,
    )


def _seconds_of(stages: "Stages", graph: Graph) -> Callable[[PruningPlan], float]:
    inputs = to_device(example_inputs(stages.loaded, stages.recipe.evaluate.latency_batch_size))

    def seconds(plan: PruningPlan) -> float:
        return measure_latency([stages.cut(graph, plan, "fast")], inputs, budget_s=0.3)[0]

    return seconds
