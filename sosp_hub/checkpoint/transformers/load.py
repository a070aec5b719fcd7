"""Pruned transformers models: the hooks that read a delta, and how to get the delta of a model.

The delta is applied inside ``PreTrainedModel.post_init``, so everything that builds a model from a
config sees the small shapes: ``from_pretrained`` with any device map, ``from_config``, pipelines,
adapters.
"""

import contextlib
import contextvars
import copy
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import PreTrainedModel

import sosp_hub
from sosp_hub.checkpoint import hooks
from sosp_hub.checkpoint.format.delta import diff
from sosp_hub.checkpoint.format.proof import check_cache
from sosp_hub.checkpoint.format.record import KEY, Delta, Section
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.format.shrink import APPLIED, shrink
from sosp_hub.checkpoint.format.standins import has_standins
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.compat.torch import child_table
from sosp_hub.compat.transformers import (
    ATTENTION_KEY,
    FILLED,
    drop_layers,
    get_loader,
    loud_layers,
    quiet_layers,
    set_loader,
    store_all,
    takes_other_sizes,
    tied_names,
    unstored_names,
)
from sosp_hub.errors import CheckpointError
from sosp_hub.structure.isolation import isolated

PENDING = "_sosp_hub_delta_pending"
"""Set on a cut model whose config does not hold its delta yet; says why."""

_LOG = logging.getLogger(__name__)
_ORIGINALS: dict[str, Callable[..., Any]] = {}
_BUILT: contextvars.ContextVar[dict[int, set[str]] | None] = contextvars.ContextVar(
    "built", default=None
)
"""Names of the modules that each model has when its own class has built it, by id."""

_MOST_COMPUTED = 2**22
"""Numbers of tables that a class computes itself, which may be most of a small model."""

_CHECKED: contextvars.ContextVar[bool] = contextvars.ContextVar("checked", default=False)


def hook() -> None:
    """Makes every model class look for the delta in its config."""
    if not _ORIGINALS:
        quiet_layers()
        _ORIGINALS["post_init"] = PreTrainedModel.post_init
        PreTrainedModel.post_init = _post_init
        _ORIGINALS["set_attn_implementation"] = PreTrainedModel.set_attn_implementation
        PreTrainedModel.set_attn_implementation = _set_attn_implementation
        _ORIGINALS["from_pretrained"] = vars(PreTrainedModel)["from_pretrained"]
        own = classmethod(_from_pretrained)
        PreTrainedModel.from_pretrained = own  # pyright: ignore[reportAttributeAccessIssue]
        if (loader := get_loader()) is not None:
            _ORIGINALS["loader"] = loader
            set_loader(_load)
        else:
            _LOG.warning(
                "transformers %s loads weights in a way that sosp_hub does not know: it cannot see "
                "whether a pruned checkpoint is loaded with tensors of other sizes",
                transformers.__version__,
            )


def unhook() -> None:
    """Leaves transformers as it comes."""
    if _ORIGINALS:
        loud_layers()
        PreTrainedModel.post_init = _ORIGINALS["post_init"]
        PreTrainedModel.set_attn_implementation = _ORIGINALS["set_attn_implementation"]
        PreTrainedModel.from_pretrained = _ORIGINALS["from_pretrained"]
        if "loader" in _ORIGINALS:
            set_loader(_ORIGINALS["loader"])
        _ORIGINALS.clear()


def delta_of(
    model: PreTrainedModel, config: Any | None = None, original: Any | None = None
) -> Delta:
    """The delta of a pruned model against what a plain config builds.

    Args:
        model: The pruned model.
        config: The plain config; by default the model's own.
        original: The config that ``config`` was rewritten from. Numbers of the model that are as
            this one says are taken for leftovers that nothing reads.

    Raises:
        CheckpointError: A difference that the format cannot say.
    """
    own = config is None or config is model.config
    config = plain_config(model.config if config is None else config)
    token = _BUILT.set({})
    try:
        skeleton = build_meta(type(model), config)
        built = _BUILT.get() or {}
    finally:
        _BUILT.reset(token)
    first, rewritten = None, frozenset()
    if original is not None:
        first = build_meta(type(model), plain_config(original))
        rewritten = _rewritten(original, config)
    shared = frozenset(id(each) for each in config_tree(model.config) if own)
    base = base_name(model)
    inside = skeleton.get_submodule(base)
    whole = {name for name, _ in inside.named_modules()}
    later = whole - built.get(id(inside), whole)  # what the outer class puts into its base model

    def section(name: str, belongs: Callable[[str], bool]) -> Section:
        return diff(
            skeleton.get_submodule(name),
            model.get_submodule(name),
            belongs=belongs,
            shared_configs=shared,
            original=first and first.get_submodule(name),
            rewritten=rewritten,
        )

    def is_head(name: str) -> bool:
        within = f"{name}.".startswith(f"{base}.")
        return not within or name[len(base) + 1 :] in later

    return Delta(
        "transformers",
        transformers.__version__,
        sosp_hub.__version__,
        section(base, lambda name: name not in later),
        section("", is_head) if base else None,
    )


