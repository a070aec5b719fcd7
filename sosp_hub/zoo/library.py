"""Which library builds a model that is given by its name alone."""

from pathlib import Path

from sosp_hub.errors import ModelError
from sosp_hub.types import Library
from sosp_hub.untrusted import UnreadableError, read_json


def library_of_id(model: str) -> Library:
    """The library of a hub id, timm name or local folder.

    A folder's ``config.json`` tells. An id tells where it is timm's own (``timm/...``) or a name
    that timm knows; all others are taken for transformers'.

    Raises:
        ModelError: A folder without a ``config.json`` that can be read.
    """
    folder = Path(model)
    if folder.is_dir():
        try:
            config = read_json(folder / "config.json")
        except UnreadableError as error:
            raise ModelError(f"{folder / 'config.json'}: {error}") from None
        named = isinstance(config, dict) and "architecture" in config and "model_type" not in config
        return "timm" if named else "transformers"
    if model.startswith("timm/"):
        return "timm"
    if "/" in model:
        return "transformers"
    import timm

    return "timm" if timm.is_model(model.partition(".")[0]) else "transformers"
