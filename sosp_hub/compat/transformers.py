"""What the package uses of transformers and transformers does not promise.

Copied beside weights that carry their own code (``ship_code``). transformers is imported where it
is used: one of its own modules, while it is being imported, sets off the import of this one.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

ATTENTION_KEY = "_attn_implementation_internal"
EXPERTS_KEY = "_experts_implementation_internal"
CONFIG_STATE = frozenset({ATTENTION_KEY, EXPERTS_KEY})
"""Attributes of a config that say how a model runs, not what it is."""

_ATTENTION = "_attn_implementation"
_LOADER = "_load_pretrained_model"
_SCHEMA = "per_layer_config"
_LAYERS = "_heterogeneity_spec"
_GLOBAL_TOO = "allow_global_per_layer_attribute_access"


def attention_of(config: Any) -> str | None:
    """Which attention a config says the model runs; None where it says none."""
    return getattr(config, _ATTENTION, None)


def set_attention(config: Any, name: str) -> None:
    """Lets the model of a config run another attention, such as ``eager``."""
    setattr(config, _ATTENTION, name)


def takes_sdpa(model: Any) -> bool:
    """Whether a model can run PyTorch's fused attention beside ``eager``."""
    return bool(getattr(model, "_supports_sdpa", False))


def exportable_state() -> Any:
    """What a callback is too whose state the Trainer writes into a checkpoint and gives back."""
    from transformers.trainer_callback import ExportableState

    return ExportableState


def is_taken(config: Any, numbers: Mapping[str, int]) -> bool:
    """Whether a config that is read from a file may hold these numbers, those that it has."""
    changed = copy.deepcopy(config)
    try:
        for name, number in numbers.items():
            if hasattr(changed, name):
                setattr(changed, name, number)
        type(changed).from_dict(changed.to_dict())
    except Exception:  # noqa: BLE001 - each library has its own words for what it refuses
        return False
    return True


def find_cache(values: Iterable[Any]) -> Any:
    """The key-value cache among the arguments of an attention, whatever the argument is called.

    ``past_key_values`` until transformers 5.23, ``cache`` from 5.24 on. Of an encoder-decoder's
    pair it is the decoder's own.
    """
    for value in values:
        value = getattr(value, "self_attention_cache", value)
        if callable(getattr(value, "update", None)) and hasattr(value, "get_seq_length"):
            return value
    return None


