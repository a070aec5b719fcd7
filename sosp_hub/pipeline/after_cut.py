"""Steps that follow a cut: metrics, norms re-estimated, fine-tuning, a row of a table."""

from collections.abc import Callable
from typing import Any

from safetensors.torch import load_model
from torch import nn

from sosp_hub.finetune import recalibrate_norm
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.measuring import measured
from sosp_hub.pipeline.planning import plan
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.training import trained


@step("cut_metrics", plan, "evaluate")
def cut_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics right after the cut."""
    return measured(context, pruned, "cut")


@step("recalibrated_metrics", plan, "finetune", "evaluate")
def recalibrated_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics with norms re-estimated."""
    return measured(context, pruned, "recalibrated")


@step("final", plan, "finetune")
def final(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Fine-tunes the cut model."""
    config = context.recipe.finetune
    teacher = context.model if config.distill else None
    return trained(context, final, pruned, config, "fine-tune", teacher)


@step("final_metrics", final, "evaluate")
def final_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics at the end."""
    return measured(context, pruned, "final")


@step("cell", final_metrics)
def cell(context: Context, row: Callable[[Context], dict[str, Any]]) -> dict[str, Any]:
    """A row of a comparison, made of all the others."""
    return row(context)


def follow_up(context: Context, pruned: nn.Module) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What follows a cut: metrics, norms re-estimated, fine-tuning; the loss curve of that.

    Metrics of ``cut``, ``recalibrated`` where there was a norm to re-estimate, and ``final`` where
    there was fine-tuning. Without data nothing is measured, and nothing trained.
    """
    if context.data is None:
        return {"cut": {}}, []
    metrics = {"cut": cut_metrics(context, pruned)}
    with context.cache.timed("recalibration"):
        recalibrated = (
            recalibrate_norm(pruned, context.calibration_batches())
            if context.recipe.recalibrates()
            else 0
        )
    if recalibrated:
        metrics["recalibrated"] = recalibrated_metrics(context, pruned)
    if not context.recipe.finetune.epochs:
        return metrics, []
    history = final(context, pruned)["history"]
    load_model(pruned, final.tensors(context))  # read on the CPU, copied to where the model is
    if history:
        metrics["final"] = final_metrics(context, pruned)
    return metrics, history
