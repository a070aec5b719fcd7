"""The step that measures the Gauss-Newton matrix, for the criteria and for compensation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sosp_hub.criteria.compute.curvature import CurvatureMeasure, measurable_groups
from sosp_hub.derivatives import GaussNewton, LowRank, Protocol, by_group
from sosp_hub.distributed import OnDevice, logger, process_rows, process_sum
from sosp_hub.errors import CriterionError
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.training import dense
from sosp_hub.recipe.schema import Recipe
from sosp_hub.structure.groups import Groups

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

MOST_BYTES = 100_000_000  # of a matrix that is kept with the result: 3,500 structures


class Curvature(NamedTuple):
    """The Gauss-Newton matrix of the gates of some groups."""

    groups: Groups
    gauss_newton: GaussNewton


@step("curvature", dense, "structure", "criterion.curvature", with_peak=True)
def curvature(context: Context, groups: Groups) -> dict[str, Any]:
    """Measures the matrix; on three quarters of the calibration samples with ``damping: auto``."""
    auto = context.recipe.criterion.damping == "auto"
    batches, _ = parts_of_calibration(context, hold_out=auto)
    measure = curvature_measure(context.recipe, context.loss_fn(context.model))
    measured = measure.measure(context.model, groups, OnDevice(batches, "curvature"))
    tensors = {"gradient": torch.cat(list(measured.gradient.values()))}
    if isinstance(measured.matrix, LowRank):
        tensors["factor"] = measured.matrix.factor
    else:
        tensors["matrix"] = measured.matrix
    about = json.dumps(
        {
            "loss": measured.loss,
            "num_samples": measured.num_samples,
            "exact": measured.exact,
            "form": measured.form,
            "unused": measured.unused,
            "groups": {name: group.size for name, group in groups.items()},
        }
    )
    path = curvature.tensors(context)
    context.cache.save(lambda: save_file(tensors, path, {"about": about}))
    form = {} if measured.form == "softmax" else {"curvature": measured.form}
    return form if measured.exact else {**form, "drawn_labels": measure.num_draws}


def curvature_of(context: Context) -> Curvature:
    """The matrix that criteria choose by and compensation solves with.

    What an earlier run left needs no data.
    """
    groups = measurable_groups(context.groups)
    if context.scores is not None and context.scores.curvature is not None:
        return _read(context.scores.curvature, groups)
    curvature(context, groups)
    return _read(curvature.tensors(context), groups)


def stored_curvature(context: Context) -> Path | None:
    """The file of the matrix that this run used, to be kept with its result; None if too large."""
    criterion = context.recipe.criterion
    if not (criterion.compensates() or criterion.uses_curvature):
        return None
    used = context.scores.curvature if context.scores is not None else None
    if used is None and curvature.made(context) is not None:
        used = curvature.tensors(context)
    if used and (size := used.stat().st_size) > MOST_BYTES:
        logger.info(
            "%s of %.1f GB is not kept: another budget needs the data again", used.name, size / 1e9
        )
        return None
    return used


def calibration_of(context: Context) -> Mapping[str, Any]:
    """What calibrates, for the report."""
    if context.scores is not None:
        return context.calibration
    return {**context.calibration, **(curvature.made(context) or {})}


def curvature_measure(recipe: Recipe, loss_fn: "LossFn | None") -> CurvatureMeasure:
    """How the matrix is measured, whichever criterion scores."""
    options = recipe.criterion.curvature()
    protocol = Protocol(
        loss_fn=loss_fn,
        gate=options.pop("gate"),
        micro_batch_size=getattr(recipe.criterion, "micro_batch_size", None),
        process_sum=process_sum,
        process_rows=process_rows,
        unused=set(),
    )
    return CurvatureMeasure(protocol, **options, seed=recipe.seed)


def parts_of_calibration(
    context: Context, *, hold_out: bool
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Calibration batches to measure on, and those held out: none, or a quarter.

    Raises:
        CriterionError: There is no data, or too little.
    """
    require_data(context, "compensate", ", since no curvature.safetensors was kept")
    num = context.num_samples
    rest = num - num // 4 if hold_out else num
    if hold_out and rest == num:
        raise CriterionError(
            "criterion.damping: auto, and criterion.compensate_steps, hold out a quarter of the "
            f"calibration samples, and there are {num}; raise criterion.num_samples, or leave "
            "these out"
        )
    return context.calibration_batches(0, rest), context.calibration_batches(rest, num)


def require_data(context: Context, key: str, why: str = "") -> None:
    """Raises CriterionError where a key of ``criterion`` needs data and there is none."""
    if context.data is None:
        raise CriterionError(
            f"criterion.{key}: compensation of another cut is computed from the calibration "
            f"data{why}; give the data"
        )


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
    return Curvature(groups, GaussNewton(gradient=gradient, matrix=matrix, **about))
