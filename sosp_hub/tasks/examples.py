"""Inputs for a trace or a timing: the same values each time."""

from typing import Any

import torch
from torch import Tensor

from sosp_hub.data.processing import ImageProcessing


def image_inputs(loaded: Any, batch_size: int) -> tuple[Tensor, ...] | dict[str, Any]:
    """Images as a tuple for timm, as a dict for transformers."""
    chance = torch.Generator().manual_seed(0)
    parameter = next(loaded.model.parameters())
    processor: ImageProcessing = loaded.processor
    images = torch.randn(batch_size, *processor.shape, generator=chance)
    images = images.to(parameter.device, parameter.dtype)
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
    vocabulary = min(len(processor.tokenizer), config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (batch_size, num_tokens), generator=chance)
    tokens = tokens.to(next(loaded.model.parameters()).device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
