"""What a model is worth: accuracy, loss, perplexity, each with its standard error."""

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sosp_hub.distributed import process_sum, to_device
from sosp_hub.errors import DataError
from sosp_hub.zoo.loss import batch_loss

_LOSS, _CORRECT, _CLASSES = 0, 1, 2  # rows of the sums; one more for each class


@dataclass(frozen=True)
class Metric:
    """A measured mean.

    Attributes:
        value: The metric.
        n: Samples, or label tokens of a language model, that it is a mean of.
        stderr: Its standard error over samples (texts, of a language model); None for one alone.
    """

    value: float
    n: int
    stderr: float | None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metrics: Sequence[str] = ("accuracy",),
    *,
    class_names: Sequence[str] = (),
) -> dict[str, Metric]:
    """Measures a model on the batches of all processes; each sample counts once.

    Args:
        model: In eval mode while it is measured; its mode is restored.
        batches: This process's batches; processes may have different numbers of them.
        metrics: ``accuracy``, ``loss``, ``perplexity``, ``per_class_accuracy`` (``accuracy/NAME``
            for each class that occurs).
        class_names: Names for ``per_class_accuracy``; the class's number where none is given.

    Raises:
        DataError: No batches at all.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(_CLASSES, 6, dtype=torch.float64)
    try:
        for batch in batches:
            batch = to_device(batch)
            labels = batch["labels"] if isinstance(batch, dict) else batch[1]
            new = _sums(batch_loss(model, batch).logits, labels).cpu()
            sums = new + F.pad(sums, (0, 0, 0, len(new) - len(sums)))
    finally:
        model.train(was_training)
    sums = _over_processes(sums)
    if sums[_LOSS, 0] == 0:
        raise DataError(
            "nothing to evaluate on: the test split gives no batch; raise data.num_test"
        )
    found: dict[str, Metric] = {}
    for name in metrics:
        if name == "per_class_accuracy":
            for label, row in enumerate(sums[_CLASSES:]):
                if row[0]:
                    shown = class_names[label] if label < len(class_names) else str(label)
                    found[f"accuracy/{shown}"] = _ratio(row)
        elif name == "perplexity":
            loss = _ratio(sums[_LOSS])
            value = math.exp(min(loss.value, 700.0))
            found[name] = Metric(value, loss.n, loss.stderr and value * loss.stderr)
        else:
            found[name] = _ratio(sums[{"loss": _LOSS, "accuracy": _CORRECT}[name]])
    return found


@torch.no_grad()
def measure_latency(
    models: Sequence[nn.Module],
    inputs: Any,
    budget_s: float = 2.0,
) -> list[float]:
    """Median seconds of one forward pass of each model.

    The models take turns, so that whatever else the machine does hits all of them alike.

    Args:
        models: On the device of ``inputs``.
        inputs: A tuple of positional tensors or a dict of keyword ones.
        budget_s: About how long all of it may take; each model runs at least five times.
    """
    positional, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else int
    seconds: list[list[float]] = [[] for _ in models]
    began = time.perf_counter()
    while len(seconds[0]) < 8 or time.perf_counter() - began < budget_s:
        for model, mine in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(*positional, **named)
            synchronize()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine[3:]) for mine in seconds]  # the first ones warm up


def _sums(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "..."]
) -> Float[Tensor, "rows 6"]:
    """Samples, sum of x, w, x^2, x w, w^2 of each row, for means sum(x) / sum(w) over samples."""
    if (
        logits.ndim == 3
    ):  # a language model: a sample is a text, its weight the number of its labels
        texts = [_text(row[:-1], label[1:]) for row, label in zip(logits, labels, strict=True)]
        loss, correct, weight = torch.stack(texts, dim=1)
        return torch.stack([_moments(loss, weight), _moments(correct, weight)])
    loss = F.cross_entropy(logits.float(), labels, reduction="none").double()
    correct = (logits.argmax(-1) == labels).double()
    weight = torch.ones_like(loss)
    rows = [_moments(loss, weight), _moments(correct, weight)]
    for label in range(logits.shape[-1]):
        mine = labels == label
        rows.append(_moments(correct[mine], weight[mine]))
    return torch.stack(rows)


def _text(logits: Float[Tensor, "tokens vocabulary"], labels: Int[Tensor, " tokens"]) -> Tensor:
    counted = labels != -100
    logits, labels = logits[counted].float(), labels[counted]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(-1) == labels).sum()
    return torch.stack([loss, correct, counted.sum()]).double()


def _moments(x: Float[Tensor, " samples"], w: Float[Tensor, " samples"]) -> Float[Tensor, " 6"]:
    terms = torch.stack([torch.ones_like(x), x, w, x * x, x * w, w * w])
    return terms.sum(dim=1)


def _over_processes(sums: Float[Tensor, "rows 6"]) -> Float[Tensor, "all_rows 6"]:
    """The sum over processes; one that had no batch does not know the number of classes."""
    had = float(len(sums) > _CLASSES or sums[_LOSS, 0] > 0)
    rows, num = process_sum(torch.tensor([had * len(sums), had], dtype=torch.float64)).tolist()
    num_rows = int(rows / num) if num else len(sums)
    return process_sum(F.pad(sums, (0, 0, 0, num_rows - len(sums))))


def _ratio(row: Float[Tensor, " 6"]) -> Metric:
    """Mean sum(x) / sum(w), with the standard error of a ratio of sums over independent samples."""
    num, x, w, xx, xw, ww = row.tolist()
    mean = x / w if w else math.nan
    if num < 2:
        return Metric(mean, int(w), None)
    variance = max(0.0, xx - 2 * mean * xw + mean * mean * ww) * num / (num - 1)
    return Metric(mean, int(w), math.sqrt(variance) / w if w else None)