def build_meta(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Builds a model without data. The delta in its config, if any, is applied."""
    with isolated(model_class), torch.device("meta"):
        return build(model_class, config)


def build(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Builds a model on the device of the moment. The delta in its config, if any, is applied."""
    with enabled():
        return model_class(copy.deepcopy(config))


def plain_config(config: Any) -> Any:
    """A copy of the config without the delta."""
    config = copy.deepcopy(config)
    forget(config)
    return config


def forget(config: Any) -> None:
    """Takes the delta out of a config, and what was copied from it."""
    for each in config_tree(config):
        vars(each).pop(KEY, None)
        drop_layers(each)


def config_tree(config: Any) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from config_tree(value)


def base_name(model: PreTrainedModel) -> str:
    """Name of the child that holds the base model; empty where the model is its own base.

    A backbone with a config of its own kind is a part: it does not see the delta in the config.
    """
    prefix = model.base_model_prefix
    inner = child_table(model).get(prefix) if prefix else None
    is_base = isinstance(inner, PreTrainedModel) and type(inner.config) is type(model.config)
    return prefix if is_base else ""


def _rewritten(old: Any, new: Any) -> frozenset[tuple[str, Any]]:
    """Keys whose values differ between two configs of one tree, with the old values."""
    return frozenset(
        (key, value)
        for a, b in zip(config_tree(old), config_tree(new), strict=True)
        for key, value in vars(a).items()
        if isinstance(value, int) and vars(b).get(key) != value
    )


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


@contextlib.contextmanager
def not_pending(model: PreTrainedModel) -> Iterator[None]:
    """What is saved inside needs no delta in the model's own config."""
    reason = vars(model).pop(PENDING, None)
    try:
        yield
    finally:
        if reason is not None:
            vars(model)[PENDING] = reason


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Hooks on, and models without a delta are checked as well, before memory is taken for them."""
    token = _CHECKED.set(True)
    try:
        with enabled():
            yield
    finally:
        _CHECKED.reset(token)


def _post_init(self: PreTrainedModel) -> None:
    if (built := _BUILT.get()) is not None:
        built.setdefault(id(self), {name for name, _ in self.named_modules()})
    shrink(self, parse_delta)
    _ORIGINALS["post_init"](self)
    if getattr(self, APPLIED, False):
        store_all(self)


def _set_attn_implementation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Also sets it in modules that hold their own copy of the config."""
    _ORIGINALS["set_attn_implementation"](self, *args, **kwargs)
    follow(self)


def follow(model: nn.Module) -> None:
    """Gives the attention implementation of each model to its modules' copies of the config."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        for child in _own_part(module):
            config: Any = child.__dict__.get("config")
            if type(config) is type(module.config) and config is not module.config:
                setattr(config, ATTENTION_KEY, getattr(module.config, ATTENTION_KEY))


def _own_part(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of a model that belong to no model inside it."""
    for child in model.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            yield from _own_part(child)


def _load(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Refuses what would load a pruned checkpoint wrongly without a word."""
    record = vars(model.config).get(KEY)
    if record is not None:
        if takes_other_sizes(args, kwargs):
            raise CheckpointError(
                "ignore_mismatched_sizes=True fills every tensor of another size with random "
                "numbers; load the pruned model without it, and replace its head afterwards"
            )
        if not any(getattr(module, APPLIED, False) for module in model.modules()):
            base = record.get("base", {}).get("class") if isinstance(record, dict) else None
            raise CheckpointError(
                f"the checkpoint holds a pruned {base}, "
                f"which a {type(model).__name__} does not contain"
            )
    held = {name for name, tensor in model.state_dict().items() if not tensor.is_meta}
    loaded = _ORIGINALS["loader"](model, *args, **kwargs)
    if record is not None or _CHECKED.get():
        _refuse_invented(model, loaded[0], held)
    if record is not None:
        _mark_filled(model, loaded[0])
    return loaded


def _mark_filled(model: PreTrainedModel, info: Any) -> None:
    """Keeps code that fills weights by the numbers of the config from modules that are full."""
    missing = {name.rpartition(".")[0] for name in info.missing_keys}
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        if own and name not in missing and not [*module.buffers(recurse=False)]:
            setattr(module, FILLED, True)


def _from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Proves what was loaded where modules were taken out."""
    loaded = _ORIGINALS["from_pretrained"].__get__(None, cls)(*args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    check_cache(model, made_up_inputs(model) if has_standins(model) else None)
    return loaded


def _refuse_invented(model: nn.Module, info: Any, held: Collection[str]) -> None:
    """Stops before transformers makes the tensors that the files do not hold, however large.

    Args:
        model: The model.
        info: What was loaded.
        held: Tensors that had data before: where adapters alone are loaded, all others.
    """
    for name, held, built in sorted(info.mismatched_keys):
        raise CheckpointError(
            f"tensor {name!r}: the files hold {list(held)}, the config builds {list(built)}"
        )
    tied = tied_names(model)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    missing = {name: sizes.get(name, 0) for name in info.missing_keys if name not in tied}
    missing = {name: size for name, size in missing.items() if name not in held}
    computed = unstored_names(model) & missing.keys()
    if sum(missing[name] for name in computed) <= _MOST_COMPUTED:
        missing = {name: size for name, size in missing.items() if name not in computed}
    if sum(missing.values()) > sum(sizes.values()) / 2:
        largest = max(missing, key=lambda name: missing[name])
        raise CheckpointError(
            f"tensor {largest!r}: the config builds {missing[largest]:,} numbers, no file holds "
            f"them; more than half of the model is missing"
        )


hooks.complete("transformers.modeling_utils")
