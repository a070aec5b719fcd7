"""Loads a transformers model, and takes no tensor that the files do not hold."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.compat.torch import child_table
from sosp_hub.errors import CheckpointError

_SHOWN = 4


def read(
    folder: Path, config: Mapping[str, Any], named: Any | None, kwargs: dict[str, Any]
) -> nn.Module:
    """The model of a folder, in eval mode.

    Args:
        folder: Holds the config and the weights.
        config: What ``config.json`` says.
        named: The class that it names, if transformers has it.
        kwargs: For transformers; ``model_class`` is the class to load into.

    Raises:
        CheckpointError: Tensors are missing, left over, or of another shape.
    """
    asked = kwargs.pop("model_class", None)
    cls = asked or named
    if cls is None:
        if not kwargs.get("trust_remote_code"):
            raise CheckpointError(
                f"config.json: architectures: {ascii(config.get('architectures'))[:80]} is no "
                f"model class of transformers {transformers.__version__}; pass model_class=, or "
                "trust_remote_code=True where the folder ships code that you trust"
            )
        cls = _auto_class(config)
    with adapter.checked():
        model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    _check_all_read(model, info, config, folder, is_asked=asked is not None)
    return model


def _auto_class(config: Mapping[str, Any]) -> Any:
    """The Auto class that the config maps to the class it names."""
    named, mapped = config.get("architectures"), config.get("auto_map")
    for auto, reference in mapped.items() if isinstance(mapped, Mapping) else ():
        wanted = named[0] if isinstance(named, list) and named else None
        cls = getattr(transformers, auto, None) if isinstance(auto, str) else None
        is_model = isinstance(cls, type) and auto.startswith("AutoModel")
        if is_model and str(reference).rpartition(".")[2] == wanted:
            return cls
    return transformers.AutoModel


def _check_all_read(
    model: Any, info: Mapping[str, Any], config: Mapping[str, Any], folder: Path, *, is_asked: bool
) -> None:
    """Refuses tensors that were made up, and tensors of the files that were left out.

    Only the caller's own ``model_class`` may have a head that the files do not hold, and lack
    parts that they do.
    """
    named = config.get("architectures")
    is_other = is_asked and type(model).__name__ not in (named if isinstance(named, list) else [])
    faults = {
        "missing": [
            name for name in _names(info, "missing") if not (is_other and _is_of_head(model, name))
        ],
        "unexpected": [
            name
            for name in _names(info, "unexpected")
            if not (is_asked and _is_of_absent_part(model, name))
        ],
        "mismatched": list(_names(info, "mismatched")),
    }
    for fault, names in faults.items():
        if names:
            raise CheckpointError(
                f"{folder}: {fault} tensors: {', '.join(names[:_SHOWN])} "
                f"({len(names)} in all) do not fit the config{_advice(fault, names, model)}"
            )


def _names(info: Mapping[str, Any], fault: str) -> Iterator[str]:
    for entry in sorted(info.get(f"{fault}_keys") or (), key=str):
        yield entry if isinstance(entry, str) else str(entry[0])


def _is_of_head(model: Any, name: str) -> bool:
    """Whether a tensor lies outside the base model, so that a new head may have made it."""
    base = adapter.base_name(model)
    return bool(base) and not name.startswith(f"{base}.")


def _is_of_absent_part(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a whole part that the class lacks: a head, never a layer."""
    *path, _ = name.split(".")
    reached = model
    for child in path:
        inner = child_table(reached).get(child)
        if inner is None:
            return not child.isdigit()
        reached = inner
    return False


def _advice(fault: str, names: list[str], model: nn.Module) -> str:
    if fault == "missing" and all(_is_of_head(model, name) for name in names):
        return (
            "; a new head comes with model_class= (another class than config.json names), and "
            "has to be trained"
        )
    if fault == "unexpected" and all(_is_of_absent_part(model, name) for name in names):
        return f"; model_class={type(model).__name__} leaves these parts out"
    return ""
