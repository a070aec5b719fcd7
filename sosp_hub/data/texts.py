"""Text splits: windows of tokens for a language model, padded texts for a classifier."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sosp_hub.data.ignored import IGNORED
from sosp_hub.data.labels import Problem
from sosp_hub.data.loading import wrong_kind
from sosp_hub.data.processing import Processing, TextProcessing
from sosp_hub.data.rows import TextRows
from sosp_hub.data.source import OpenData
from sosp_hub.data.split import Split
from sosp_hub.errors import DataError, shortened

log = logging.getLogger(__name__)


_BETWEEN_TEXTS = "\n\n"  # our choice; what the usual WikiText evaluation writes between its rows
_TEXTS_AT_ONCE = 1000


class WindowSplit(Split):
    """Windows of equal length, cut from the texts one after the other; the rest is left out.

    Where the tokenizer starts a text with a token of its own (BOS), each window does.
    """

    num_labels = None
    class_names = ()

    def __init__(self, windows: Int64[Tensor, "windows tokens"]) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        tokens = self._windows[torch.as_tensor(indices, dtype=torch.int64)]
        return {"input_ids": tokens, "labels": tokens}


class MaskedSplit(Split):
    """Windows of which some tokens are masked, the same each time; labels are those tokens.

    Which ones depends on the seed and the window alone.

    Args:
        windows: Tokens.
        mask: The token that hides others.
        seed: Of the choice.
        share: Of the tokens of a window that are hidden, at least one.
    """

    num_labels = None
    class_names = ()

    def __init__(
        self, windows: Int64[Tensor, "windows tokens"], mask: int, seed: int, share: float = 0.15
    ) -> None:
        self._windows, self._mask, self._seed = windows, mask, seed
        self._num = max(1, round(share * windows.shape[1]))

    def __len__(self) -> int:
        return len(self._windows)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        tokens = self._windows[torch.as_tensor(indices, dtype=torch.int64)].clone()
        labels = torch.full_like(tokens, IGNORED)
        for row, window in enumerate(tokens):
            digest = hashlib.blake2b(window.numpy().tobytes(), digest_size=6).digest()
            chance = torch.Generator().manual_seed(self._seed ^ int.from_bytes(digest))
            hidden = torch.randperm(len(window), generator=chance)[: self._num]
            labels[row, hidden] = window[hidden]
            tokens[row, hidden] = self._mask
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


class EncodedSplit(Split):
    """Encoded texts, padded to the longest of their batch.

    Args:
        encoded: What the tokenizer gives: names with one list a sample; ``labels`` among them are
            one a token.
        tokenizer: Says what to pad with, and on which side.
        targets: One row a sample, by the name that the model takes.
        class_names: Names of the labels.
    """

    def __init__(
        self,
        encoded: Mapping[str, Sequence[Sequence[int]]],
        tokenizer: Any,
        targets: Mapping[str, Tensor],
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.class_names, self.num_labels = class_names, len(class_names) or None
        names = (*tokenizer.model_input_names, "labels")
        self._encoded = {name: encoded[name] for name in names if name in encoded}
        self._targets = dict(targets)
        self._fill = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "labels": IGNORED,
        }
        self._left = tokenizer.padding_side == "left"

    def __len__(self) -> int:
        return len(self._encoded["input_ids"])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        batch = {
            name: self._padded([values[i] for i in indices], self._fill.get(name, 0))
            for name, values in self._encoded.items()
        }
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return {**batch, **{name: rows[chosen] for name, rows in self._targets.items()}}

    def _padded(self, samples: list[Sequence[int]], fill: int) -> Int64[Tensor, "batch tokens"]:
        longest = max(len(sample) for sample in samples)
        gaps = [[fill] * (longest - len(sample)) for sample in samples]
        pairs = zip(samples, gaps, strict=True)
        return torch.tensor([[*gap, *text] if self._left else [*text, *gap] for text, gap in pairs])


def encode(
    texts: Sequence[str],
    processing: TextProcessing,
    max_length: int,
    labels: Sequence[Any] | None = None,
    pairs: Sequence[str] | None = None,
) -> Any:
    """What the tokenizer makes of texts, or of pairs, cut at the longest length allowed.

    Raises:
        DataError: A text without a token; its label is named where there is one.
    """
    length = allowed_length(processing, max_length)
    both = (list(texts),) if pairs is None else (list(texts), list(pairs))
    encoded = processing.tokenizer(*both, truncation=True, max_length=length)
    empty = next((i for i, ids in enumerate(encoded["input_ids"]) if not ids), None)
    if empty is not None:
        label = "" if labels is None else f" (label {labels[empty]})"
        raise DataError(
            f"data.text: the text {shortened(repr(texts[empty]))}{label} gives no token; take out "
            "samples without text"
        )
    return encoded


class LabelledTextSplit(EncodedSplit):
    """Texts cut at the longest length allowed, with a label each."""

    def __init__(
        self,
        rows: TextRows,
        processing: TextProcessing,
        class_names: tuple[str, ...],
        max_length: int,
        problem: Problem = "single_label",
    ) -> None:
        encoded = encode(rows.texts, processing, max_length, rows.labels, rows.pairs)
        dtype = torch.int64 if problem == "single_label" else torch.float32
        labels = torch.as_tensor(rows.labels, dtype=dtype)
        if (order := processing.label_order) is not None:
            outputs = torch.tensor(order)
            labels = outputs[labels] if problem == "single_label" else labels[:, outputs.argsort()]
        super().__init__(encoded, processing.tokenizer, {"labels": labels}, class_names)


def windows_of(
    data: OpenData, split: str, processing: Processing
) -> Int64[Tensor, "windows tokens"]:
    """The windows of a split, of those that its texts give.

    Raises:
        DataError: Samples that are no texts, or too little text for one window.
    """
    rows = data.train if split == "train" else data.test
    if not isinstance(rows, TextRows) or not isinstance(processing, TextProcessing):
        raise wrong_kind(data)
    windows = token_windows(rows, processing, data.section.max_length, data.name)
    return windows[data.pick(len(windows), "train" if split == "train" else "test")]


@lru_cache(maxsize=1)  # train and a test split that is held out of it are one stream
def token_windows(
    rows: TextRows, processing: TextProcessing, max_length: int, where: str
) -> Int64[Tensor, "windows tokens"]:
    """All texts as one stream of tokens, cut into windows of ``max_length``.

    Raises:
        DataError: Too little text for one window.
    """
    tokenizer, length = processing.tokenizer, allowed_length(processing, max_length)
    start = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) else []
    body = length - len(start)
    parts: list[Tensor] = []
    for first in range(0, len(rows), _TEXTS_AT_ONCE):
        texts = [
            text + _BETWEEN_TEXTS for text in rows.texts[first : first + _TEXTS_AT_ONCE] if text
        ]
        if texts:
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            parts.append(torch.tensor([token for tokens in encoded for token in tokens]))
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    num_windows = len(stream) // body
    if not num_windows:
        raise DataError(
            f"data.max_length: {where} has {len(stream)} tokens, fewer than one window of "
            f"{length}; "
            "give more text or a smaller data.max_length"
        )
    windows = stream[: num_windows * body].view(num_windows, body)
    return torch.cat(
        [torch.tensor(start, dtype=torch.int64).expand(num_windows, -1), windows], dim=1
    )


def allowed_length(processing: TextProcessing, max_length: int) -> int:
    """``max_length``, or what the model takes at most where that is less (said in a log line)."""
    most = processing.max_positions
    if most is None or max_length <= most:
        return max_length
    log.warning("data.max_length: %d is more than the model takes; using %d", max_length, most)
    return most


def _starts_with_bos(tokenizer: Any) -> bool:
    tokens = tokenizer("a")["input_ids"]
    return (
        bool(tokens) and tokenizer.bos_token_id is not None and tokens[0] == tokenizer.bos_token_id
    )
