"""Loads what a recipe names: any timm or transformers model, and what is known of its origin."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sosp_hub.data.reach import nearest_existing
from sosp_hub.data.source import DataInfo
from sosp_hub.errors import ModelError
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.recipe.tasks import find_task, tasks
from sosp_hub.zoo.loaded import Loaded

__all__ = ["Loaded", "example_inputs", "load_model"]

_EXAMPLE_TOKENS = 16


def load_model(
    section: ModelSection, *, data: DataInfo | None = None, weights: bool = True
) -> Loaded:
    """The model of a recipe, with a head that fits the data.

    Args:
        section: Which.
        data: What the head has to fit, where known.
        weights: Load them; without, the model has its config's shapes and no data, and texts have
            no tokenizer.

    Raises:
        ModelError: An unknown name, a folder that holds no such model, a task it cannot do.
        DataError: A head that does not fit the labels.
        HubError: The hub cannot be reached.
    """
    if section.path is not None:
        return _local_copy(section, section.path, data, weights=weights)
    for key in ("num_classes", "num_labels"):
        if key in section.kwargs:
            raise ModelError(f"model.kwargs: write model.num_labels instead of {key!r} here")
    if section.library == "timm":
        if not find_task(section.task).by_timm:
            able = ", ".join(name for name, task in tasks().items() if task.by_timm)
            raise ModelError(
                f"model.task: timm models do {able}, not {section.task}; write one of these, or "
                "model.library: transformers"
            )
        from sosp_hub.zoo.timm import load_timm

        return load_timm(section, data, weights=weights)
    from sosp_hub.zoo.transformers import load_transformers

    return load_transformers(section, data, weights=weights)


def _local_copy(
    section: ModelSection, path: str, data: DataInfo | None, *, weights: bool
) -> Loaded:
    """The model in a folder, under the name that the recipe gives it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"model.path: {folder}: no such folder; the nearest that there is: "
            f"{nearest_existing(folder)}"
        )
    unnamed = {"id": str(folder), "path": None, "revision": None}
    loaded = load_model(section.model_copy(update=unnamed), data=data, weights=weights)
    if "/" not in section.id:  # a name of timm's, which is no hub id
        return loaded
    if loaded.base_model not in (None, section.id):
        raise ModelError(
            f"model.path: {folder} is what the hub's cache holds of {loaded.base_model}, not of "
            f"{section.id}; write model.id: {loaded.base_model}"
        )
    revision = section.revision or loaded.base_revision
    return replace(loaded, base_model=section.id, base_revision=revision)


def example_inputs(
    loaded: Loaded, batch_size: int = 2, *, num_tokens: int = _EXAMPLE_TOKENS
) -> tuple[Tensor, ...] | dict[str, Any]:
    """Inputs for a trace or a timing: a tuple for timm, a dict for transformers.

    The same values each time. A causal language model is told ``use_cache=False``.

    Args:
        loaded: What to make inputs for.
        batch_size: Samples.
        num_tokens: Length of each text, where the model takes texts and that many tokens.
    """
    return find_task(loaded.task).example_inputs(loaded, batch_size, num_tokens)
