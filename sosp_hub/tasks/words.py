"""What a model says or writes, compared word by word with what it should."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from sosp_hub.data.ignored import IGNORED
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll, library_of

Compared = tuple[str, str]
"""What the model says, and what it should."""


def word_metrics(tokenizer: Any, names: Sequence[str]) -> Mapping[str, OfAll]:
    """Metrics of what a model generates, or CTC reads; it generates once for all of them."""
    collect = partial(_texts, tokenizer)
    values = {
        **{"word_error_rate": word_error_rate, "exact_match": exact_match},
        **{"bleu": bleu, "chrf": chrf},
        **{f"rouge_{kind.lower()}": partial(rouge, kind) for kind in ("1", "2", "L")},
    }
    return {name: OfAll(collect, values[name]) for name in names}


def word_error_rate(texts: Sequence[Compared]) -> float:
    """Words that are wrong, missing or too many, over the words that should be there."""
    errors = sum(edits(text.split(), aim.split()) for text, aim in texts)
    return errors / max(sum(len(aim.split()) for _, aim in texts), 1)


def exact_match(texts: Sequence[Compared]) -> float:
    """How many texts are the same, but for spaces."""
    return sum(text.split() == aim.split() for text, aim in texts) / max(len(texts), 1)


def bleu(texts: Sequence[Compared]) -> float:
    """Of all texts together (Papineni et al. 2002), from 0 to 1; by sacrebleu, its defaults."""
    found, aims = zip(*texts, strict=True)
    return library_of("bleu").corpus_bleu(found, [aims]).score / 100


def chrf(texts: Sequence[Compared]) -> float:
    """F-score of character n-grams (Popovic 2015), from 0 to 1; by sacrebleu, its defaults."""
    found, aims = zip(*texts, strict=True)
    return library_of("chrf").corpus_chrf(found, [aims]).score / 100


def rouge(kind: str, texts: Sequence[Compared]) -> float:
    """Mean F-score of words (``1``), of pairs, of the longest common subsequence (Lin 2004).

    By torchmetrics, words as they are, without a stemmer.

    Args:
        kind: ``1``, ``2`` or ``L``.
        texts: Those of all samples.
    """
    return sum(_rouge(kind, *pair) for pair in texts) / max(len(texts), 1)


@lru_cache(maxsize=20_000)  # the standard error asks for each pair twenty times
def _rouge(kind: str, text: str, aim: str) -> float:
    score = library_of(f"rouge_{kind.lower()}").rouge_score
    return float(score(text, aim, rouge_keys=f"rouge{kind}")[f"rouge{kind}_fmeasure"])


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
