"""Inputs for a trace or a timing: the same values each time."""

from typing import Any

import torch
from torch import Tensor

from sosp_hub.data.processing import ImageProcessing
from sosp_hub.errors import ModelError


def image_inputs(loaded: Any, batch_size: int) -> tuple[Tensor, ...] | dict[str, Any]:
    """Images as a tuple for timm, as a dict for transformers."""
    chance = torch.Generator().manual_seed(0)
    parameter = next(loaded.model.parameters())
    processor: ImageProcessing = loaded.processor
    images = torch.randn(batch_size, *processor.shape, generator=chance)
    images = images.to(_place(loaded.model), parameter.dtype)
    return (images,) if processor.key is None else {processor.key: images}


def text_inputs(loaded: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
    """Tokens at random and a mask without padding.

    Args:
        loaded: The model and its processor.
        batch_size: Samples.
        num_tokens: Length of each text, where the model takes that many tokens.
    """
    chance = torch.Generator().manual_seed(0)
    processor = loaded.processor
    num_tokens = min(num_tokens, processor.max_positions or num_tokens)
    config: Any = loaded.model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise ModelError(
            f"model: {type(loaded.model).__name__} takes no texts (its config has no vocab_size), "
            "and no preprocessor_config.json says how images are made for it; save one beside "
            "config.json with AutoImageProcessor.from_pretrained(BASE).save_pretrained(FOLDER), or "
            "cut it in Python with inputs of your own: sosp_hub.trace(model, inputs)"
        )
    if processor.tokenizer is not None:
        vocabulary = min(len(processor.tokenizer), vocabulary)
    tokens = torch.randint(vocabulary, (batch_size, num_tokens), generator=chance)
    tokens = tokens.to(_place(loaded.model))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def for_model(loaded: Any, inputs: Any) -> dict[str, Any]:
    """Inputs on the device of a model, in the dtype of its weights."""
    parameter = next(loaded.model.parameters())
    return {
        name: value.to(_place(loaded.model), parameter.dtype)
        if value.is_floating_point()
        else value.to(_place(loaded.model))
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def _place(model: Any) -> torch.device:
    """Where inputs of a model go; those of one without weights have values all the same."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def noise_images(num: int, size: tuple[int, int]) -> list[Any]:
    """Images (height, width) of noise, as they are opened; processors give them their own size."""
    from PIL import Image

    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (num, *size, 3), generator=chance, dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in pixels]


def noise_audio(num: int, length: int) -> list[Any]:
    """Noise of so many values."""
    chance = torch.Generator().manual_seed(0)
    return list((torch.randn(num, length, generator=chance) / 10).numpy())
