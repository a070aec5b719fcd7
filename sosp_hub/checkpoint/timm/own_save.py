"""Makes timm's ``save_for_hf`` and ``push_to_hf_hub`` of a cut model write the delta."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sosp_hub.checkpoint.format.delta import store_in_state
from sosp_hub.checkpoint.timm.load import CUT
from sosp_hub.checkpoint.timm.save import complete_config, describe
from sosp_hub.compat.timm import get_config_writer, set_config_writer
from sosp_hub.errors import CheckpointError
from sosp_hub.modes import in_own_modes
from sosp_hub.progress import only_errors

_ORIGINALS: dict[str, Callable[..., Any]] = {}


def describe_cut(model: nn.Module) -> None:
    """Marks a model that was just cut, and has its state hold what its files must.

    The delta is computed when timm saves the model; where there is none, that raises.
    """
    model.__dict__[CUT] = True
    with only_errors("timm"), contextlib.suppress(Exception):  # both say it at save time
        store_in_state(model, describe(model)[1].base)


def hook() -> None:
    """Makes cut models write their delta where timm writes a config."""
    if not _ORIGINALS:
        _ORIGINALS["config writer"] = get_config_writer()
        set_config_writer(_saving(get_config_writer()))


def unhook() -> None:
    """Leaves timm as it comes."""
    if _ORIGINALS:
        set_config_writer(_ORIGINALS.pop("config writer"))


def _saving(timms_own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(timms_own)
    def save_config_for_hf(
        model: nn.Module, config_path: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        if CUT not in vars(model):
            timms_own(model, config_path, *args, **kwargs)
            return
        try:
            described = in_own_modes(describe)(model)
        except CheckpointError as error:
            raise CheckpointError(
                f"{type(model).__name__} was cut, and timm's config alone would not load these "
                f"weights: {error}"
            ) from error
        timms_own(model, config_path, *args, **kwargs)
        complete_config(model, Path(config_path), *described)

    return save_config_for_hf
