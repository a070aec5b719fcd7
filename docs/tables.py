"""Writes the tables of the pages from what the package declares."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from address import address
from notebooks import description, scripts

from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.describe import describe_recipe, list_sections
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.shipped import shipped_recipes
from sosp_hub.recipe.targets import TARGETS
from sosp_hub.recipe.tasks import find_task
from sosp_hub.recipe.tasks import tasks as known_tasks
from sosp_hub.report.facts import collect, overall_metrics, with_spread
from sosp_hub.report.numbers import share
from sosp_hub.report.schema import read_report

CARDS = Path(__file__).parents[1] / "model_cards"


def criteria() -> str:
    """A row for each criterion."""
    rows = ["| criterion | what it is | needs | paper |", "| --- | --- | --- | --- |"]
    for name, criterion in CRITERIA.known().items():
        what = criterion.summary().replace("``", "`").replace("|", r"\|")
        rows.append(f"| `{name}` | {what} | {criterion.needs} | {criterion.paper} |")
    return "\n".join(rows)


def tasks() -> str:
    """A row for each task."""
    rows = ["| task | what it is | columns | metrics |", "| --- | --- | --- | --- |"]
    for name, task in known_tasks().items():
        what = (task.__doc__ or "").strip().partition("\n")[0].replace("``", "`").rstrip(".")
        columns = (
            ", ".join(f"`data.{key}`" for key in task.columns) or "`data.text` or `data.image`"
        )
        metrics = ", ".join(f"`{metric}`" for metric in task.metrics)
        also = f" ({', '.join(task.aliases)})" if task.aliases else ""
        rows.append(f"| `{name}`{also} | {what} | {columns} | {metrics} |")
    return "\n".join(rows)


def keys() -> str:
    """Each section with its keys."""
    sections = [
        f"## {name}\n\n```text\n{describe_recipe(name)}\n```" for name in Recipe.model_fields
    ]
    return "\n\n".join([f"```text\n{list_sections()}\n```", *sections])


def gallery() -> str:
    """A section for each card of a run that was measured, by task."""
    reports = {
        path.parent.name: read_report(path.parent) or {}
        for path in sorted(CARDS.glob("*/sosp_report.json"))
    }
    rows = ["| run | task | parameters kept | metric | dense | pruned |", "| --- " * 6 + "|"]
    sections = []
    for name, report in reports.items():
        recipe = yaml.safe_load(report["recipe"])
        facts, metrics = collect(report), report["metrics"]
        before, after = report["cost"]["before"], report["cost"]["after"]
        metric = overall_metrics(metrics)[0]
        dense, final = (with_spread(metric, metrics[stage][metric]) for stage in ("dense", "final"))
        kept = share(after["params"] / before["params"], 0)
        task = find_task(recipe["model"]["task"]).name
        row = [f"[{name}](#{name.replace('_', '-')})", task, kept, metric]
        rows.append(f"| {' | '.join([*row, dense, final])} |")
        sections.append(
            f"## {name}\n\n{facts.headline}\n\n{facts.costs.markdown()}\n\n"
            f"{facts.metrics.markdown()}"
            f"\n\n![{name}: metrics before the cut, after it, and after recovery]"
            f"(../model_cards/{name}/figures/recovery.png)\n\nStart from it: "
            f"`sosp recipes copy {_recipe_of(report)}`, then change `model.id` and `data`. "
            f"The whole card is `model_cards/{name}/README.md`."
        )
    return "\n\n".join(["\n".join(rows), *sections])


def _recipe_of(report: Mapping[str, Any]) -> str:
    """The shipped recipe that a report names in its command."""
    words = [Path(word).stem for word in str(report["command"]).split()]
    return next(word for word in words if word in shipped_recipes())


def recipes() -> str:
    """A row for each shipped recipe of one run, by task."""
    rows = ["| task | recipe | model | data |", "| --- | --- | --- | --- |"]
    for name, path in shipped_recipes().items():
        recipe = yaml.safe_load(path.read_text("utf-8"))
        if "/" in name or "compare" in recipe or "expand" in recipe:
            continue
        model, data = recipe["model"], recipe["data"]
        task = find_task(model.get("task", "self")).name
        row = (task, f"`{name}`", model["id"], data.get("id") or data["path"])
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join([*rows[:2], *sorted(rows[2:])])


def targets() -> str:
    """A row for each form in which other software reads a pruned model."""
    rows = ["| `--to` | what it writes |", "| --- | --- |"]
    for name, target in TARGETS.known().items():
        rows.append(
            f"| [`{name}`](#to-{name.replace('_', '-')}) | {target.summary().replace('``', '`')} |"
        )
    return "\n".join(rows)


def examples() -> str:
    """A section for each script, with its notebook."""
    at, sections = address(), []
    for script in scripts():
        title, _, words = description(script.read_text("utf-8")).partition("\n")
        files = [
            f"[script](../examples/{script.name})",
            f"[notebook](../examples/{script.stem}.ipynb)",
        ]
        if at:
            files.append(at.badge(f"examples/{script.stem}.ipynb"))
        sections.append(f"## {title}\n{words}\n\n{' · '.join(files)}")
    return "\n\n".join(sections)


def write_all(folder: Path) -> None:
    """Writes each table as NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in (criteria, examples, gallery, keys, recipes, targets, tasks):
        (folder / f"{table.__name__}.md").write_text(table() + "\n", encoding="utf-8")
