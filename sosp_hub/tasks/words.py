"""What a model says or writes, compared word by word with what it should."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sosp_hub.data.ignored import IGNORED
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll

Compared = tuple[str, str]
"""What the model says, and what it should."""


def word_metrics(tokenizer: Any) -> Mapping[str, OfAll]:
    """``word_error_rate`` and ``exact_match`` of what a model generates, or CTC reads."""
    collect = partial(_texts, tokenizer)
    return {
        "word_error_rate": OfAll(collect, word_error_rate),
        "exact_match": OfAll(collect, exact_match),
    }


def word_error_rate(texts: Sequence[Compared]) -> float:
    """Words that are wrong, missing or too many, over the words that should be there."""
    errors = sum(edits(text.split(), aim.split()) for text, aim in texts)
    return errors / max(sum(len(aim.split()) for _, aim in texts), 1)


def exact_match(texts: Sequence[Compared]) -> float:
    """How many texts are the same, but for spaces."""
    return sum(text.split() == aim.split() for text, aim in texts) / max(len(texts), 1)


def edits(first: Sequence[str], second: Sequence[str]) -> int:
    """The least number of words that are replaced, left out or put in (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            replaced = diagonal + (word != other)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]


def _texts(tokenizer: Any, model: Any, loss: Loss, batch: Any) -> list[Compared]:
    labels = batch["labels"].clone()
    labels[labels == IGNORED] = tokenizer.pad_token_id
    if can_generate(model):
        generated = _generated(model, batch, labels.shape[1])
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        aims = tokenizer.batch_decode(labels, skip_special_tokens=True)
    else:  # the likeliest token of each place, repeated ones once
        texts = tokenizer.batch_decode(loss.outputs.logits.argmax(-1))
        aims = tokenizer.batch_decode(labels, group_tokens=False)
    return list(zip(texts, aims, strict=True))


def can_generate(model: nn.Module) -> bool:
    """Whether a model writes token by token."""
    ask = getattr(model, "can_generate", None)
    return callable(ask) and bool(ask())


@torch.no_grad()
def _generated(model: Any, batch: Any, length: int) -> Any:
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.items()
        if name in ("input_ids", "attention_mask", "input_features", "input_values")
    }
    return model.generate(
        **inputs, max_new_tokens=length, min_new_tokens=None, num_beams=1, do_sample=False
    )
