"""Small inputs made up from a model's config, for the proof at save time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.accelerate import is_spread
from sosp_hub.compat.timm import built_with


def made_up_inputs(
    model: nn.Module, *, num_tokens: int = 5
) -> dict[str, Any] | tuple[Tensor, ...] | None:
    """Example inputs of one forward pass; None if the config does not determine their form.

    Args:
        model: The model.
        num_tokens: Length of texts; no more than the config has positions for.
    """
    place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if place.type == "meta" or is_spread(model):
        return None
    return _made_up(model, place, num_tokens)


def inputs_without_weights(model: nn.Module) -> dict[str, Any] | tuple[Tensor, ...] | None:
    """The same for a trace of a model without weights; a language model is told to keep no cache.

    Args:
        model: With its parameters on the meta device.
    """
    inputs = _made_up(model, torch.device("cpu"), 5)
    if isinstance(inputs, dict) and hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _made_up(
    model: nn.Module, place: torch.device, num_tokens: int
) -> dict[str, Any] | tuple[Tensor, ...] | None:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        size = _timm_size(model)
        return None if size is None else (_noise((2, *size), place, dtype),)
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    if all(parts):
        inputs = {
            "input_ids": _tokens(parts[0], place, num_tokens),
            "pixel_values": _image(parts[1], place, dtype),
        }
    elif main == "input_ids":
        inputs = {main: _tokens(config, place, num_tokens)}
    elif main == "pixel_values":
        inputs = {main: _image(config, place, dtype)}
    elif main == "input_features" and (bins := getattr(config, "num_mel_bins", None)):
        frames = 2 * getattr(config, "max_source_positions", 50)
        inputs = {main: _noise((1, bins, frames), place, dtype)}
    has_words = main != "pixel_values" or hasattr(config, "vocab_size")  # detectors have none
    if getattr(config, "is_encoder_decoder", False) and inputs and has_words:
        inputs["decoder_input_ids"] = _tokens(config, place, num_tokens)
    return inputs if inputs and all(value is not None for value in inputs.values()) else None


def _tokens(config: Any, place: torch.device, num_tokens: int) -> Tensor | None:
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 2:  # RoBERTa counts from 2
        num_tokens = min(num_tokens, positions - 2)
    values = torch.arange(3, 3 + 2 * num_tokens, device=place).reshape(2, num_tokens)
    return values % vocabulary


_ANY_SIZE = 64
"""Of a picture, where a config tells none: what begins with convolutions takes any."""


def _image(config: Any, place: torch.device, dtype: torch.dtype) -> Tensor | None:
    size, channels = getattr(config, "image_size", _ANY_SIZE), getattr(config, "num_channels", 3)
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, tuple | list) or len(size) != 2:
        return None
    return _noise((2, channels, *size), place, dtype)


def _timm_size(model: nn.Module) -> tuple[int, int, int] | None:
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping) or not cfg.get("input_size"):
        return None
    args = built_with(model)
    size = args.get("img_size") or cfg["input_size"][-2:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(model, "in_chans", args.get("in_chans", cfg["input_size"][0]))
    return channels, size[0], size[1]


def _noise(shape: tuple[int, ...], place: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(place, dtype)
