"""Images and texts that belong together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll

Pair = tuple[Tensor, Tensor, bytes]
"""Vectors of an image and of its text, and the text's tokens."""


def _pairs(model: nn.Module, loss: Loss, batch: Any) -> list[Pair]:
    del model
    images, texts = (
        getattr(loss.outputs, name).float().cpu() for name in ("image_embeds", "text_embeds")
    )
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"] if mask is None else batch["input_ids"] * mask
    keys = [_key(row) for row in tokens.cpu()]
    return list(zip(images, texts, keys, strict=True))


def _key(tokens: Tensor) -> bytes:
    """Of a text, however many zeros are behind it."""
    return bytes(tokens.to(torch.int32).numpy().tobytes()).rstrip(b"\0")


def _share_found(pairs: Sequence[Pair]) -> float:
    texts = {key: text for _, text, key in pairs}
    numbers = {key: i for i, key in enumerate(texts)}
    images = torch.stack([image for image, _, _ in pairs])
    nearest = (images @ torch.stack(list(texts.values())).T).argmax(1)
    own = torch.tensor([numbers[key] for _, _, key in pairs])
    return (nearest == own).double().mean().item()


retrieval = OfAll(_pairs, _share_found)
"""How often an image's own text is the nearest of all different texts. Where texts are made of the
names of classes this is the accuracy of zero-shot classification."""
