"""What is kept makes up for what is cut: the matrix of a run, its damping, and a plan's gates."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sosp_hub.criteria.compute.compensation import (
    Means,
    compensated,
    means_at_biases,
    refined,
    shifted,
)
from sosp_hub.criteria.compute.curvature import CurvatureMeasure, measurable_groups
from sosp_hub.derivatives import GaussNewton, LowRank, Protocol, by_group
from sosp_hub.distributed import OnDevice, logger, process_rows, process_sum
from sosp_hub.errors import CriterionError
from sosp_hub.evaluate import evaluate
from sosp_hub.finetune import recalibrate_norm
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.schema import Recipe
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Groups

if TYPE_CHECKING:
    from sosp_hub.pipeline.stages import Stages

MOST_BYTES = 100_000_000  # of a matrix that is kept with the result: 3,500 structures
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
"""What ``damping: auto`` tries, and each of ``compensate_steps``."""


class Curvature(NamedTuple):
    """The Gauss-Newton matrix of the gates of some groups."""

    groups: Groups
    found: GaussNewton


def curvature(stages: "Stages", graph: Graph) -> Curvature:
    """The matrix that ``sosp_i`` chooses by and compensation solves with.

    With ``damping: auto`` it is measured on three quarters of the calibration samples. What an
    earlier run left needs no data.
    """
    recipe, tensors = stages.recipe, stages.work.tensors("curvature")
    groups = measurable_groups(stages.groups(graph))
    if stages.scores is not None and stages.scores.curvature is not None:
        return _read(stages.scores.curvature, groups)

    def make() -> dict[str, Any]:
        auto = recipe.criterion.damping == "auto"
        batches = OnDevice(_parts(stages, hold_out=auto)[0], "curvature")
        criterion = _measure(recipe)
        found = criterion.measure(stages.model, groups, batches)
        whole = {"gradient": torch.cat(list(found.gradient.values()))}
        if isinstance(found.matrix, LowRank):
            whole["factor"] = found.matrix.factor
        else:
            whole["matrix"] = found.matrix
        about = {"loss": found.loss, "num_samples": found.num_samples, "exact": found.exact}
        about["form"] = found.form
        about["groups"] = {name: group.size for name, group in groups.items()}
        stages.save(lambda: save_file(whole, tensors, {"about": json.dumps(about)}))
        told = {} if found.form == "softmax" else {"curvature": found.form}
        return told if found.exact else {**told, "drawn_labels": criterion.num_draws}

    stages.stage("curvature", make, with_peak=True)
    return _read(tensors, groups)


def _measure(recipe: Recipe) -> CurvatureMeasure:
    """How the matrix is measured, whichever criterion scores."""
    options = recipe.criterion.curvature()
    protocol = Protocol(
        gate=options.pop("gate"),
        micro_batch_size=getattr(recipe.criterion, "micro_batch_size", None),
        process_sum=process_sum,
        process_rows=process_rows,
    )
    return CurvatureMeasure(protocol, **options, seed=recipe.seed)


def _read(path: Path, groups: Groups) -> Curvature:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no dict
    if about.pop("groups") != {name: group.size for name, group in groups.items()}:
        raise CriterionError(
            f"{path}: the matrix is of other groups than this model has; run the recipe again"
        )
    gradient = by_group(groups, tensors["gradient"])
    matrix = LowRank(tensors["factor"]) if "factor" in tensors else tensors["matrix"]
    found = GaussNewton(gradient=gradient, matrix=matrix, **about)
    return Curvature(groups, found)


def stored_curvature(stages: "Stages") -> Path | None:
    """The file of the matrix that this run used, to be kept with its result; None if too large."""
    criterion = stages.recipe.criterion
    if not (criterion.compensates() or criterion.uses_curvature):
        return None
    used = stages.scores.curvature if stages.scores is not None else None
    if used is None and stages.work.read("curvature"):
        used = stages.work.tensors("curvature")
    if used and (size := used.stat().st_size) > MOST_BYTES:
        logger.info(
            "%s of %.1f GB is not kept: another budget needs the data again", used.name, size / 1e9
        )
        return None
    return used


def with_gates(graph: Graph, plan: PruningPlan, measured: Curvature, damping: float) -> PruningPlan:
    """The plan with gates that make up for it; log lines say where there can be none."""
    obstacles = _obstacles(graph, measured.groups)
    for name, why in obstacles.items():
        logger.info("compensation: the gates of %s stay at 1: %s", name, why)
    if alone := plan.kept.keys() - measured.groups.keys():
        logger.info("compensation: nothing makes up for what goes from %s", ", ".join(alone))
    return compensated(
        plan, measured.groups, measured.found.matrix, damping, fixed=obstacles.keys()
    )


def _obstacles(graph: Graph, groups: Groups) -> dict[str, str]:
    return {name: why for name in groups if (why := graph.fold_obstacle(name))}


def refine(stages: "Stages", graph: Graph, plan: PruningPlan, measured: Curvature) -> PruningPlan:
    """The plan with its gates moved on, as many steps as the recipe asks for.

    Measured on three quarters of the calibration samples, chosen on the others; each process has
    its share.
    """
    num_steps, groups = stages.recipe.criterion.compensate_steps, measured.groups
    if not num_steps:
        return plan
    if not stages.has_data:
        logger.warning("compensate_steps: there is no data; the gates are those in closed form")
        return plan
    if alone := plan.kept.keys() - groups.keys():
        logger.warning(
            "compensate_steps: %s lose structures and have no gates; the other gates stay those "
            "in closed form",
            ", ".join(alone),
        )
        return plan
    criterion, (batches, held_out) = _measure(stages.recipe), _parts(stages, hold_out=True)
    return refined(
        plan,
        groups,
        lambda at: criterion.measure(stages.model, groups, OnDevice(batches, "step"), at),
        lambda at: criterion.divergence(stages.model, groups, OnDevice(held_out), at),
        num_steps,
        DAMPINGS,
        fixed=_obstacles(graph, groups).keys(),
    )


def made_up_for(
    stages: "Stages",
    graph: Graph,
    plan: PruningPlan,
    measured: Curvature | None,
    damping: float,
    means: Means | None,
) -> PruningPlan:
    """The plan with gates and shifts of biases, as the recipe asks for."""
    if measured and stages.recipe.criterion.compensates():
        plan = with_gates(graph, plan, measured, damping)
    return plan if means is None else shifted(plan, stages.model, graph, means)


def bias_means(stages: "Stages", graph: Graph) -> Means | None:
    """What can be folded into biases, where the recipe asks for it; a log line says how much."""
    if not stages.recipe.criterion.compensate_bias:
        return None
    _check_data(stages, "compensate_bias", "")
    groups, batches = stages.groups(graph), OnDevice(stages.calibration_batches(), "means")
    means = means_at_biases(stages.model, graph, groups, batches, process_sum)
    logger.info(
        "compensate_bias: constants of %d of %d groups can be folded; layers that read the others "
        "have no bias, or pad with zeros",
        len(means),
        len(groups),
    )
    return means


def choose_damping(
    stages: "Stages", graph: Graph, decide: Callable[[float], PruningPlan]
) -> dict[str, float]:
    """The loss on the held-out quarter of the calibration samples after the cut, by damping.

    The cut model is the one that the run would make: with BatchNorm statistics re-estimated where
    the recipe says so. No test data is seen.

    Args:
        stages: Of the run.
        graph: Of its model.
        decide: The plan with a damping.
    """
    measured_on, held_out = _parts(stages, hold_out=True)
    losses = {}
    for damping in DAMPINGS:
        pruned = stages.cut(graph, decide(damping), "fast")
        if stages.recipe.recalibrates():
            recalibrate_norm(pruned, measured_on)
        batches = OnDevice(held_out, f"damping {damping:g}")
        losses[f"{damping:g}"] = evaluate(pruned, batches, ("loss",))["loss"].value
    return losses


def _parts(stages: "Stages", *, hold_out: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Calibration batches to measure on, and those held out: none, or a quarter."""
    _check_data(stages, "compensate", ", since no curvature.safetensors was kept")
    num = stages.num_samples
    rest = num - num // 4 if hold_out else num
    if hold_out and rest == num:
        raise CriterionError(
            "criterion.damping: auto, and criterion.compensate_steps, hold out a quarter of the "
            f"calibration samples, and there are {num}; raise criterion.num_samples, or leave "
            "these out"
        )
    return stages.calibration_batches(0, rest), stages.calibration_batches(rest, num)


def _check_data(stages: "Stages", key: str, why: str) -> None:
    if not stages.has_data:
        raise CriterionError(
            f"criterion.{key}: what makes up for another cut is computed from the calibration "
            f"data{why}; give the data"
        )
