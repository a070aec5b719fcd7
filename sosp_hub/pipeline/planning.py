"""Steps that decide: saliency, the plan with what makes up for the cut; and the cut by it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sosp_hub import scoring
from sosp_hub.allocation import MEASURED, allocate
from sosp_hub.criteria.compute.compensation import Means
from sosp_hub.distributed import OnDevice, from_main, logger, process_sum
from sosp_hub.errors import CriterionError, RecipeError, SospHubError, VerificationError
from sosp_hub.pipeline.blocks import Block, as_blocks, blocks, blocks_of, left_of, removed, shares
from sosp_hub.pipeline.compensation import bias_means, held_out_losses, made_up_for, refine
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.curvature import Curvature, calibration_of, curvature_of
from sosp_hub.pipeline.measuring import check_measuring, cut, measure_of_plans, tried
from sosp_hub.pipeline.promising import check_promise, promised
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.training import dense, masked
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.criteria import MaskTrainedCriterion
from sosp_hub.recipe.schema import Recipe
from sosp_hub.sharding import check_sharding
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


@step("saliency", dense, "structure", "criterion.scores", with_peak=True)
def saliency(
    context: Context, curvature: Curvature | None, damping: float | None
) -> dict[str, Any]:
    """Scores every structure that may go."""
    scores = _scores(context, curvature, damping)
    whole = {name: values.contiguous() for name, values in scores.items()}
    context.cache.save(lambda: save_file(whole, saliency.tensors(context)))
    return {}


@step("plan", dense, "structure", "criterion", "budget", says="allocate")
def plan(
    context: Context,
    scores: "Saliency",
    whole: Mapping[str, str],
    curvature: Curvature | None,
    damping: float,
    losses: Mapping[str, float],
) -> dict[str, Any]:
    """Chooses which structures are kept, and what makes up for the others."""
    means = bias_means(context)
    targets = context.recipe.budget.targets()
    if context.recipe.budget.max_drop:
        targets = _promised(context, scores, curvature, damping, means)
    made = _planned(context, scores, curvature, damping, means, targets)
    if curvature:
        made = refine(context, made, curvature.groups)
    provenance = {
        **made.provenance,
        "criterion": context.recipe.criterion.provenance(),
        "calibration": calibration_of(context),
        **({"not_verified": dict(whole)} if whole else {}),
        **({"blocks": gone} if (gone := removed(context)) else {}),
    }
    if training := masked.made(context):
        provenance["masks"] = {k: v for k, v in training.items() if k != "history"}
    if losses:
        provenance["compensation"] |= {"held_out_losses": losses}
    base = context.loaded.base_model, context.loaded.base_revision
    made = dataclasses.replace(
        made, provenance=provenance, base_model=base[0], base_revision=base[1]
    )
    return {"plan": made.to_json()}


def check(context: Context) -> None:
    """Refuses kinds that the model does not have and a budget that cannot be met."""
    criterion, budget = context.recipe.criterion, context.recipe.budget
    scoring.check_per(criterion, criterion.per)
    scoring.check_loss(criterion, context.loss_fn(context.model))
    check_promise(context)
    check_measuring(context)
    masked_training = isinstance(criterion, MaskTrainedCriterion)
    for training in (context.dense_training, context.recipe.finetune):
        if training is not None and (training.epochs or masked_training):
            check_sharding(context.accelerator, context.model, training, penalized=masked_training)
    for target in budget.target:
        try:
            target.check(context.model)
        except SospHubError as error:
            raise type(error)(f"budget.target: {error}") from error
    kinds = context.recipe.structure.kinds
    able = scoring.scorable_groups(context.graph_of_groups, type(criterion), kinds)
    if criterion.silences and not any(group.rectified for group in able.values()):
        raise CriterionError(
            f"criterion {criterion.name!r} has masks on channels, and there are none of the kinds "
            f"{', '.join(kinds)}; add channel to structure.kinds"
        )
    if context.recipe.schedule is not None:
        check_stacks(able)
    targets = budget.targets()
    targets = {k: v for k, v in targets.items() if k not in MEASURED}  # these take their time
    if targets or budget.groups:
        equal = {name: torch.ones(group.size) for name, group in able.items()}
        allocated(context.recipe, context.graph, equal, targets)
    if context.recipe.structure.blocks is not None:
        blocks_of(context.graph, context.recipe.structure.blocks.kinds)


def check_stacks(able: Mapping[str, Group]) -> None:
    """Refuses rounds that drop layers of a stack and layers inside those that are left.

    Raises:
        RecipeError: Names one stack in another.
    """
    stacks = [name.rpartition(":")[0] for name, group in able.items() if group.kind == "layer"]
    for outer in stacks:
        if inner := next((stack for stack in stacks if stack.startswith(f"{outer}.")), None):
            fault = (
                f"schedule: {inner!r} is a stack of layers inside one of {outer!r}, which has "
                "another number once one before it is gone, so that rounds cannot be put together; "
                f"write structure.exclude: ['{outer}:layer'], or cut without schedule"
            )
            raise RecipeError("the recipe", [fault])


def score(context: Context) -> "Saliency":
    """Saliency of every structure that may go."""
    if context.scores is not None:
        return context.scores.saliency
    criterion, curvature, damping = context.recipe.criterion, None, None
    if criterion.uses_curvature and saliency.made(context) is None:
        curvature = curvature_of(context)
        if criterion.by_damping():
            damping, _ = _damping(context, curvature)
    saliency(context, curvature, damping)
    return load_file(saliency.tensors(context))


def decide(
    context: Context, scores: "Saliency", whole: Mapping[str, str] | None = None
) -> PruningPlan:
    """Which structures are kept, and what makes up for the others.

    Args:
        context: Of the run.
        scores: Of every structure that may go.
        whole: Groups that stay whole, with the reason.
    """
    curvature, damping, losses = None, 0.0, {}
    if context.recipe.criterion.compensates() and plan.made(context) is None:
        curvature = curvature_of(context)
        damping, losses = _damping(context, curvature, whole or ())
    made = plan(context, scores, whole or {}, curvature, damping, losses)
    decided = PruningPlan.from_json(made["plan"])
    if context.recipe.criterion.silences:
        _tell_of_silent(decided, scores)
    return decided


def _tell_of_silent(decided: PruningPlan, scores: "Saliency") -> None:
    """Says where structures that should go, since they score less than 0, are kept by a floor."""
    held: dict[str, int] = {}
    for name, values in scores.items():
        kept = values[list(decided.kept.get(name, range(len(values))))]
        silent = int((kept < 0).sum()) - int(bool((kept < 0).all()))  # one of a group always stays
        if silent:
            held[name] = silent
    if not held:
        return
    logger.warning(
        "%d structures that score less than 0 are kept, by a floor, a tie or rounding: %s; "
        "budget.keep_at_least=0 keeps one of each group",
        sum(held.values()),
        ", ".join(f"{number} in {name}" for name, number in held.items()),
    )


def decide_and_cut(context: Context, scores: "Saliency") -> tuple[PruningPlan, nn.Module]:
    """A plan, and the smaller model that is proved equal to a mask.

    Where that fails for some groups, they stay whole and another plan is made of the rest.
    """
    left, whole = dict(scores), dict[str, str]()
    while True:
        try:
            decided = decide(context, left, whole)
            with context.cache.timed("cut", "cut and verify"):
                return decided, cut(context, decided)
        except VerificationError as failure:
            gone = {block["group"] for block in removed(context)}
            if stuck := gone.intersection(failure.groups):
                logger.warning(
                    "%s cannot be left out as a whole and stays; choosing blocks again: %s",
                    *(", ".join(sorted(stuck)), failure),
                )
                context.stuck.update(stuck)
                for step in (blocks, plan):
                    context.cache.forget(step)
                continue
            unproved = [name for name in failure.groups if left.pop(name, None) is not None]
            if not unproved or not left:
                raise
            logger.warning(
                "%s cannot be verified and stays whole; allocating again: %s", unproved, failure
            )
            whole |= dict.fromkeys(unproved, str(failure))
            for step in (plan, promised):
                context.cache.forget(step)


def _scores(context: Context, curvature: Curvature | None, damping: float | None) -> "Saliency":
    criterion = context.recipe.criterion
    if damping:
        criterion = criterion.model_copy(update={"damping": damping})
    return scoring.score(
        context.model,
        context.graph_of_groups,
        OnDevice(context.calibration_batches(), "score"),
        criterion=criterion,
        loss_fn=context.loss_fn(context.model),
        kinds=context.recipe.structure.kinds,
        seed=context.recipe.seed,
        process_sum=process_sum,
        per=criterion.per,
        curvature=curvature.gauss_newton if curvature else None,
    )


def _planned(
    context: Context,
    scores: "Saliency",
    curvature: Curvature | None,
    damping: float,
    means: Means | None,
    targets: dict[str, float] | None = None,
) -> PruningPlan:
    """The main process's, since latency is measured."""
    budget = context.recipe.budget
    targets = budget.targets() if targets is None else targets
    measure = _measure(context, targets)
    allocated = _allocated(context, scores, targets, measure)
    whole = made_up_for(context, allocated, curvature, damping, means)
    return PruningPlan.from_json(from_main(whole.to_json()))


