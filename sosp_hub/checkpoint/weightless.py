"""The weightless form: a plan of a few kilobytes that cuts its base model again."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.folder import replaced_folder
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.io import PLAN, from_pretrained
from sosp_hub.errors import CheckpointError, PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply


def save_plan(plan: PruningPlan, folder: str | Path) -> Path:
    """Writes a plan as a checkpoint of its own: `from_pretrained` cuts the base model by it.

    Args:
        plan: Names its base, by hub id or local folder.
        folder: Where to. Weights of an older save are removed.

    Returns:
        The folder.

    Raises:
        CheckpointError: A plan that does not say what it was made for.
    """
    if not plan.base_model:
        raise CheckpointError(
            "the plan names no base model: dataclasses.replace(plan, base_model=HUB_ID, "
            "base_revision=COMMIT)"
        )
    with replaced_folder(Path(folder)) as fresh:
        (fresh / PLAN).write_text(plan.to_json() + "\n")
    return Path(folder)


def read_plan(path: str | Path) -> PruningPlan:
    """The plan of a file or of a folder that holds one.

    Raises:
        CheckpointError: No plan there, or one that is damaged.
    """
    path = Path(path)
    path = path / PLAN if path.is_dir() else path
    record = headers.read_json(path)
    try:
        return PruningPlan.from_json(json.dumps(record))
    except (PlanError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def apply_plan_file(
    path: str | Path, base: "nn.Module | str | Path | None" = None, **kwargs: Any
) -> nn.Module:
    """Cuts a base model by a plan that was published alone.

    Args:
        path: The plan, or the folder that holds it.
        base: The base model or its folder; None takes the id and revision that the plan names.
        **kwargs: For `from_pretrained` of the base.

    Returns:
        The pruned model, verified against the masked one, without any fine-tuning.

    Raises:
        CheckpointError: No usable plan, or a base whose inputs cannot be made up.
        PlanError: The plan was made for another model.
        HubError: The base cannot be fetched.
    """
    plan = read_plan(path)
    if not isinstance(base, nn.Module):
        base = _load_base(plan, base, kwargs)
    inputs = made_up_inputs(base)
    if inputs is None:
        raise CheckpointError(
            f"{type(base).__name__}: its config does not tell how its inputs look; trace it with "
            f"inputs of your own and use sosp_hub.apply(model, graph, plan)"
        )
    if isinstance(inputs, dict) and hasattr(getattr(base, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return apply(base, trace(base, inputs), plan).eval()


def _load_base(plan: PruningPlan, base: "str | Path | None", kwargs: dict[str, Any]) -> nn.Module:
    if base is None and plan.base_model is None:
        raise CheckpointError("the plan names no base model: pass base=FOLDER")
    if base is None and plan.base_revision and not Path(str(plan.base_model)).is_dir():
        kwargs = {"revision": plan.base_revision, **kwargs}
    return from_pretrained(base or str(plan.base_model), **kwargs)
