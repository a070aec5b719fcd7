"""What steps measure with, and the cut."""

import dataclasses
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from torch import nn

from sosp_hub.data.loading import Split, make_loader
from sosp_hub.distributed import OnDevice, process_sum, to_device
from sosp_hub.evaluate import evaluate
from sosp_hub.harness import check_harness, harness_metrics
from sosp_hub.latency import Decoder, LatencyTable, ServingMemory, table_path
from sosp_hub.pipeline.context import Context
from sosp_hub.plan import PruningPlan
from sosp_hub.progress import progress
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.tasks import find_task, metric_names
from sosp_hub.reconstruction.norms import recalibrate_after
from sosp_hub.reconstruction.rebuild import Rebuilt, rebuilt_weights
from sosp_hub.surgery.apply import apply
from sosp_hub.tasks.metrics import LIBRARIES, Meter, OfAll, library_of
from sosp_hub.zoo.load import Loaded, example_inputs


def measured(context: Context, model: nn.Module, label: str) -> dict[str, Any]:
    """Metrics on the test split, and as ``METRIC@NAME`` on those of other data sets."""
    metrics = _measured(context, model, context.test, label)
    for name, (split, _) in context.others.items():
        found = _measured(context, model, split, f"{label} on {name}")
        metrics |= {f"{key}@{name}": value for key, value in found.items() if "/" not in key}
    section = context.recipe.evaluate
    if section.harness:
        found = harness_metrics(
            model,
            context.loaded.tokenizer,
            section.harness,
            folder=section.harness_folder,
            limit=section.harness_limit,
            batch_size=section.batch_size,
        )
        metrics |= {name: dataclasses.asdict(metric) for name, metric in found.items()}
    return metrics


def _measured(context: Context, model: nn.Module, split: Split, label: str) -> dict[str, Any]:
    section = context.recipe.evaluate
    num_workers = context.recipe.data.num_workers
    loader = make_loader(split, section.batch_size, num_workers=num_workers)
    shown = progress(context.accelerator.prepare_data_loader(loader), f"measure {label}")
    names, meters = _metrics(context)
    metrics = evaluate(
        model,
        shown,
        names,
        class_names=split.class_names,
        loss_fn=context.loss_fn(model),
        meters=meters,
    )
    return {name: dataclasses.asdict(metric) for name, metric in metrics.items()}


def _metrics(context: Context) -> tuple[Sequence[str], Mapping[str, Meter | OfAll]]:
    """Names of what is measured, and the task's own meters."""
    assert context.data is not None  # nothing is measured without it
    task, info = find_task(context.recipe.model.task), context.data.info
    names = metric_names(context.recipe.evaluate.metrics, task, info)
    return names, task.meters(info, context.loaded.processor)


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
    batches = context.inputs(config.num_samples)
    return rebuilt_weights(
        context.model,
        context.graph,
        plan,
        OnDevice(batches),
        process_sum=process_sum if context.accelerator.num_processes > 1 else None,
        **config.options(),
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
        batches = context.calibration_batches()
        recalibrate_after(pruned, context.model, context.graph, plan, batches)
    return pruned


def measure_of_plans(context: Context, names: Collection[str]) -> Callable[[PruningPlan], Any]:
    """From a plan to what of it is budgeted: seconds by tables of measured layers, and bytes.

    Args:
        context: Of the run.
        names: Of ``MEASURED`` budgets.
    """
    section, model, graph = context.recipe.evaluate, context.model.eval(), context.graph
    batch, length = section.latency_batch_size, section.latency_tokens
    conditions = f"{hardware()}; {torch.get_num_threads()} threads"
    inputs = timed_inputs(context.recipe, context.loaded)
    tables: dict[str, Callable[[PruningPlan], float]] = {}
    for name in sorted(names):
        if name == "serving_bytes":
            tables[name] = ServingMemory(model, graph, batch, length)
            continue
        run, given = model, inputs
        if name == "decode_s":
            run, given = Decoder(model, inputs["input_ids"]), (inputs["input_ids"][:, :1],)
        path = table_path(hardware())
        tables[name] = LatencyTable(run, graph, given, path=path, conditions=conditions)
    return lambda plan: {name: table(plan) for name, table in tables.items()}


def timed_inputs(recipe: Recipe, loaded: Loaded) -> Any:
    """Inputs of the size that is timed, on the device.

    Texts that are gone on with are at least one token shorter than what the model takes.
    """
    length = recipe.evaluate.latency_tokens
    most = getattr(loaded.processor, "max_positions", None)
    if most is not None and find_task(loaded.task).name == "text-generation":
        length = min(length, most - 1)
    return to_device(example_inputs(loaded, recipe.evaluate.latency_batch_size, num_tokens=length))


def check_measuring(context: Context) -> None:
    """Refuses what cannot be measured, before anything long begins."""
    if context.recipe.evaluate.harness and context.data is not None:
        check_harness()
    for metric in LIBRARIES.keys() & (context.recipe.evaluate.metrics or ()):
        library_of(metric)
    if context.data is not None and len(context.test):
        names, meters = _metrics(context)
        means = [name for name in names if not isinstance(meters.get(name), OfAll)]
        sample = context.test.__getitems__([0])
        evaluate(
            context.model, [sample], means, loss_fn=context.loss_fn(context.model), meters=meters
        )


def hardware() -> str:
    """What a time was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
