"""Pruned timm models: one registered architecture that builds another one and shrinks it.

``config.json`` names the architecture ``sosp_hub_pruned`` with the real one and the delta among its
``model_args``, so ``timm.create_model("local-dir:...")`` and transformers' ``TimmWrapper`` build
the small model, and a timm without this package stops at the unknown name.
"""

import contextlib
import contextvars
import copy
import dataclasses
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sosp_hub
from sosp_hub.checkpoint import hooks
from sosp_hub.checkpoint.format.delta import apply_section, diff, versions_said
from sosp_hub.checkpoint.format.record import Delta
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.timm import shards as timm_shards
from sosp_hub.checkpoint.timm.features import announce, announced_channels, feature_entries
from sosp_hub.compat.timm import (
    ADAPT,
    READ_FOLDER,
    READ_HUB,
    built_with,
    forget_architecture,
    get_step,
    read_config,
    set_step,
)
from sosp_hub.errors import CheckpointError

ARCHITECTURE = "sosp_hub_pruned"
CUT = "_sosp_hub_cut"
"""Set on a model that its architecture alone does not build."""

_WHERE = "config.json: model_args.delta"
_ZOO = "sosp_hub.zoo.cifar_resnet"  # registers the networks that timm lacks
_NO_ARGS = ("cache_dir", "pretrained_cfg_overlay", "pretrained_model_args")
_PENDING: contextvars.ContextVar[list[tuple[Delta, bool]] | None] = contextvars.ContextVar(
    "pending", default=None
)
"""The delta of the model that is being built, and whether only the features of that are."""
_READ: contextvars.ContextVar[dict[str, Tensor] | None] = contextvars.ContextVar(
    "read", default=None
)
"""Tensors of the files, as they are before the architecture's own filter."""
_ORIGINALS: dict[str, Callable[..., Any]] = {}


def sosp_hub_pruned(
    pretrained: bool = False,
    *,
    base_architecture: str,
    delta: Mapping[str, Any],
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """A pruned model; timm calls this with what ``config.json`` says.

    Args:
        pretrained: Load the weights.
        base_architecture: Name of the architecture that was pruned.
        delta: What the pruning changed.
        pretrained_cfg: Where the weights are, and how images are prepared for the model.
        **kwargs: Arguments of the real architecture.
    """
    record = parse_delta(delta, _WHERE)
    if record.library != "timm" or record.head is not None:
        raise CheckpointError(
            f"{_WHERE}.library: {record.library!r}, but a timm model is being built"
        )
    if base_architecture == ARCHITECTURE or not timm.is_model(base_architecture):
        raise CheckpointError(
            f"config.json: model_args.base_architecture: timm {timm.__version__} has no "
            f"{base_architecture!r}"
        )
    if pretrained_cfg is not None and not isinstance(pretrained_cfg, str):
        fields = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else vars(pretrained_cfg)
        pretrained_cfg = {**fields, "architecture": base_architecture}
    source_args = kwargs.get("pretrained_model_args")
    if source_args:  # of the real architecture, which adapts its weights to other arguments
        own = ("base_architecture", "delta")
        kwargs["pretrained_model_args"] = {k: v for k, v in source_args.items() if k not in own}
    pending = [(record, bool(kwargs.get("features_only")))]
    token, reading = _PENDING.set(pending), _READ.set({})
    own_args = {key: kwargs[key] for key in kwargs if key not in _NO_ARGS}
    all_read = pretrained and own_args == kwargs.get("pretrained_model_args")
    try:
        with _Uninitialized() if all_read else contextlib.nullcontext():
            model = timm.models.model_entrypoint(base_architecture)(
                pretrained=pretrained, pretrained_cfg=pretrained_cfg, pruned=True, **kwargs
            )
    finally:
        _PENDING.reset(token)
        _READ.reset(reading)
    if pending:
        raise CheckpointError(
            f"timm {timm.__version__} builds {base_architecture!r} by code that takes no delta"
        )
    model.__dict__[CUT] = True
    return model


class _Uninitialized(TorchFunctionMode):
    """Leaves out the random numbers of parameters: every one is about to be read from a file."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS or getattr(func, "__module__", None) == nn.init.__name__:
            filled = args[0] if args else kwargs["tensor"]
            if isinstance(filled, nn.Parameter):
                return filled
        return func(*args, **kwargs)


_FILLS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}


def hook() -> None:
    """Registers the architecture, and the networks of the zoo, with timm."""
    importlib.import_module(_ZOO)
    if not _ORIGINALS:
        _ORIGINALS.update({name: get_step(name) for name in _STAND_INS})
        for name, stand_in in _STAND_INS.items():
            set_step(name, stand_in(_ORIGINALS[name]))
        if not timm.is_model(ARCHITECTURE):
            timm.models.register_model(sosp_hub_pruned)


def unhook() -> None:
    """Leaves timm without the architecture."""
    if _ORIGINALS:
        for name in _STAND_INS:
            set_step(name, _ORIGINALS.pop(name))
        forget_architecture(ARCHITECTURE)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Installs the hooks for the duration of a block, whether they are enabled or not."""
    was_on = bool(_ORIGINALS)
    hook()
    try:
        yield
    finally:
        if not was_on:
            unhook()


def base_architecture(model: nn.Module) -> str:
    """Name under which timm builds the model that ``model`` was before it was pruned."""
    for cfg in (getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)):
        name = cfg.get("architecture") if isinstance(cfg, Mapping) else None
        if name and timm.is_model(name):
            return name
    raise CheckpointError(
        f"{type(model).__name__}: no timm architecture builds it; make it with timm.create_model, "
        f"or register its function with timm.models.register_model"
    )


