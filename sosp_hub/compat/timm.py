"""What the package uses of timm and timm does not promise.

timm is imported where it is used: models of transformers do without.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

ADAPT = "adapt_model_from_file"
READ_HUB = "load_state_dict_from_hf"
READ_FOLDER = "load_state_dict_from_path"
"""Functions that timm's builder calls between building a model and giving it its weights."""


def is_whole(model: nn.Module) -> bool:
    """Whether timm builds the model by its architecture alone: ``features_only`` gives another."""
    has_config = isinstance(getattr(model, "pretrained_cfg", None), dict)
    return has_config and type(model).__module__ != "timm.models._features"


def get_step(name: str) -> Callable[..., Any]:
    """What stands under the name of a loading step (``ADAPT``, ``READ_HUB``, ``READ_FOLDER``)."""
    from timm.models import _builder

    return getattr(_builder, name)


def set_step(name: str, step: Callable[..., Any]) -> None:
    """Puts another function in its place."""
    from timm.models import _builder

    assert hasattr(_builder, name), name
    setattr(_builder, name, step)


def forget_architecture(name: str) -> None:
    """Undoes ``register_model``."""
    from timm.models import _registry

    _registry._model_entrypoints.pop(name, None)


def read_config(folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """``pretrained_cfg``, the architecture and its arguments, out of a folder."""
    from timm.models import _hub

    cfg, name, args = _hub.load_model_config_from_path(folder)
    return cfg, name, args or {}


def get_config_writer() -> Callable[..., None]:
    """What timm's own ways of saving call with a model and the path of its ``config.json``."""
    from timm.models import _hub

    return _hub.save_config_for_hf


def set_config_writer(writer: Callable[..., None]) -> None:
    """Puts another function in its place."""
    from timm.models import _hub

    assert hasattr(_hub, "save_config_for_hf")
    _hub.save_config_for_hf = writer


def write_config(model: nn.Module, path: Path) -> None:
    """Writes ``config.json`` of a model as timm does, whatever was put in the writer's place.

    Raises:
        ValueError: An argument of the model that is no JSON data.
    """
    inspect.unwrap(get_config_writer())(model, path)


def split_id(model_id: str) -> tuple[str, str | None]:
    """Repository and revision in ``NAMESPACE/NAME@REVISION``."""
    from timm.models import _hub

    return _hub.hf_split(model_id)


def built_with(model: nn.Module) -> dict[str, Any]:
    """The arguments that the model's architecture was called with."""
    import timm

    if (read := getattr(timm.models, "get_model_args", None)) is not None:
        return dict(read(model))
    return dict(getattr(model, "_model_args", {}))  # only what create_model was given
