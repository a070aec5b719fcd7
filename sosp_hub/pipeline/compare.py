"""Criteria against each other: every criterion, budget and seed on one model and one protocol.

A dense model is trained once for each seed, structures are scored once for each criterion and
seed, and cut at every budget. What is done is kept, cell by cell.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sosp_hub.distributed import is_main, logger, wait_for_everyone
from sosp_hub.pipeline.after_cut import all_stages, final
from sosp_hub.pipeline.after_cut import cell as cell_step
from sosp_hub.pipeline.context import Context, open_context
from sosp_hub.pipeline.curvature import curvature
from sosp_hub.pipeline.output_folder import alone, check_place, drafted
from sosp_hub.pipeline.planning import check, decide_and_cut, plan, saliency, score
from sosp_hub.pipeline.ranks import rank_correlations
from sosp_hub.pipeline.rebuilding import rebuilt
from sosp_hub.pipeline.result import costs, latency_of, versions
from sosp_hub.pipeline.stage_cache import StageCache, Step
from sosp_hub.pipeline.training import dense_metrics, measure_dense, train_dense
from sosp_hub.recipe.load import dump_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.study_grid import Cell, cells_of
from sosp_hub.report.facts import scrub
from sosp_hub.report.numbers import metric_value
from sosp_hub.report.study import brief, write_comparison

_LATENCY_S = 0.5  # of measuring in each cell


@alone
def compare(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    command: str = "",
    show: Callable[[Mapping[str, Any], Path], None] | None = brief,
) -> dict[str, Any]:
    """Runs every cell that is not done and leaves tables, plots and a page in the output folder.

    What a cell makes is kept in ``OUTPUT.partial`` until the output is in place; a comparison that
    was stopped, or whose recipe grew, goes on from there.

    Args:
        recipe: With a section ``compare``.
        overwrite: Replace an output folder that holds a finished comparison.
        command: What the user typed, for the report.
        show: Prints results and folder; None = nothing is printed.

    Returns:
        What is in ``results.json``.

    Raises:
        SospHubError: Anything that the user has to change.
    """
    output = Path(str(recipe.output.dir)).expanduser()
    check_place(output, "results.json", overwrite)
    folder = output.with_name(f"{output.name}.partial")
    cells, _ = cells_of(recipe)
    done = sum(_cache(folder, cell).read(cell_step) is not None for cell in cells)
    if done:
        logger.info("resuming from %s: %d of %d cells are done", folder, done, len(cells))
    for seed in dict.fromkeys(cell.seed for cell in cells):
        mine = [cell for cell in cells if cell.seed == seed]
        if any(_cache(folder, cell).read(cell_step) is None for cell in mine):
            _run(mine, folder)
    results = _results(recipe, cells, folder, command)
    wait_for_everyone()
    if is_main():
        with drafted(folder, output) as draft:
            write_comparison(results, draft, figures=recipe.output.figures)
        if show is not None:
            show(results, output)
    wait_for_everyone()
    return results


def _cache(folder: Path, cell: Cell) -> StageCache:
    return StageCache(folder, cell.recipe, shared=True)


def _run(cells: Sequence[Cell], folder: Path) -> None:
    """All cells of one seed: checked, scored by every criterion, then cut one after the other."""
    base = open_context(cells[0].recipe, _cache(folder, cells[0]))
    for cell in cells:
        check(base.turned_to(cell.recipe, base.cache))
    train_dense(base)
    measure_dense(base)
    for cell in {cell.criterion: cell for cell in cells}.values():
        score(base.turned_to(cell.recipe, _cache(folder, cell)))
    for cell in cells:
        context = base.turned_to(cell.recipe, _cache(folder, cell))
        if cell_step.made(context) is None:
            row = cell_step(context, _row)
            for large in (rebuilt, final):  # numbers are in the row, and weights are large
                context.cache.forget(large)
            name = next(iter(row["metrics"]["cut"]))
            values = [metric_value(name, one[name]["value"]) for one in row["metrics"].values()]
            shown = cell.criterion, cell.budget, cell.seed, name, ", ".join(values)
            logger.info("%s, %s, seed %d: %s %s", *shown)


def _row(context: Context) -> dict[str, Any]:
    """Everything that is measured in one cell."""
    decided, pruned = decide_and_cut(context, score(context))
    metrics, groups = all_stages(context, decided, pruned), context.groups
    sizes = {name: group.size for name, group in groups.items()}
    return {
        "metrics": metrics,
        "cost": costs(context.graph, decided),
        "structures": {
            "before": sum(sizes.values()),
            "after": sum((sizes | decided.num_kept()).values()),
        },
        "floors": len(decided.provenance.get("floors") or ()),
        "latency": latency_of(context.recipe, context.loaded, pruned, _LATENCY_S)
        if context.recipe.evaluate.latency
        else {},
    }


def _results(recipe: Recipe, cells: Sequence[Cell], folder: Path, command: str) -> dict[str, Any]:
    """The numbers of all cells, and what belongs to a criterion or to a seed."""
    rows, dense, scores, seen = [], {}, {}, set()
    for cell in cells:
        cache = _cache(folder, cell)
        dense.setdefault(str(cell.seed), _made(cache, dense_metrics))
        rows.append(
            {
                "criterion": cell.criterion,
                "budget": cell.budget,
                "seed": cell.seed,
                **_made(cache, cell_step),
                "scoring": _scoring(cache, cell.recipe),
            }
        )
        key = (cell.recipe.structure.kinds, cell.seed)
        by_criterion = scores.setdefault(key, {})
        file = cache.tensors(saliency)
        if (cell.seed, file) not in seen:
            seen.add((cell.seed, file))
            by_criterion[cell.criterion] = load_file(file)
    return {
        "command": scrub(command),
        "recipe": scrub(dump_recipe(recipe, whole=False)),
        "model": recipe.model.id,
        "criteria": [
            {
                "label": cell.criterion,
                "kinds": list(cell.recipe.structure.kinds),
                **cell.recipe.criterion.model_dump(mode="json"),
                "compensate": cell.recipe.criterion.compensates(),
            }
            for cell in {cell.criterion: cell for cell in cells}.values()
        ],
        "budgets": list(dict.fromkeys(cell.budget for cell in cells)),
        "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
        "dense": dense,
        "cells": rows,
        "rank_correlations": rank_correlations(scores),
        "versions": versions(),
    }


def _scoring(cache: StageCache, recipe: Recipe) -> dict[str, Any]:
    """Seconds and peak of memory until there was a plan, whoever else used the same scores."""
    criterion = recipe.criterion
    steps: list[Step[Any, ...]] = [saliency]
    steps += [curvature] * (criterion.uses_curvature or criterion.compensates())
    steps += [plan] * (criterion.compensate_steps > 0)
    records = [record for step in steps if (record := cache.read(step)) is not None]
    peaks = [record["peak_bytes"] for record in records if record["peak_bytes"] is not None]
    seconds = sum(record["seconds"] for record in records)
    return {"seconds": seconds, "peak_bytes": max(peaks, default=None)}


def _made(cache: StageCache, step: Step[Any, ...]) -> dict[str, Any]:
    record = cache.read(step)
    assert record is not None
    return record["made"]
