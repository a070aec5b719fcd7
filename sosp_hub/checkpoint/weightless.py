"""The weightless form: a plan of a few kilobytes in place of weights."""

import json
from pathlib import Path

from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.folder import replaced_folder
from sosp_hub.errors import CheckpointError, PlanError
from sosp_hub.plan import PruningPlan

PLAN = "sosp_plan.json"


def save_plan(plan: PruningPlan, folder: str | Path) -> Path:
    """Writes a plan as a checkpoint of its own: `from_pretrained` cuts the base model by it.

    Args:
        plan: Names its base, by hub id or local folder.
        folder: Where to. Weights of an older save are removed.

    Returns:
        The folder.

    Raises:
        CheckpointError: No plan, or one that does not say what it was made for.
        OutputError: The folder cannot be written.

    Example:
        >>> import sosp_hub, tempfile
        >>> plan = sosp_hub.PruningPlan(
        ...     kept={"0:neuron": (0, 3)}, sizes={"0:neuron": 4}, base_model="me/dense"
        ... )
        >>> [path.name for path in sosp_hub.save_plan(plan, tempfile.mkdtemp()).iterdir()]
        ['sosp_plan.json']
    """
    if not isinstance(plan, PruningPlan) or not isinstance(folder, str | Path):
        raise CheckpointError(
            f"save_plan got a {type(plan).__name__} and a {type(folder).__name__}; expected "
            "save_plan(plan, folder), with what allocate(...) returns as the plan"
        )
    if not plan.base_model:
        raise CheckpointError(
            "the plan names no base model: dataclasses.replace(plan, base_model=HUB_ID, "
            "base_revision=COMMIT)"
        )
    with replaced_folder(Path(folder)) as fresh:
        (fresh / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
    return Path(folder)


def read_plan(path: str | Path) -> PruningPlan:
    """The plan of a file or of a folder that holds one.

    Raises:
        CheckpointError: No plan there, or one that is damaged.
    """
    path = Path(path)
    path = path / PLAN if headers.is_folder(path) else path
    record = headers.read_json(path)
    try:
        return PruningPlan.from_json(json.dumps(record))
    except (PlanError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def holds_only_a_plan(folder: Path) -> bool:
    """Whether a folder is a checkpoint without weights."""
    with headers.reading(folder):
        return (folder / PLAN).is_file() and not (folder / headers.CONFIG).is_file()
