"""What is kept makes up for what is cut: a plan's gates and biases, and the damping of a run."""

from collections.abc import Callable

from sosp_hub.criteria.compute.compensation import (
    Means,
    compensated,
    means_at_biases,
    refined,
    shifted,
)
from sosp_hub.distributed import OnDevice, logger, process_sum
from sosp_hub.evaluate import evaluate
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.curvature import (
    Curvature,
    curvature_measure,
    parts_of_calibration,
    require_data,
)
from sosp_hub.pipeline.measuring import cut
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.training import dense
from sosp_hub.plan import PruningPlan
from sosp_hub.progress import progress
from sosp_hub.reconstruction.norms import recalibrate_after
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Groups

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
"""What ``damping: auto`` tries, and each of ``compensate_steps``."""


@step("damping", dense, "structure", "criterion", "budget")
def held_out_losses(
    context: Context, plan_with: Callable[[float], PruningPlan]
) -> dict[str, float]:
    """The loss on the held-out quarter of the calibration samples after the cut, by damping.

    The cut model is the one that the run would make: with BatchNorm statistics re-estimated where
    the recipe says so. No test data is seen.

    Args:
        context: Of the run.
        plan_with: The plan with a damping.
    """
    measured_on, held_out = parts_of_calibration(context, hold_out=True)
    losses = {}
    for damping in progress(DAMPINGS, "choose damping", unit="dampings"):
        plan = plan_with(damping)
        pruned = cut(context, plan, "fast")
        if context.recipe.recalibrates():
            recalibrate_after(pruned, context.model, context.graph, plan, measured_on)
        batches = OnDevice(held_out)
        measured = evaluate(pruned, batches, ("loss",), loss_fn=context.loss_fn(pruned))
        losses[f"{damping:g}"] = measured["loss"].value
    return losses


def with_gates(
    graph: Graph, plan: PruningPlan, curvature: Curvature, damping: float
) -> PruningPlan:
    """The plan with gates that make up for it; log lines say where there can be none."""
    obstacles = _obstacles(graph, curvature.groups)
    for name, why in obstacles.items():
        logger.info("compensation: the gates of %s stay at 1: %s", name, why)
    if alone := plan.kept.keys() - curvature.groups.keys():
        logger.info(
            "compensation: structures removed from %s are not compensated", ", ".join(alone)
        )
    matrix = curvature.gauss_newton.matrix
    return compensated(plan, curvature.groups, matrix, damping, fixed=obstacles.keys())


def refine(context: Context, plan: PruningPlan, groups: Groups) -> PruningPlan:
    """The plan with its gates moved on, as many steps as the recipe asks for.

    Measured on three quarters of the calibration samples, chosen on the others; each process has
    its share.
    """
    num_steps, model = context.recipe.criterion.compensate_steps, context.model
    if not num_steps:
        return plan
    if context.data is None:
        logger.warning("compensate_steps: there is no data; using the closed-form gates")
        return plan
    if alone := plan.kept.keys() - groups.keys():
        logger.warning(
            "compensate_steps: %s lose structures and have no gates; using the closed-form gates "
            "of the others",
            ", ".join(alone),
        )
        return plan
    measure = curvature_measure(context.recipe, context.loss_fn(model))
    batches, held_out = parts_of_calibration(context, hold_out=True)
    return refined(
        plan,
        groups,
        lambda at: measure.measure(model, groups, OnDevice(batches, "compensate"), at),
        lambda at: measure.divergence(model, groups, OnDevice(held_out), at),
        num_steps,
        DAMPINGS,
        fixed=_obstacles(context.graph, groups).keys(),
    )


def made_up_for(
    context: Context,
    plan: PruningPlan,
    curvature: Curvature | None,
    damping: float,
    means: Means | None,
) -> PruningPlan:
    """The plan with gates and shifts of biases, as the recipe asks for."""
    if curvature and context.recipe.criterion.compensates():
        plan = with_gates(context.graph, plan, curvature, damping)
    return plan if means is None else shifted(plan, context.model, context.graph, means)


def bias_means(context: Context) -> Means | None:
    """What can be folded into biases, where the recipe asks for it; a log line says how much."""
    if not context.recipe.criterion.compensate_bias:
        return None
    require_data(context, "compensate_bias")
    groups, batches = context.groups, OnDevice(context.calibration_batches(), "means")
    means = means_at_biases(context.model, context.graph, groups, batches, process_sum)
    logger.info(
        "compensate_bias: constants of %d of %d groups can be folded; layers that read the others "
        "have no bias, or pad with zeros",
        len(means),
        len(groups),
    )
    return means


def _obstacles(graph: Graph, groups: Groups) -> dict[str, str]:
    return {name: why for name in groups if (why := graph.fold_obstacle(name))}
