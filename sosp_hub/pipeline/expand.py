"""Expand-pruning: the layers that a cut spares are widened, and the wider model is cut back.

Three models go the same way (trained as long, scored, cut to the same size, fine-tuned): the base,
the base with its bottlenecks widened, and the base with all layers widened to as many parameters.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sosp_hub.checkpoint.io import save_pretrained
from sosp_hub.cost import cost
from sosp_hub.distributed import is_main, logger, wait_for_everyone
from sosp_hub.errors import BudgetError
from sosp_hub.pipeline.after_cut import all_stages, cell, final
from sosp_hub.pipeline.context import Context, open_context
from sosp_hub.pipeline.growth import (
    bottlenecks,
    factor_of_equal_size,
    global_ratio,
    ratios,
    widened,
)
from sosp_hub.pipeline.measuring import cut
from sosp_hub.pipeline.output_folder import alone, check_place, drafted
from sosp_hub.pipeline.planning import check, decide, score
from sosp_hub.pipeline.rebuilding import rebuilt
from sosp_hub.pipeline.result import costs, versions
from sosp_hub.pipeline.stage_cache import StageCache, make_folder
from sosp_hub.pipeline.training import measure_dense, train_dense
from sosp_hub.plan import GrowthPlan
from sosp_hub.recipe.load import dump_recipe
from sosp_hub.recipe.schema import BudgetSection, ExpandSection, Recipe
from sosp_hub.report.expansion import VARIANTS, brief, write_expansion
from sosp_hub.report.facts import overall_metrics, scrub
from sosp_hub.report.numbers import metric_value
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.widen import why_not, widen

MODEL = "model"


@alone
def expand(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    command: str = "",
    show: Callable[[Mapping[str, Any], Path], None] | None = brief,
) -> dict[str, Any]:
    """Runs every seed and variant that is not done; leaves table, plots and the expanded model.

    What is done is kept in ``OUTPUT.partial`` until the output is in place; a run that was stopped
    goes on from there.

    Args:
        recipe: With a section ``expand``.
        overwrite: Replace an output folder that holds a finished run.
        command: What the user typed, for the report.
        show: Prints results and folder; None = nothing is printed.

    Returns:
        What is in ``results.json``.

    Raises:
        SospHubError: Anything that the user has to change.
    """
    section = recipe.expand
    assert section is not None  # the command line has seen to it
    output = Path(str(recipe.output.dir)).expanduser()
    check_place(output, "results.json", overwrite)
    folder = output.with_name(f"{output.name}.partial")
    seeds = [_Seed(recipe, section, seed, folder) for seed in section.seeds]
    results_of_seeds = [seed.run() for seed in seeds]
    results: dict[str, Any] = {}
    if is_main():
        results = _results(recipe, section, results_of_seeds, command)
        with drafted(folder, output) as draft:
            write_expansion(results, draft, figures=recipe.output.figures)
            shutil.copytree(folder / MODEL, draft / MODEL)
        if show is not None:
            show(results, output)
    wait_for_everyone()
    return results


class _Seed:
    """All that is done with one seed."""

    def __init__(self, recipe: Recipe, section: ExpandSection, seed: int, folder: Path) -> None:
        self.section, self.folder = section, folder
        self.recipe = recipe.model_copy(update={"expand": None, "push": None, "seed": seed})
        self.seed = seed

    def run(self) -> dict[str, Any]:
        """The bottlenecks, and a row for each variant and budget."""
        base = open_context(self.recipe, self._cache("base", self.recipe))
        check(base)
        train_dense(base)
        dense = measure_dense(base)
        saliency = score(base)
        plan = decide(base, saliency)
        graph, groups = base.graph, base.groups
        obstacles = {name: why for name in groups if (why := why_not(graph, name))}
        for name, why in obstacles.items():
            logger.info("%s cannot be widened: %s", name, why)
        able = [name for name in groups if not _blocked(graph, name, obstacles)]
        narrow = [n for n in bottlenecks(groups, plan, self.section.threshold) if n in able]
        limit = self.section.threshold * global_ratio(groups, plan)
        if not narrow:
            least = min((ratios(groups, plan)[name] for name in able), default=None)
            raise BudgetError(
                f"expand.threshold: no layer that can be widened loses less than {limit:.1%} of "
                "its structures"
                + (f"; the least is {least:.1%}: raise it" if least is not None else "")
            )
        logger.info("bottlenecks of seed %d: %s", self.seed, ", ".join(narrow))
        growth = widened(graph, narrow, self.section.widen, saliency)
        factor = factor_of_equal_size(graph, growth, able, self.section.widen)
        plans = dict(
            zip(
                VARIANTS,
                (GrowthPlan({}), growth, widened(graph, able, factor, saliency)),
                strict=True,
            )
        )
        rows = [row for name, each in plans.items() for row in self._rows(base, name, each)]
        kept = plan.num_kept()
        return {
            "seed": self.seed,
            "dense": dense,
            "factor": factor,
            "limit": limit,
            "bottlenecks": narrow,
            "groups": [
                {"name": n, "kind": g.kind, "size": g.size, "kept": kept.get(n, g.size)}
                for n, g in groups.items()
            ],
            "rows": rows,
        }

    def _rows(self, base: Context, name: str, growth: GrowthPlan) -> Iterator[dict[str, Any]]:
        """One variant: widened, trained, scored, and cut at each budget."""
        section = self.section.train or self.recipe.model.train
        recipe = self.recipe.model_copy(
            update={"model": self.recipe.model.model_copy(update={"train": section})}
        )
        made = json.dumps([growth.copies, self.section.init], sort_keys=True)
        folder = f"{name}-{hashlib.sha256(made.encode()).hexdigest()[:16]}"
        device = base.accelerator.device
        wide = widen(base.model.cpu(), base.graph, growth, init=self.section.init, seed=self.seed)
        base.model.to(device)
        context = base.with_model(wide, recipe, self._cache(folder, recipe))
        check(context)
        train_dense(context)
        dense = measure_dense(context)
        keep = self.section.keep
        for label, budget in _budgets(self.recipe.budget, keep, base.graph, context.graph):
            mine = recipe.model_copy(update={"budget": budget})
            of_budget = context.turned_to(mine, self._cache(folder, mine))
            saved = name == VARIANTS[1] and (self.seed, label) == self._saved()
            row = cell(of_budget, lambda of_budget, saved=saved: self._row(of_budget, saved))
            for large in (rebuilt, final):  # numbers are in the row
                of_budget.cache.forget(large)
            metric = overall_metrics(row["metrics"])[0]
            last = list(row["metrics"].values())[-1][metric]["value"]
            shown = name, label, self.seed, metric, metric_value(metric, last)
            logger.info("%s, %s, seed %d: %s %s", *shown)
            metrics = {"dense": dense, **row["metrics"]}
            yield {"criterion": name, "budget": label, "seed": self.seed, **row, "metrics": metrics}

    def _row(self, context: Context, saved: bool) -> dict[str, Any]:
        """Everything that is measured at one budget; the first expanded model is kept."""
        plan = decide(context, score(context))
        pruned = cut(context, plan)
        metrics = all_stages(context, plan, pruned)
        if saved and is_main():
            make_folder(self.folder)
            loaded = context.loaded
            save_pretrained(
                pruned,
                self.folder / MODEL,
                base_model=loaded.base_model,
                base_revision=loaded.base_revision,
                tokenizer=loaded.tokenizer,
                processor=loaded.image_processor,
            )
        wait_for_everyone()
        return {
            "metrics": metrics,
            "cost": costs(context.graph, plan),
            "ratios": ratios(context.groups, plan),
        }

    def _cache(self, folder: str, recipe: Recipe) -> StageCache:
        return StageCache(self.folder / folder, recipe, shared=True)

    def _saved(self) -> tuple[int, str]:
        """Seed and budget of the model that is kept."""
        section, targets = self.section, self.recipe.budget.targets()
        share = next(iter(section.keep), None)
        return section.seeds[0], _label({next(iter(targets)): share} if share else targets)


def _blocked(graph: Graph, name: str, obstacles: dict[str, str]) -> bool:
    """Whether a group cannot be widened, or has to keep step with one that cannot."""
    tied = {other for tie in graph.ties if name in tie for other in tie}
    return not obstacles.keys().isdisjoint({name, *tied})


def _budgets(
    budget: BudgetSection, keep: Sequence[float], base: Graph, wide: Graph
) -> Iterator[tuple[str, BudgetSection]]:
    """Budgets of the wider model that leave as much as shares of the base would."""
    before, after = cost(base), cost(wide)
    targets = budget.targets()
    wanted = [{next(iter(targets)): share} for share in keep] or [targets]
    for shares in wanted:
        scaled = {}
        for key, share in shares.items():
            attribute = "bytes" if key == "memory_bytes" else key
            scaled[key] = min(1.0, share * getattr(before, attribute) / getattr(after, attribute))
        yield _label(shares), budget.model_copy(update=scaled)


def _label(shares: dict[str, float]) -> str:
    return " ".join(f"{key} {share:g}" for key, share in shares.items())


def _results(
    recipe: Recipe, section: ExpandSection, results_of_seeds: Sequence[dict[str, Any]], command: str
) -> dict[str, Any]:
    cells = [row for seed in results_of_seeds for row in seed.pop("rows")]
    return {
        "command": scrub(command),
        "recipe": scrub(dump_recipe(recipe, whole=False)),
        "model": recipe.model.id,
        "criterion": recipe.criterion.model_dump(mode="json"),
        "expand": section.model_dump(mode="json"),
        "criteria": [{"label": name, "name": name} for name in VARIANTS],
        "paper": _label(recipe.budget.targets()),
        "budgets": list(dict.fromkeys(row["budget"] for row in cells)),
        "seeds": list(section.seeds),
        "dense": {str(seed["seed"]): seed["dense"] for seed in results_of_seeds},
        "found": list(results_of_seeds),
        "cells": cells,
        "versions": versions(),
    }