def _promised(
    context: Context,
    scores: "Saliency",
    curvature: Curvature | None,
    damping: float,
    means: Means | None,
) -> dict[str, float]:
    """The budgets of the smallest model within ``max_drop``."""

    def plan_of(targets: Mapping[str, float]) -> PruningPlan:
        measure = _measure(context, targets)
        return PruningPlan.from_json(
            from_main(_allocated(context, scores, dict(targets), measure).to_json())
        )

    def make(allocated: PruningPlan) -> nn.Module:
        made = made_up_for(context, allocated, curvature, damping, means)
        return tried(context, refine(context, made, curvature.groups) if curvature else made)

    return {"macs": promised(context, plan_of, make)["macs"]}


def _measure(
    context: Context, targets: Collection[str]
) -> Callable[[PruningPlan], Mapping[str, float]] | None:
    """What measured budgets are told by; None where there is none."""
    measured = set(MEASURED) & set(targets)
    return measure_of_plans(context, measured) if measured else None


def _damping(
    context: Context, curvature: Curvature, whole: Collection[str] = ()
) -> tuple[float, dict[str, float]]:
    """As the recipe says, or the best of some, with the losses of all."""
    criterion = context.recipe.criterion
    if context.scores is not None and context.scores.damping:
        return context.scores.damping, {}
    if criterion.damping != "auto":
        return criterion.damping, {}
    fixed = None if criterion.by_damping() else score(context)
    means = bias_means(context)

    def plan_with(damping: float) -> PruningPlan:
        scores = fixed or _scores(context, curvature, damping)
        left = {name: values for name, values in scores.items() if name not in whole}
        return _planned(context, left, curvature, damping, means)

    losses = held_out_losses(context, plan_with)
    return float(min(losses, key=lambda name: losses[name])), losses