def cache_in(output: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that a model's output holds, under the name by which the next call takes it."""
    return {name: value for name, value in output.items() if find_cache([value]) is not None}


def cached_tokens(layer: Any, length: int) -> int:
    """Tokens of a text whose keys and values a layer of a cache holds: no more than its window."""
    window = getattr(layer, "sliding_window", None)
    return length if window is None else min(length, window - 1)


FILLED = "_is_hf_initialized"
"""Set on modules and tensors that hold their weights, so that nothing fills them anew."""


def get_loader() -> Callable[..., Any] | None:
    """The function that fills a built model from weight files: gives ``(info, ...)``."""
    from transformers.modeling_utils import PreTrainedModel

    return getattr(PreTrainedModel, _LOADER, None)


def set_loader(loader: Callable[..., Any]) -> None:
    """Puts another function in the place of `get_loader`."""
    from transformers.modeling_utils import PreTrainedModel

    setattr(PreTrainedModel, _LOADER, staticmethod(loader))


def takes_other_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `get_loader`'s arguments (after the model) say ``ignore_mismatched_sizes``."""
    objects = [vars(each) for each in (*args, *kwargs.values()) if hasattr(each, "__dict__")]
    return any(each.get("ignore_mismatched_sizes") is True for each in (kwargs, *objects))


def tied_names(model: Any) -> Mapping[str, str]:
    """Names of tensors that are the same as others, which weight files hold."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def unstored_names(model: Any) -> frozenset[str]:
    """Names of tensors that a model's class computes and never saves."""
    return frozenset(getattr(type(model), "_keys_to_ignore_on_save", None) or ())


def store_all(model: Any) -> None:
    """Has a model save the tensors too that its class computes: it was cut, and they with it."""
    if getattr(model, "_keys_to_ignore_on_save", None):
        model._keys_to_ignore_on_save = set()


def as_stored(model: Any, part: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A model's state under the names of its files: transformers renames some as it loads.

    Args:
        model: Any module.
        part: Tensors by their names in the model, which are of its shapes; None = its state.
    """
    state = dict(model.state_dict() if part is None else part)
    if not hasattr(model, "all_tied_weights_keys"):  # a model of another library
        return state
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def saves_adapters_only(model: Any) -> bool:
    """Whether ``save_pretrained`` writes adapters that were added to a model, and not the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def no_init_weights() -> Any:
    """Context in which models are built without random numbers."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def classes_for(auto: Any, config_class: type) -> tuple[type, ...]:
    """The model classes that an Auto class gives for a config class; a model class gives itself."""
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None:
        return (auto,)
    given = mapping.get(config_class, ())
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def build(cls: Any, config: Any, dtype: Any) -> Any:
    """A model with random weights, by an Auto class or a model class."""
    make = getattr(cls, "from_config", None) or cls._from_config
    return make(config, dtype=dtype)


def auto_classes(cls: Any) -> list[str]:
    """Names of the Auto classes that give a model class for its config."""
    from transformers.models.auto import modeling_auto

    autos = {name: getattr(modeling_auto, name) for name in dir(modeling_auto)}
    return [
        name
        for name, auto in autos.items()
        if name.startswith("Auto")
        and getattr(auto, "_model_mapping", None) is not None
        and cls in classes_for(auto, cls.config_class)
    ]


def name_of(config: Any) -> str:
    """The folder or hub id that a config was read from; empty where it was made."""
    return getattr(config, "_name_or_path", "") or ""


def takes_layers(config: Any) -> bool:
    """Whether a config has transformers' ``per_layer_config``, and no entries of its own in it."""
    return getattr(config, "is_heterogeneous", None) is False and hasattr(
        config, "num_hidden_layers"
    )


def set_layers(
    config: Any, overrides: Mapping[int, Mapping[str, Any]], heads: Sequence[tuple[int, int]]
) -> bool:
    """Sets ``per_layer_config``; whether the config then tells a cache these heads and sizes.

    Otherwise, or where it could not be read from a file again, it is left as it was.

    Args:
        config: Of the decoder.
        overrides: By layer, what differs.
        heads: KV heads and their size in each layer; what has none is not compared.
    """
    from transformers.configuration_utils import get_head_shapes

    try:
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = {i: dict(each) for i, each in overrides.items()}
        for each in (config, type(config).from_dict(config.to_dict())):
            told = zip(*_for_layers(get_head_shapes(each), len(heads)), strict=True)
            if any(sum(own) and own != one for own, one in zip(heads, told, strict=True)):
                raise ValueError(f"{get_head_shapes(each)} for {heads}")
    except Exception:  # noqa: BLE001 - a config that cannot say it, for one of many reasons
        drop_layers(config)
        return False
    return True


def drop_layers(config: Any) -> None:
    """Takes out of a config what `set_layers` wrote; entries of its own stay."""
    if vars(config).pop(_GLOBAL_TOO, False):
        vars(config).pop(_LAYERS, None)


def quiet_layers() -> None:
    """Lets configs tell their own numbers without a warning where `set_layers` wrote into them."""
    from transformers import PreTrainedConfig

    if isinstance(inherited := getattr(PreTrainedConfig, _SCHEMA, None), property):

        def set_and_quiet(config: Any, value: Any) -> None:
            inherited.__set__(config, value)
            if vars(config).get(_GLOBAL_TOO) and (layers := vars(config).get(_LAYERS)) is not None:
                layers.per_layer_attributes = set()

        setattr(PreTrainedConfig, _SCHEMA, property(inherited.fget, set_and_quiet))


def loud_layers() -> None:
    """Takes `quiet_layers` back."""
    from transformers import PreTrainedConfig

    if _SCHEMA in vars(PreTrainedConfig):
        delattr(PreTrainedConfig, _SCHEMA)


def _for_layers(shapes: tuple[Any, Any], number: int) -> Iterator[list[int]]:
    for each in shapes:
        yield each if isinstance(each, list) else [each] * number
