"""A recipe from a few options of the command line, for a model that has none."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sosp_hub.atomic import write_text
from sosp_hub.errors import RecipeError
from sosp_hub.recipe.load import dump_recipe, parse_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.tasks import known_task, tasks
from sosp_hub.types import TABLE_SUFFIXES, Library


def quick_recipe(
    model: str,
    *,
    library: Library,
    task: str | None,
    data: str | None,
    budget: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> Recipe:
    """A recipe of defaults; a new head is trained first, and what is cut is fine-tuned briefly.

    Args:
        model: Hub id, timm name or local folder.
        library: That builds it.
        task: The hub's pipeline tag.
        data: Local file or folder, or hub id.
        budget: Keys of the section ``budget``.
        overrides: ``key.path=value`` each.

    Raises:
        RecipeError: What is missing or not valid, all faults at once.
    """
    missing = [
        f"--{option} is missing; write {what}"
        for option, given, what in (
            ("task", task, f"one of {', '.join(tasks())}"),
            ("data", data, "a local file or folder, or a hub id"),
        )
        if given is None
    ]
    if task is None or data is None:
        raise RecipeError("the command line", missing)
    record: dict[str, Any] = {
        "model": {
            **{"library": library, "id": model, "task": task},
            **({"train": _TRAIN} if _learns(task) else {}),
        },
        "data": {"path" if Path(data).exists() or _is_file_name(data) else "id": data},
        "budget": dict(budget),
        "finetune": {"epochs": 3, "batch_size": _STEP},
    }
    if batch_size := _batch_size(task):
        record |= {"criterion": {"batch_size": batch_size}, "evaluate": {"batch_size": batch_size}}
        more = {"batch_size": batch_size, "gradient_accumulation": _STEP // batch_size}
        record["finetune"] |= more
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip("-.") or "model"
    source = "the command line"
    return parse_recipe(
        yaml.safe_dump(record), source, overrides, output_dir=(Path("runs") / name).as_posix()
    )


_STEP = 16
"""Samples of a step of training; few, as people first try a few samples."""

_TRAIN = {"epochs": 5, "batch_size": _STEP, "when": "new_head"}


def _batch_size(task: str) -> int | None:
    known = known_task(task)
    return None if known is None else known.batch_size


def _learns(task: str) -> bool:
    """Whether a dense model can be trained for a task; what is no task is told by the recipe."""
    known = known_task(task)
    return known is None or known.learns


def _is_file_name(name: str) -> bool:
    """Whether a name can only be meant as a local file or folder, which may be misspelled."""
    return name.startswith(("/", ".", "~")) or Path(name).suffix in TABLE_SUFFIXES


def place_of_recipe(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Where a run without a recipe leaves one: beside its output folder.

    Raises:
        RecipeError: Another recipe is there.
    """
    output = Path(recipe.output.dir or "")
    path = output.with_name(f"{output.name}.yaml")
    text = dump_recipe(recipe, whole=False)
    if path.exists() and path.read_text(errors="replace") != text and not overwrite:
        fault = "holds another recipe; give output.dir=FOLDER, or --overwrite to replace it"
        raise RecipeError(str(path), [fault])
    return path


def write_recipe(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Writes it there, to be read, changed and run again.

    Returns:
        The file.

    Raises:
        RecipeError: Another recipe is there.
    """
    path = place_of_recipe(recipe, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump_recipe(recipe, whole=False))
    return path
