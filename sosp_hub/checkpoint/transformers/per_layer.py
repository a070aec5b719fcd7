"""KV heads of each layer in the schema of transformers' own ``per_layer_config``.

The delta builds the model; this copy of a few of its numbers is for code that looks at the config
alone: static caches that are made before the first token, exporters, and other readers of the
schema. It is written beside the delta and is never what a layer is built from.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from sosp_hub.checkpoint.fake import to_fake
from sosp_hub.checkpoint.format.proof import cached_sizes
from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.checkpoint.inputs import inputs_without_weights, made_up_inputs
from sosp_hub.compat import transformers as library
from sosp_hub.compat.torch import FakeMode
from sosp_hub.structure.copies import copy_model
from sosp_hub.structure.isolation import isolated

Overrides = dict[int, dict[str, Any]]


Held = list[tuple[int, int]]
"""KV heads and their size as each layer writes them to a cache; ``(0, 0)`` where it has no keys."""


def describe_layers(model: Any, config: Any, held: Held | None) -> None:
    """Writes into a config which layers of a model differ from it, where a cache has to know.

    Nothing is written for a config that has such entries of its own, a model that keeps no cache of
    keys, and layers that the schema cannot say.

    Args:
        model: A pruned model, left as it was.
        config: Its config, or the plain one that will be written.
        held: Of `held_in_cache`.
    """
    text = config.get_text_config(decoder=True)
    if held is None or not any(map(sum, held)) or len(held) != text.num_hidden_layers:
        return
    heads = _head_overrides(text, held)
    for overrides in (_with_others(model, text, heads), heads):
        if overrides and library.set_layers(text, overrides, held):
            return


def held_in_cache(model: Any, config: Any) -> Held | None:
    """What each layer of a model writes to a cache; None where nothing is to be said of it."""
    text = config.get_text_config(decoder=True)
    caches = hasattr(text, "use_cache") and not config.is_encoder_decoder
    if not caches or not library.takes_layers(text):
        return None
    if any(parameter.is_meta for parameter in model.parameters()):
        inputs = inputs_without_weights(model)
        if not isinstance(inputs, dict) or "input_ids" not in inputs:
            return None
        twin = copy_model(model)
        with isolated(model), FakeMode():
            tokens = {"input_ids": torch.empty(inputs["input_ids"].shape, dtype=torch.int64)}
            return cached_sizes(to_fake(twin), tokens)
    inputs = made_up_inputs(model)
    if not isinstance(inputs, dict) or "input_ids" not in inputs:
        return None
    with isolated(model), torch.no_grad():
        return cached_sizes(model, {"input_ids": inputs["input_ids"]})


def _head_overrides(text: Any, held: Held) -> Overrides:
    """What the config says otherwise of the keys of a layer.

    What it does not say at all has to be said for every layer.
    """
    heads = getattr(text, "num_key_value_heads", None)
    size = getattr(text, "head_dim", None)
    found = heads or text.num_attention_heads, size or text.hidden_size // text.num_attention_heads
    overrides: Overrides = defaultdict(dict)
    for key, said, i in (("num_key_value_heads", heads, 0), ("head_dim", size, 1)):
        own = [layer[i] or found[i] for layer in held]
        if any(each != found[i] for each in own):
            for layer, each in enumerate(own):
                if said is None or each != said:
                    overrides[layer][key] = each
    return dict(overrides)


def _with_others(model: nn.Module, text: Any, heads: Overrides) -> Overrides:
    """Widths, of MLPs with a Llama's names, and what was taken out, besides."""
    overrides: Overrides = defaultdict(dict, {i: dict(each) for i, each in heads.items()})
    for i, layer in enumerate(_layers(model, text.num_hidden_layers)):
        named = list(layer.named_modules())
        widths = [
            each.in_features
            for name, each in named
            if name.endswith("down_proj") and isinstance(each, nn.Linear)
        ]
        if len(widths) == 1 and widths[0] != getattr(text, "intermediate_size", widths[0]):
            overrides[i]["intermediate_size"] = widths[0]
        kinds = {RemovedAttention: "attention", RemovedMlp: "mlp"}
        if skipped := [kinds[type(each)] for _, each in named if type(each) in kinds]:
            overrides[i]["skip"] = skipped
    return dict(overrides)


def _layers(model: nn.Module, number: int) -> nn.ModuleList:
    """The list of so many layers; empty where there is more than one such list, or none."""
    lists = [
        each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == number
    ]
    return lists[0] if len(lists) == 1 else nn.ModuleList()
