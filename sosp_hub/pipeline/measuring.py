"""What steps measure with, and the cut."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from accelerate.utils import set_seed
from torch import nn

from sosp_hub.data.loading import Split, make_loader
from sosp_hub.distributed import OnDevice, process_sum, progress, to_device
from sosp_hub.evaluate import evaluate, measure_latency
from sosp_hub.finetune import recalibrate_norm
from sosp_hub.pipeline.context import Context
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.tasks import find_task, metric_names
from sosp_hub.reconstruction.rebuild import Rebuilt, rebuilt_weights
from sosp_hub.surgery.apply import apply
from sosp_hub.zoo.load import example_inputs


def measured(context: Context, model: nn.Module, label: str) -> dict[str, Any]:
    """Metrics on the test split, and as ``METRIC@NAME`` on those of other data sets."""
    metrics = _measured(context, model, context.test, label)
    for name, (split, _) in context.others.items():
        found = _measured(context, model, split, f"{label} on {name}")
        metrics |= {f"{key}@{name}": value for key, value in found.items() if "/" not in key}
    return metrics


def _measured(context: Context, model: nn.Module, split: Split, label: str) -> dict[str, Any]:
    section = context.recipe.evaluate
    num_workers = context.recipe.data.num_workers
    loader = make_loader(split, section.batch_size, num_workers=num_workers)
    shown = progress(context.accelerator.prepare_data_loader(loader), f"measure {label}")
    assert context.data is not None  # nothing is measured without it
    task, info = find_task(context.recipe.model.task), context.data.info
    names = metric_names(section.metrics, task, info)
    metrics = evaluate(
        model,
        shown,
        names,
        class_names=split.class_names,
        loss_fn=context.loss_fn(model),
        meters=task.meters(info, context.loaded.processor),
    )
    return {name: dataclasses.asdict(metric) for name, metric in metrics.items()}


def cut(
    context: Context, plan: PruningPlan, verify: Literal["thorough", "fast"] | None = None
) -> nn.Module:
    """The smaller model; a cut that is not proved equal to a mask raises.

    Cuts and proves on the CPU, where the traced inputs are and float32 means float32.
    """
    set_seed(context.recipe.seed)
    device = context.accelerator.device
    verify = verify or context.recipe.structure.verify
    try:
        return apply(context.model.cpu(), context.graph, plan, verify=verify, strict=True).to(
            device
        )
    finally:
        context.model.to(device)


def rebuild_weights(context: Context, plan: PruningPlan) -> Rebuilt:
    """The dense model with the weights that read what is cut solved again."""
    config = context.recipe.rebuild
    batches = context.calibration_batches(0, context.at_most(config.num_samples))
    return rebuilt_weights(
        context.model,
        context.graph,
        plan,
        OnDevice(batches, "rebuild"),
        damping=config.damping,
        dense_share=config.dense_share,
        process_sum=process_sum,
    )


def tried(context: Context, plan: PruningPlan) -> nn.Module:
    """The model that a plan leaves once it is rebuilt and its norms are re-estimated."""
    made = rebuild_weights(context, plan) if context.recipe.rebuilds() else None
    if made is None or not made.layers:
        pruned = cut(context, plan, "fast")
    else:
        pruned = apply(made.model.cpu(), context.graph, made.plan, verify="fast")
        pruned = pruned.to(context.accelerator.device)
    if context.recipe.recalibrates():
        recalibrate_norm(pruned, context.calibration_batches())
    return pruned


def seconds_of_plans(context: Context) -> Callable[[PruningPlan], float]:
    """From a plan to the seconds of a forward pass of what it leaves."""
    batch = context.recipe.evaluate.latency_batch_size
    inputs = to_device(example_inputs(context.loaded, batch))

    def seconds(plan: PruningPlan) -> float:
        return measure_latency([cut(context, plan, "fast")], inputs, budget_s=0.3)[0]

    return seconds
