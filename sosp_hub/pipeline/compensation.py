"""What is kept makes up for what is cut: the matrix of a run, its damping, and a plan's gates."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from sosp_hub.criteria.compensation import compensated
from sosp_hub.criteria.registry import scorable_groups
from sosp_hub.criteria.sosp_i import SospI
from sosp_hub.derivatives import GaussNewton, by_group
from sosp_hub.distributed import OnDevice, logger, process_sum
from sosp_hub.errors import CriterionError
from sosp_hub.evaluate import evaluate
from sosp_hub.finetune import recalibrate_norm
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Groups

if TYPE_CHECKING:
    from sosp_hub.pipeline.stages import Stages

DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""What ``damping: auto`` tries."""


class Curvature(NamedTuple):
    """The Gauss-Newton matrix of the gates of some groups."""

    groups: Groups
    found: GaussNewton


def curvature(stages: "Stages", graph: Graph) -> Curvature:
    """The matrix that ``sosp_i`` chooses by and compensation solves with.

    With ``damping: auto`` it is measured on three quarters of the calibration samples.
    """
    recipe, tensors = stages.recipe, stages.work.tensors("curvature")
    groups = scorable_groups(stages.chosen(graph), "sosp_i", recipe.structure.kinds)

    def make() -> dict[str, Any]:
        section = recipe.criterion
        criterion = SospI(
            **section.curvature(),
            micro_batch_size=getattr(section, "micro_batch_size", None),
            seed=recipe.seed,
            process_sum=process_sum,
        )
        batches = OnDevice(_parts(stages)[0], "curvature")
        found = criterion.measure(stages.model, groups, batches)
        whole = {"gradient": torch.cat(list(found.gradient.values())), "matrix": found.matrix}
        stages.save(lambda: save_file(whole, tensors))
        return {"loss": found.loss, "num_samples": found.num_samples, "exact": found.exact}

    record, whole = stages.stage("curvature", make, with_peak=True), load_file(tensors)
    gradient = by_group(groups, whole["gradient"])
    return Curvature(groups, GaussNewton(gradient=gradient, matrix=whole["matrix"], **record))


def with_gates(graph: Graph, plan: PruningPlan, measured: Curvature, damping: float) -> PruningPlan:
    """The plan with gates that make up for it; log lines say where there can be none."""
    obstacles = {name: why for name in measured.groups if (why := graph.fold_obstacle(name))}
    for name, why in obstacles.items():
        logger.info("compensation: the gates of %s stay at 1: %s", name, why)
    if alone := plan.kept.keys() - measured.groups.keys():
        logger.info("compensation: nothing makes up for what goes from %s", ", ".join(alone))
    return compensated(
        plan, measured.groups, measured.found.matrix, damping, fixed=obstacles.keys()
    )


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
    measured_on, held_out = _parts(stages)
    losses = {}
    for damping in DAMPINGS:
        pruned = stages.cut(graph, decide(damping), "fast")
        if stages.recipe.finetune.recalibrate_norm:
            recalibrate_norm(pruned, measured_on)
        batches = OnDevice(held_out, f"damping {damping:g}")
        losses[f"{damping:g}"] = evaluate(pruned, batches, ("loss",))["loss"].value
    return losses


def _parts(stages: "Stages") -> tuple[Sequence[Any], Sequence[Any]]:
    """Calibration batches to measure on, and those held out."""
    if not stages.has_data:
        raise CriterionError(
            "criterion.compensate: what makes up for another cut is computed from the "
            "calibration data; give the data"
        )
    num = stages.num_samples
    if stages.recipe.criterion.damping != "auto":
        return stages.calibration_batches(0, num), ()
    held_out = num // 4
    if not held_out:
        raise CriterionError(
            f"criterion.damping: auto holds out a quarter of the calibration samples, and there "
            f"are {num}; raise criterion.num_samples, or give a number"
        )
    rest = num - held_out
    return stages.calibration_batches(0, rest), stages.calibration_batches(rest, num)
