"""A cut model of no library: what it carries, and ``PyTorchModelHubMixin``'s own ways with it."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.delta import store_in_state
from sosp_hub.checkpoint.format.record import KEY, library_in
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.torch import check
from sosp_hub.checkpoint.torch.read import fill
from sosp_hub.checkpoint.torch.save import (
    PENDING,
    check_saveable,
    describe,
    same_output,
    write_config,
)
from sosp_hub.checkpoint.torch.skeleton import SKELETON
from sosp_hub.compat.huggingface_hub import MIXIN_STEPS, get_mixin_step, set_mixin_step
from sosp_hub.errors import CheckpointError
from sosp_hub.modes import in_own_modes

_ORIGINALS: dict[str, Any] = {}


def describe_cut(model: nn.Module, skeleton: nn.Module, inputs: Any) -> None:
    """Stores on a cut model its original form and a state that holds all of its files.

    Args:
        model: The cut model.
        skeleton: Its modules before the first cut.
        inputs: Arguments of a forward pass that shows whether the delta says all; None = do not
            look.
    """
    vars(model)[SKELETON] = skeleton
    vars(model).pop(PENDING, None)
    try:
        delta = describe(model, skeleton)
        if inputs is not None and same_output(model, delta, inputs) is False:
            raise CheckpointError(
                "what the delta builds computes something else: an attribute was changed that is "
                "no number"
            )
        store_in_state(model, delta.base)
        if inputs is not None:
            check.remember(model, inputs)
    except Exception as error:  # noqa: BLE001 - the cut holds; what it lacks is said at save time
        vars(model)[PENDING] = str(error)


def hook() -> None:
    """Makes cut models of ``PyTorchModelHubMixin`` write their delta, and its loader read it."""
    if not _ORIGINALS:
        for name in MIXIN_STEPS:
            _ORIGINALS[name] = get_mixin_step(name)
        set_mixin_step("save_pretrained", _saving(_ORIGINALS["save_pretrained"]))
        set_mixin_step("_from_pretrained", classmethod(_building(_ORIGINALS["_from_pretrained"])))
        loading = classmethod(_loading(_ORIGINALS["_load_as_safetensor"]))
        set_mixin_step("_load_as_safetensor", loading)


def unhook() -> None:
    """Leaves the mixin as it comes."""
    for name in list(_ORIGINALS):
        set_mixin_step(name, _ORIGINALS.pop(name))


def _saving(mixins_own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(mixins_own)
    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, nn.Module) or SKELETON not in vars(self):
            return mixins_own(self, save_directory, *args, **kwargs)
        check_saveable(self)
        delta = in_own_modes(describe)(self)
        result = mixins_own(self, save_directory, *args, **kwargs)
        path = Path(save_directory) / headers.CONFIG
        written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_config(Path(save_directory), written, delta, self)
        return result

    return save_pretrained


def _building(mixins_own: Any) -> Callable[..., Any]:
    """Keeps the delta from a class that is given all of its config."""

    @functools.wraps(mixins_own.__func__)
    def from_pretrained(cls: Any, **kwargs: Any) -> Any:
        ours = (KEY, check.KEY)
        for key in ours:
            kwargs.pop(key, None)
        if isinstance(config := kwargs.get("config"), dict):
            kwargs["config"] = {key: value for key, value in config.items() if key not in ours}
        return mixins_own.__get__(None, cls)(**kwargs)

    return from_pretrained


def _loading(mixins_own: Any) -> Callable[..., Any]:
    """Cuts what a class built before it takes the weights."""

    @functools.wraps(mixins_own.__func__)
    def load(cls: Any, model: Any, model_file: str, map_location: str, *args: Any) -> Any:
        folder = Path(model_file).parent
        config = headers.read_json(folder / headers.CONFIG) if _has_config(folder) else {}
        if library_in(config) != "torch":
            return mixins_own.__get__(None, cls)(model, model_file, map_location, *args)
        delta = parse_delta(config[KEY], f"config.json: {KEY}")
        tensors = headers.read_tensors(folder)
        built = in_own_modes(fill)(model, delta, folder, tensors).to(map_location).eval()
        in_own_modes(check.compare)(built, config.get(check.KEY))
        return built

    return load


def _has_config(folder: Path) -> bool:
    return (folder / headers.CONFIG).is_file()
