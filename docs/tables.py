"""Writes the tables of the pages from what the package declares."""

from pathlib import Path

from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.describe import describe_recipe, list_sections
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.tasks import tasks as known_tasks


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


def write_all(folder: Path) -> None:
    """Writes each table as NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in (criteria, keys, tasks):
        (folder / f"{table.__name__}.md").write_text(table() + "\n", encoding="utf-8")
