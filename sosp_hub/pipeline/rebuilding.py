"""The step that solves the weights that read what was cut again."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from sosp_hub.data.loading import calibration_batches
from sosp_hub.distributed import logger
from sosp_hub.pipeline.calibration_inputs import write_inputs
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.measuring import rebuild_weights
from sosp_hub.pipeline.planning import plan
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.plan import PruningPlan
from sosp_hub.reconstruction.norms import has_norms
from sosp_hub.report.numbers import size
from sosp_hub.surgery.apply import apply


@step("rebuilt", plan, "rebuild", with_peak=True)
def rebuilt(context: Context, decided: PruningPlan) -> dict[str, Any]:
    """Solves them layer by layer; leaves the weights of the cut model, and tells of each layer."""
    config = context.recipe.rebuild
    made = rebuild_weights(context, decided)
    if made.layers:
        small = apply(made.model.cpu(), context.graph, made.plan, verify="fast", strict=True)
        context.cache.save(lambda: save_model(small, str(rebuilt.tensors(context))))
    return {
        "method": config.method,
        "num_samples": context.at_most(config.num_samples),
        "layers": [dataclasses.asdict(layer) for layer in made.layers],
        "blocks": [dataclasses.asdict(block) for block in made.blocks],
        "left": made.left,
    }


def rebuild(context: Context, decided: PruningPlan, pruned: nn.Module) -> bool:
    """Gives a cut model the weights that make up for the cut, in place; whether there were any."""
    if not context.recipe.rebuilds():
        return False
    if not context.has_inputs:
        logger.info("rebuild: skipped, there is no calibration data")
        return False
    if not rebuilt(context, decided)["layers"]:
        return False
    load_model(pruned, rebuilt.tensors(context))  # read on the CPU, copied to where the model is
    return True


def keep_inputs(context: Context, model: nn.Module, path: Path) -> None:
    """Writes the inputs of all processes, where the recipe says so; the main process alone."""
    if not context.recipe.output.any_budget or not context.recipe.rebuilds():
        return
    if context.data is None:
        kept = context.scores and context.scores.calibration_inputs
        if kept:
            shutil.copyfile(kept, path)
        return
    num, norms = context.recipe.rebuild.num_samples, has_norms(model)
    if norms and context.recipe.recalibrates():
        num = max(num, context.recipe.criterion.num_samples)
    whole = calibration_batches(
        context.calibration_splits, context.at_most(num), context.recipe.criterion.batch_size,
        seed=context.recipe.seed,
    )  # fmt: skip
    write_inputs(whole, model, path)
    logger.info("calibration inputs for other budgets: %s kept", size(path.stat().st_size))


def rebuild_told(context: Context) -> dict[str, Any]:
    """For the report: each layer before and after, and what it took; empty where nothing ran."""
    record = context.cache.read(rebuilt)
    if record is None:
        return {}
    took = {"seconds": record["seconds"], "peak_bytes": record["peak_bytes"]}
    return {**record["made"], **took}
