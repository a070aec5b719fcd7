"""One vector for each sample, compared with the dense model's by its cosine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sosp_hub.errors import DataError
from sosp_hub.tasks.batches import described
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll
from sosp_hub.tasks.own_outputs import dense_outputs
from sosp_hub.tasks.predictions import Predictions, squared

Pooling = Literal["mean", "pooler"]
"""``mean``: over tokens that are no padding, as sentence-transformers does. ``pooler``: the model's
own vector of the whole sample, or the mean over places where it has none."""


def embedding(outputs: Any, batch: Any, pooling: Pooling) -> Float[Tensor, "samples width"]:
    """The vector of each sample.

    Args:
        outputs: A tensor, or what has a ``last_hidden_state``: (samples, width), (samples, places,
            width), or of images (samples, width, height, width).
        batch: Its ``attention_mask`` says which places count.
        pooling: How.

    Raises:
        DataError: The model returns no such output.
    """
    named = outputs if isinstance(outputs, Mapping) else {}
    pooled, hidden = named.get("pooler_output"), named.get("last_hidden_state")
    if pooling == "pooler" and isinstance(pooled, Tensor):
        return pooled.flatten(1)
    if isinstance(outputs, Tensor):
        hidden = outputs
    if not isinstance(hidden, Tensor) or not 2 <= hidden.ndim <= 4:
        raise DataError(
            f"the model returns {described(outputs)}; an embedding is made of last_hidden_state: "
            "give a model without a head, or write model.task: self"
        )
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4:
        return hidden.mean((2, 3))
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass(frozen=True, eq=False)
class OwnEmbedding:
    """A ``loss_fn``: the mean over samples of ``1 - cos`` to the dense model's embedding.

    Half the squared distance of the vectors at length 1, whose curvature is known.

    Attributes:
        pooling: What the embedding is.
        dense: The model whose embeddings are the targets; None = the model itself, which scores it.
    """

    pooling: Pooling
    dense: nn.Module | None = None

    @property
    def at_minimum(self) -> bool:
        """Whether the gradient of the loss is zero everywhere."""
        return self.dense is None

    def __call__(self, outputs: Any, targets: Any) -> Predictions:
        """The loss of these outputs; of the batch's targets only the inputs are looked at."""
        mine = F.normalize(embedding(outputs, targets, self.pooling), dim=-1)
        aim = mine.detach()
        if self.dense is not None:
            other = embedding(dense_outputs(self.dense, targets), targets, self.pooling)
            aim = F.normalize(other, dim=-1).to(mine.device)
        scale = (mine.shape[1] / 2) ** 0.5  # the mean over the width is then half the sum
        return squared(scale * mine, scale * aim)


def cosine(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean cosine to the dense model's embedding."""
    del batch
    assert loss.predictions is not None  # `OwnEmbedding` is the loss
    away = (loss.predictions.weights * loss.predictions.losses()).sum(1)
    return 1 - away, torch.ones(len(away))


def _collect(model: nn.Module, loss: Loss, batch: Any) -> list[tuple[int, float, Tensor]]:
    """Pair, score and embedding of each text."""
    del model
    assert loss.predictions is not None
    vectors = F.normalize(loss.predictions.values.float().cpu(), dim=-1)
    pairs, scores = batch["labels"].cpu().unbind(1)
    return [
        (int(pair), float(score), vector)
        for pair, score, vector in zip(pairs, scores, vectors, strict=True)
    ]


def _correlation(texts: Sequence[tuple[int, float, Tensor]]) -> float:
    """Of the cosines with the scores, over the pairs both of whose texts are there."""
    from scipy.stats import spearmanr  # scikit-learn brings it

    first: dict[int, Tensor] = {}
    cosines, scores = [], []
    for pair, score, vector in texts:
        if pair in first:
            cosines.append(float(first[pair] @ vector))
            scores.append(score)
        else:
            first[pair] = vector
    if len(set(scores)) < 2 or len(set(cosines)) < 2:
        return float("nan")
    correlation: Any = spearmanr(cosines, scores)
    return float(correlation.statistic)


spearman = OfAll(_collect, _correlation)
"""Rank correlation of the cosines of pairs with the scores that they are given."""
