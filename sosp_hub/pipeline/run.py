"""A run from its recipe to its output folder: the stages in order."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sosp_hub.distributed import (
    from_main,
    is_main,
    logger,
    wait_for_everyone,
)
from sosp_hub.errors import HubError
from sosp_hub.pipeline.after_cut import follow_up
from sosp_hub.pipeline.context import Context, open_context
from sosp_hub.pipeline.curvature import calibration_of, stored_curvature
from sosp_hub.pipeline.forecast import too_large
from sosp_hub.pipeline.output_folder import alone, check_place
from sosp_hub.pipeline.planning import check, decide_and_cut, score
from sosp_hub.pipeline.promising import promised
from sosp_hub.pipeline.rebuilding import keep_inputs, rebuild_told
from sosp_hub.pipeline.result import check_push, publish, write_result
from sosp_hub.pipeline.rounds import in_rounds
from sosp_hub.pipeline.scores import Scores
from sosp_hub.pipeline.stage_cache import StageCache
from sosp_hub.pipeline.training import measure_dense, train_dense, train_masks
from sosp_hub.progress import clock, progress_bar
from sosp_hub.recipe.schema import Recipe
from sosp_hub.report.facts import overall_metrics
from sosp_hub.report.numbers import is_worse, metric_value, size
from sosp_hub.report.terminal import Report, show_result


@alone
def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    command: str = "",
    scores: Scores | None = None,
    with_data: bool = True,
    show: Callable[[Mapping[str, Any], Path], None] | None = show_result,
) -> Report:
    """Does everything a recipe says and leaves the result in its output folder.

    What a stage makes is kept in ``OUTPUT.partial`` until the output is in place; a run that was
    stopped goes on from there, and a changed recipe does again only what the change touches.

    Args:
        recipe: What to do.
        overwrite: Replace an output folder that holds a finished run.
        command: What the user typed, for the report.
        scores: Of an earlier run of the same recipe, used instead of scoring.
        with_data: Measure and train too; else the data is not opened and the model only cut.
        show: Prints report and folder, before the result is published; None = nothing is printed.

    Returns:
        The report.

    Raises:
        SospHubError: Anything that the user has to change.
    """
    start, output = time.monotonic(), Path(str(recipe.output.dir)).expanduser()
    check_place(output, "sosp_report.json", overwrite)
    if recipe.push:
        fault = from_main(check_push(recipe.push) if is_main() else None)
        if fault:
            raise HubError(fault)
    cache = StageCache(output.with_name(f"{output.name}.partial"), recipe)
    _introduce(recipe, output)
    _say_what_is_kept(cache)
    context = open_context(recipe, cache, scores, with_data=with_data)
    check(context)
    _warn_of_memory(context)
    train_dense(context)
    dense = measure_dense(context)
    if scores is not None:
        scores.check_dense(dense)
    control = train_masks(context)
    rounds = in_rounds(context)
    saliency = score(rounds.context)
    plan, pruned = decide_and_cut(rounds.context, saliency)
    measured, recovery = follow_up(rounds.context, plan, pruned)
    before = {"dense": dense, "control": control}
    metrics: dict[str, Any] = {k: v for k, v in before.items() if v} | measured
    metrics.setdefault("final", list(measured.values())[-1])
    _warn_of_recovery(measured)
    report: dict[str, Any] = {}
    if is_main():
        with progress_bar("measure speed, write"):
            report = write_result(
                recipe=recipe,
                loaded=context.loaded,
                pruned=pruned,
                graph=context.graph,
                plan=rounds.whole(plan),
                saliency={} if rounds.plans else saliency,  # of a model that was cut before
                metrics=metrics if with_data else {},
                rebuild=rebuild_told(rounds.context),
                rounds=rounds.record,
                recovery=recovery,
                promise=promised.made(context) or {},
                calibration=calibration_of(rounds.context),
                base=context.base,
                curvature=None if rounds.plans else stored_curvature(context),
                keep_inputs=partial(keep_inputs, rounds.context, context.model),
                keep_dense=context.made_dense and recipe.output.keep_dense,
                seconds=cache.seconds(),
                draft=cache.folder / "result" / output.name,
                output=output,
                command=command,
            )
        cache.remove()
        logger.info("done in %s", clock(time.monotonic() - start))
        if show is not None:
            show(report, output)
        if recipe.push:
            publish(output, recipe.push)
    wait_for_everyone()
    return Report(report)


def _introduce(recipe: Recipe, output: Path) -> None:
    """The first line: what is done to which model, and where it goes."""
    asked = [f"{name} {share}" for name, share in recipe.budget.targets().items()]
    asked += [f"{name} within {drop}" for name, drop in recipe.budget.max_drop.items()]
    asked += [f"groups {name} {share}" for name, share in recipe.budget.groups.items()]
    logger.info(
        "%s on %s: %s by %s, keep %s, to %s",
        recipe.model.id or recipe.model.path,
        recipe.data.path or recipe.data.id,
        recipe.model.task,
        recipe.criterion.name,
        ", ".join(asked) or "what the criterion decides",
        output,
    )


def _warn_of_recovery(metrics: Mapping[str, Any]) -> None:
    """Says where fine-tuning made a metric of the test split worse than it was before it."""
    if "final" not in metrics:
        return
    before = metrics[[name for name in metrics if name != "final"][-1]]
    for name in overall_metrics(metrics):
        if name in before and is_worse(name, metrics["final"][name], before[name]):
            logger.warning(
                "%s is worse after fine-tuning than before it: %s, %s before; try a lower "
                "finetune.learning_rate, more data (data.num_train), finetune.distill, or "
                "finetune: {epochs: 0}",
                name,
                metric_value(name, metrics["final"][name]["value"]),
                metric_value(name, before[name]["value"]),
            )


def _warn_of_memory(context: Context) -> None:
    """Says which stages need more memory than is free; a system may end a run without a word."""
    if context.data is None or not is_main():
        return
    stages = too_large(
        context.recipe,
        context.loaded,
        context.graph,
        num_train=len(context.train),
        num_test=len(context.test),
    )
    for stage in stages:
        if stage.name not in context.cache.kept:
            logger.warning(
                "%s will take about %s of memory, more than is free here%s",
                stage.name,
                size(stage.memory_bytes),
                f"; write {'; or '.join(stage.change)}" if stage.change else "",
            )


def _say_what_is_kept(cache: StageCache) -> None:
    if cache.changes:
        changes = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in cache.changes.items())
        logger.warning("%s was started with another recipe: %s", cache.folder, changes)
        logger.warning("repeated because of that: %s", ", ".join(cache.stale))
    if cache.kept:
        logger.info("resuming from %s, which holds: %s", cache.folder, ", ".join(cache.kept))
