"""Makes ``save_pretrained`` of a cut transformers model write the delta.

A cut model gets its delta when it is cut. Where that was not possible yet, as with adapters inside,
the model is marked, and the delta is computed when the model saves itself.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.checkpoint.transformers.load import PENDING
from sosp_hub.compat.transformers import saves_adapters_only
from sosp_hub.errors import CheckpointError
from sosp_hub.modes import in_own_modes

_ORIGINALS: dict[str, Callable[..., Any]] = {}


def describe_cut(model: PreTrainedModel) -> None:
    """Puts the delta of a model that was just cut into its config, or marks the model."""
    try:
        _attach(model)
    except Exception as error:  # noqa: BLE001 - the cut holds; what it lacks is said at save time
        adapter.forget(model.config)  # of an earlier cut
        model.__dict__[PENDING] = str(error)


def hook() -> None:
    """Makes marked models compute their delta when they save themselves."""
    if not _ORIGINALS:
        _ORIGINALS["save_pretrained"] = PreTrainedModel.save_pretrained
        PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)


def unhook() -> None:
    """Leaves transformers as it comes."""
    if _ORIGINALS:
        PreTrainedModel.save_pretrained = _ORIGINALS.pop("save_pretrained")


def _saving(transformers_own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(transformers_own)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if PENDING in vars(self) and not saves_adapters_only(self):
            try:
                in_own_modes(_attach)(self)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{type(self).__name__} was cut, and its config alone would not load these "
                    f"weights: {error}"
                ) from error
        return transformers_own(self, *args, **kwargs)

    return save_pretrained


def _attach(model: PreTrainedModel) -> None:
    from sosp_hub.checkpoint.transformers.save import attach  # brings more than a hook should

    attach(model)
    vars(model).pop(PENDING, None)
