"""Criteria against each other: every criterion, budget and seed on one model and one protocol.

A dense model is trained once for each seed, structures are scored once for each criterion and
seed, and cut at every budget. What is done is kept, cell by cell.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sosp_hub.distributed import is_main, logger, wait_for_everyone
from sosp_hub.pipeline import decide
from sosp_hub.pipeline.output_folder import check_place, put
from sosp_hub.pipeline.ranks import rank_correlations
from sosp_hub.pipeline.result import costs, latency_of, versions
from sosp_hub.pipeline.stage_cache import WorkFolder
from sosp_hub.pipeline.stages import Stages
from sosp_hub.recipe.load import dump_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.study_grid import Cell, cells_of
from sosp_hub.report.facts import scrub
from sosp_hub.report.numbers import metric_value
from sosp_hub.report.study import brief, write_comparison
from sosp_hub.structure.graph import Graph

_LATENCY_S = 0.5  # of measuring in each cell


def compare(recipe: Recipe, *, overwrite: bool = False, command: str = "") -> dict[str, Any]:
    """Runs every cell that is not done and leaves tables, plots and a page in the output folder.

    What a cell makes is kept in ``OUTPUT.partial`` until the output is in place; a comparison that
    was stopped, or whose recipe grew, goes on from there.

    Args:
        recipe: With a section ``compare``.
        overwrite: Replace an output folder that holds a finished comparison.
        command: What the user typed, for the report.

    Returns:
        What is in ``results.json``.

    Raises:
        SospHubError: Anything that the user has to change.
    """
    output = Path(str(recipe.output.dir)).expanduser()
    check_place(output, "results.json", overwrite)
    folder = output.with_name(f"{output.name}.partial")
    cells, _ = cells_of(recipe)
    done = sum(_work(folder, cell).read("cell") is not None for cell in cells)
    if done:
        logger.info("going on with what %s holds: %d of %d cells", folder, done, len(cells))
    for seed in dict.fromkeys(cell.seed for cell in cells):
        mine = [cell for cell in cells if cell.seed == seed]
        if any(_work(folder, cell).read("cell") is None for cell in mine):
            _run(mine, folder)
    results = _results(recipe, cells, folder, command)
    wait_for_everyone()
    if is_main():
        draft = folder / "result" / output.name
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_comparison(results, draft, figures=recipe.output.figures)
        put(draft, output)
        shutil.rmtree(folder, ignore_errors=True)
        brief(results, output)
    wait_for_everyone()
    return results


def _work(folder: Path, cell: Cell) -> WorkFolder:
    return WorkFolder(folder, cell.recipe, shared=True)


def _run(cells: Sequence[Cell], folder: Path) -> None:
    """All cells of one seed: checked, scored by every criterion, then cut one after the other."""
    base = Stages(cells[0].recipe, _work(folder, cells[0]))
    graph = base.trace()
    for cell in cells:
        decide.check(base.turned_to(cell.recipe, base.work), graph)
    base.train_dense()
    base.measure("dense_metrics", base.model)
    for cell in {cell.criterion: cell for cell in cells}.values():
        decide.score(base.turned_to(cell.recipe, _work(folder, cell)), graph)
    for cell in cells:
        work = _work(folder, cell)
        if work.read("cell") is None:
            stages = base.turned_to(cell.recipe, work)
            row = stages.stage("cell", lambda stages=stages: _row(stages, graph))
            work.forget("final")  # its numbers are in the row, and weights are large
            name = next(iter(row["metrics"]["cut"]))
            values = [metric_value(name, one[name]["value"]) for one in row["metrics"].values()]
            said = cell.criterion, cell.budget, cell.seed, name, ", ".join(values)
            logger.info("%s, %s, seed %d: %s %s", *said)


def _row(stages: Stages, graph: Graph) -> dict[str, Any]:
    """Everything that is measured in one cell."""
    plan, pruned = decide.plan_and_cut(stages, graph, decide.score(stages, graph))
    metrics, _ = stages.follow_up(pruned)
    recipe = stages.recipe
    groups = {name: group.size for name, group in stages.groups(graph).items()}
    return {
        "metrics": metrics,
        "cost": costs(graph, plan),
        "structures": {
            "before": sum(groups.values()),
            "after": sum((groups | plan.num_kept()).values()),
        },
        "floors": len(plan.provenance.get("floors") or ()),
        "latency": latency_of(recipe, stages.loaded, pruned, _LATENCY_S)
        if recipe.evaluate.latency
        else {},
    }


def _results(recipe: Recipe, cells: Sequence[Cell], folder: Path, command: str) -> dict[str, Any]:
    """The numbers of all cells, and what belongs to a criterion or to a seed."""
    rows, dense, scores, seen = [], {}, {}, set()
    for cell in cells:
        work = _work(folder, cell)
        dense.setdefault(str(cell.seed), _made(work, "dense_metrics"))
        rows.append(
            {
                "criterion": cell.criterion,
                "budget": cell.budget,
                "seed": cell.seed,
                **_made(work, "cell"),
                "scoring": _scoring(work, cell.recipe),
            }
        )
        key = (cell.recipe.structure.kinds, cell.seed)
        saliency = scores.setdefault(key, {})
        place = work.tensors("saliency")
        if (cell.seed, place) not in seen:
            seen.add((cell.seed, place))
            saliency[cell.criterion] = load_file(place)
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


def _scoring(work: WorkFolder, recipe: Recipe) -> dict[str, Any]:
    """Seconds and peak of memory until there was a plan, whoever else used the same scores."""
    criterion = recipe.criterion
    names = ["saliency"]
    names += ["curvature"] * (criterion.uses_curvature or criterion.compensates())
    names += ["plan"] * (criterion.compensate_steps > 0)
    records = [record for name in names if (record := work.read(name)) is not None]
    peaks = [record["peak_bytes"] for record in records if record["peak_bytes"] is not None]
    seconds = sum(record["seconds"] for record in records)
    return {"seconds": seconds, "peak_bytes": max(peaks, default=None)}


def _made(work: WorkFolder, stage: str) -> dict[str, Any]:
    record = work.read(stage)
    assert record is not None
    return record["made"]