def _allocated(
    context: Context,
    scores: "Saliency",
    targets: dict[str, Any],
    measure: Callable[[PruningPlan], Mapping[str, float]] | None = None,
) -> PruningPlan:
    return allocated(
        context.recipe, context.graph, scores, targets, measure, gone=as_blocks(removed(context))
    )


def allocated(
    recipe: Recipe,
    graph: Graph,
    scores: "Saliency",
    targets: dict[str, Any],
    measure: Callable[[PruningPlan], Mapping[str, float]] | None = None,
    *,
    gone: Sequence[Block] = (),
) -> PruningPlan:
    """The plan of a recipe's budget, with other shares, and without whole blocks that go."""
    budget = recipe.budget
    inside = tuple(f"{block.layer}." for block in gone if block.kind == "layer")
    goes = {name: torch.tensor(values) for name, values in left_of(graph, gone).items()}
    scores = {name: x for name, x in scores.items() if not inside or not name.startswith(inside)}
    return allocate(
        graph,
        scores | goes,
        measure=measure,
        **targets,
        groups={**budget.groups, **shares(graph, gone)},
        keep_at_least=budget.keep_at_least,
        round_to=budget.round_to,
        uniform=budget.uniform,
        target=budget.target,
        kinds=(*recipe.structure.kinds, *(graph.groups[block.group].kind for block in gone)),
    )