def model_args(model: nn.Module) -> dict[str, Any]:
    """Arguments that make timm build the skeleton of this model again, as JSON data."""
    args = built_with(model)
    if isinstance(channels := getattr(model, "in_chans", None), int):
        args["in_chans"] = channels
    own = ("base_architecture", "delta", "pruned", "features_only", "pretrained_model_args")
    # transformers' TimmWrapper passes num_classes itself
    run = ("num_classes", "cache_dir", "device", "dtype", "scriptable", "exportable", "no_jit")
    return {key: value for key, value in args.items() if key not in own + run}


def delta_of(model: nn.Module, args: Mapping[str, Any] | None = None) -> Delta:
    """The delta of a pruned timm model against what its architecture builds.

    Args:
        model: The pruned model.
        args: Arguments of the architecture; by default the model's own.
    """
    skeleton = build(base_architecture(model), model_args(model) if args is None else args, model)
    section = diff(skeleton, model)
    if section.empty:
        return Delta("timm", timm.__version__, sosp_hub.__version__, section)
    dense = [entry["num_chs"] for entry in feature_entries(skeleton)]
    numbers = {name: getattr(skeleton, name, None) for name in ("num_features", "head_hidden_size")}
    channels, new_numbers = announced_channels(model, skeleton)
    changed = {name: value for name, value in new_numbers.items() if value != numbers[name]}
    if changed:
        root = {**section.modules.get("", {}), **changed}
        section = dataclasses.replace(section, modules={**section.modules, "": root})
    channels = () if channels == dense else tuple(channels)
    return Delta("timm", timm.__version__, sosp_hub.__version__, section, feature_channels=channels)


def build(architecture: str, args: Mapping[str, Any], like: nn.Module) -> nn.Module:
    """Builds an architecture with as many classes as a model; without data where timm can."""
    kwargs = copy.deepcopy(dict(args))
    if isinstance(classes := getattr(like, "num_classes", None), int):
        kwargs["num_classes"] = classes
    try:
        with torch.device("meta"):
            return timm.create_model(architecture, pretrained=False, **kwargs)
    except (RuntimeError, NotImplementedError):  # code that reads values while it builds
        return timm.create_model(architecture, pretrained=False, **kwargs)


def build_from_folder(folder: Path, *, dense: bool = False) -> nn.Module:
    """What `timm.create_model` builds from a folder before it loads weights.

    Args:
        folder: Holds ``config.json``.
        dense: Leave the delta out.
    """
    cfg, name, args = read_config(folder)
    if dense and name == ARCHITECTURE:
        name = args["base_architecture"]
        args = {key: args[key] for key in args if key not in ("base_architecture", "delta")}
    with enabled():
        return timm.create_model(name, pretrained_cfg=cfg, **args)


def _adapting(timms_own: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Stands where timm shrinks its own pruned models: between building and loading weights."""

    def adapt(model: nn.Module, variant: str) -> nn.Module:
        if not (pending := _PENDING.get()):
            return timms_own(model, variant)
        delta, features_only = pending.pop()
        with versions_said(delta, timm.__version__):
            apply_section(model, delta.base, f"{_WHERE}.base", part=features_only)
        announce(model, delta.feature_channels)
        if names := delta.base.buffers:
            _put_back(model, names)
        return model

    return adapt


def _put_back(model: nn.Module, names: Collection[str]) -> None:
    """Has the first load find the buffers of the delta, which filters of timm may leave out."""

    def put_back(_: nn.Module, state: dict[str, Tensor], *__: Any) -> None:
        handle.remove()
        read = _READ.get() or {}
        state.update({name: read[name] for name in names if name in read and name not in state})

    handle = model.register_load_state_dict_pre_hook(put_back)


def _noting(reader: Callable[..., Any]) -> Callable[..., Any]:
    """A step that reads weights, and has them noted while a pruned model is built."""

    def read(*args: Any, **kwargs: Any) -> Any:
        state = reader(*args, **kwargs)
        if (noted := _READ.get()) is not None:
            noted.update(state)
        return state

    return read


_STAND_INS: dict[str, Callable[..., Any]] = {
    ADAPT: _adapting,
    READ_HUB: lambda timms_own: _noting(timm_shards.from_hub(timms_own)),
    READ_FOLDER: lambda timms_own: _noting(timm_shards.from_folder(timms_own)),
}

hooks.complete("timm")
