"""Steps that follow a cut: metrics, rebuild, norms, fine-tuning, a row of a table."""

import dataclasses
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from sosp_hub.distributed import logger
from sosp_hub.evaluate import evaluate
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.measuring import measured
from sosp_hub.pipeline.planning import plan
from sosp_hub.pipeline.promising import as_record, keeps, tested
from sosp_hub.pipeline.rebuilding import rebuild, rebuilt
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.teaching import teacher_of
from sosp_hub.plan import PruningPlan
from sosp_hub.reconstruction.norms import has_norms, recalibrate_after
from sosp_hub.recovery.best import held_out_loader, hold_out
from sosp_hub.recovery.recover import recover
from sosp_hub.report.facts import scrub


@step("cut_metrics", plan, "evaluate")
def cut_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics right after the cut."""
    return measured(context, pruned, "cut")


@step("rebuilt_metrics", rebuilt, "evaluate")
def rebuilt_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics once the weights that read what was cut were solved again."""
    return measured(context, pruned, "rebuilt")


@step("recalibrated_metrics", rebuilt, "finetune", "evaluate")
def recalibrated_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics with norms re-estimated."""
    return measured(context, pruned, "recalibrated")


@step("final", rebuilt, "finetune")
def final(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Fine-tunes the cut model: the loss curve and the state that was kept."""
    config = context.recipe.at_rate(context.recipe.finetune)
    promised = bool(context.recipe.budget.max_drop)
    cut = {n: tensor.clone() for n, tensor in pruned.state_dict().items()} if promised else {}
    with teacher_of(context) as teacher:
        recovery = recover(
            pruned,
            context.train,
            config,
            augmented=context.augmented if config.augment else None,
            loss_fn=context.loss_fn(pruned),
            teacher=teacher,
            checkpoint_dir=context.cache.training_state(final),
            accelerator=context.accelerator,
            seed=context.recipe.seed,
            num_workers=context.recipe.data.num_workers,
        )
    told = dataclasses.asdict(recovery)
    if config.follows():
        other = config.teacher.id if config.teacher else None
        told["teacher"] = {"id": other and scrub(other), "distill": config.distill}
        told["teacher"] |= {"hidden": config.hidden, "relations": config.relations}
        told["teacher"] |= {"top_k": config.top_k}
    if promised:
        lost = tested(context, pruned)
        told["promise"] = {"lost": as_record(lost), "undone": not keeps(lost)}
        if not keeps(lost):
            logger.warning(
                "fine-tune: the trained model loses more than budget.max_drop allows, so the model "
                "before it is kept; lower finetune.learning_rate or train on more samples"
            )
            pruned.load_state_dict(cut)
    context.cache.save(lambda: save_model(pruned, str(final.tensors(context))))
    return told


@step("final_metrics", final, "evaluate")
def final_metrics(context: Context, pruned: nn.Module) -> dict[str, Any]:
    """Metrics at the end."""
    return measured(context, pruned, "final")


@step("cell", final_metrics)
def cell(context: Context, row: Callable[[Context], dict[str, Any]]) -> dict[str, Any]:
    """A row of a comparison, made of all the others."""
    return row(context)


def follow_up(
    context: Context, decided: PruningPlan, pruned: nn.Module
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What follows a cut: metrics, rebuild, norms, fine-tuning; what is told of the last.

    Metrics of ``cut``, ``rebuilt`` where weights were solved again, ``recalibrated`` where norms
    were re-estimated and that was no loss, and ``final`` where there was fine-tuning. Without data
    nothing is measured or trained, and solved or re-estimated only with the inputs that an earlier
    run kept.
    """
    if context.data is None:
        if rebuild(context, decided, pruned) and context.recipe.recalibrates():
            inputs = context.inputs(context.recipe.criterion.num_samples)
            recalibrate_after(pruned, context.model, context.graph, decided, inputs)
        return {"cut": {}}, {}
    metrics = {"cut": cut_metrics(context, pruned)}
    if rebuild(context, decided, pruned):
        metrics["rebuilt"] = rebuilt_metrics(context, pruned)
    if context.recipe.recalibrates() and has_norms(pruned):
        with context.cache.timed("recalibration", "re-estimate norms"):
            better = _renormed(context, decided, pruned)
        if better:
            metrics["recalibrated"] = recalibrated_metrics(context, pruned)
    if not context.recipe.finetune.epochs:
        return metrics, {}
    recovery = final(context, pruned)
    load_model(pruned, final.tensors(context))  # read on the CPU, copied to where the model is
    metrics["final"] = final_metrics(context, pruned)
    return metrics, recovery


def all_stages(context: Context, decided: PruningPlan, pruned: nn.Module) -> dict[str, Any]:
    """The metrics of `follow_up` for a table: where norms stay, that stage is the one before it."""
    metrics, _ = follow_up(context, decided, pruned)
    if context.recipe.recalibrates() and has_norms(pruned):
        trained = {key: metrics.pop(key) for key in ("final",) if key in metrics}
        metrics.setdefault("recalibrated", metrics.get("rebuilt", metrics["cut"]))
        metrics |= trained
    return metrics


def _renormed(context: Context, decided: PruningPlan, pruned: nn.Module) -> bool:
    """Re-estimates norms in place, unless the loss on held-out samples of the train split rises.

    Of a promise the plan was tried with them, and so it is made. No test data is seen.
    """
    config = context.recipe.finetune
    before = {name: value.clone() for name, value in pruned.named_buffers()}
    batches = context.calibration_batches()

    def estimate() -> bool:
        return recalibrate_after(pruned, context.model, context.graph, decided, batches) > 0

    if not config.held_out or context.recipe.budget.max_drop:
        return estimate()
    part, _ = hold_out(
        context.train,
        context.train,
        config.held_out,
        context.recipe.seed,
        most=config.most_held_out,
        key="finetune.held_out",
    )
    loader = held_out_loader(
        part, config.batch_size, context.accelerator, context.recipe.data.num_workers
    )

    def loss() -> float:
        return evaluate(pruned, loader, ("loss",), loss_fn=context.loss_fn(pruned))["loss"].value

    as_they_were = loss()
    if not estimate():
        return False
    if (estimated := loss()) <= as_they_were:
        return True
    logger.info(
        "norms: their statistics stay as they were: re-estimated, the loss on %d held-out samples "
        "is %.4g, without %.4g",
        len(part),
        estimated,
        as_they_were,
    )
    for name, value in pruned.named_buffers():
        value.copy_(before[name])
    return False
