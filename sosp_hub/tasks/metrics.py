"""Metrics as ratios of sums over samples, so that each has a standard error; and those of all.

A meter gives for each sample of a batch what it counts and how much it weighs; the metric is the
sum of the one over the sum of the other, over all samples of all processes. What is no such ratio
(a rank correlation, an average precision) is computed of all samples together (`OfAll`).
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.errors import DataError
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.predictions import Form, Predictions

Meter = Callable[[Loss, Any], tuple[Tensor, Tensor]]
"""From a batch's loss, and the batch, to counts and weights, one each for every sample."""


@dataclass(frozen=True)
class OfAll:
    """A metric of all samples together, which is no mean over them.

    Attributes:
        collect: From model, loss and batch to one entry for each sample. Metrics that share it are
            of the same entries: it is called once for all.
        value: From the entries of all samples to the metric; also of some of them, for the
            standard error.
    """

    collect: Callable[[nn.Module, Loss, Any], Sequence[Any]]
    value: Callable[[Sequence[Any]], float]


LIBRARIES: Mapping[str, str] = {
    "span_f1": "seqeval.metrics.sequence_labeling",
    **dict.fromkeys(("bleu", "chrf"), "sacrebleu"),
    **dict.fromkeys(("rouge_1", "rouge_2", "rouge_l"), "torchmetrics.functional.text"),
}
"""Modules of the libraries that compute a metric; the package's extra ``metrics`` brings them."""


def library_of(metric: str) -> Any:
    """The module that computes a metric.

    Raises:
        DataError: It is not installed.
    """
    module = LIBRARIES[metric]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"evaluate.metrics: {metric} needs {module.partition('.')[0]}; "
            "pip install 'sosp_hub[metrics]', or write another metric"
        ) from error


ROOTS: Mapping[str, Callable[[float], tuple[float, float]]] = {
    "root_mean_squared_error": lambda mean: (math.sqrt(mean), 0.5 / math.sqrt(mean or 1.0)),
}
"""Metrics that are functions of a ratio: value and slope."""


_FORMS = {"softmax": "one class each", "sigmoid": "several labels each", "squared": "numbers"}


def _said(form: Form) -> str:
    return f"{form} ({_FORMS[form]})"


def _read(loss: Loss, form: Form | None, metric: str) -> Predictions:
    if loss.predictions is None or form not in (None, loss.predictions.form):
        found = (
            "nothing that is known" if loss.predictions is None else _said(loss.predictions.form)
        )
        counts = loss.predictions is not None and loss.predictions.form != "squared"
        raise DataError(
            f"evaluate.metrics: {metric} needs outputs that the loss reads as "
            f"{_said(form) if form else 'some form'}; it reads {found}. Write "
            f"{'accuracy or loss' if counts else 'loss'}"
        )
    return loss.predictions


def divergence(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The loss without the least that it can be: KL divergence, or squared distance."""
    del batch
    read = _read(loss, None, "divergence")
    fine = replace(read, values=read.values.double(), targets=read.targets.double())
    least = replace(fine, values=_logits_of(fine)).losses() if read.form != "squared" else 0.0
    weights = read.weights.double()
    each = torch.where(weights != 0, weights * (fine.losses() - least), 0.0)
    return each.sum(1), weights.sum(1)


def _logits_of(read: Predictions) -> Tensor:
    """Outputs that say just what the targets say."""
    targets = read.targets.clamp(min=1e-30)
    return targets.log() if read.form == "softmax" else targets.logit(1e-12)


def agreement(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """How often the likeliest class is the target's, or yes is yes."""
    del batch
    read = _read(loss, None, "agreement")
    if read.form == "squared":
        raise DataError(
            "evaluate.metrics: agreement counts classes, and these outputs are numbers; write "
            "divergence"
        )
    if read.form == "softmax":
        same = read.values.argmax(-1) == read.targets.argmax(-1)
    else:
        same = (read.values > 0) == (read.targets > 0.5)
    return (same * read.weights).sum(1), read.weights.sum(1)


def f1_of_labels(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """Twice the labels that are rightly found, over those found plus those there (micro F1)."""
    del batch
    read = _read(loss, "sigmoid", "f1")
    found, there = read.values > 0, read.targets > 0.5
    return 2 * (found & there).sum(1), found.sum(1) + there.sum(1)


def absolute_error(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean distance from the target."""
    del batch
    read = _read(loss, "squared", "mean_absolute_error")
    return (read.weights * (read.values - read.targets).abs()).sum(1), torch.ones(len(read.values))


def squared_error(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean squared distance from the target."""
    del batch
    read = _read(loss, "squared", "root_mean_squared_error")
    return (read.weights * read.losses()).sum(1), torch.ones(len(read.values))


def f1_of_spans(class_names: Sequence[str]) -> Meter:
    """Spans rightly found in both ends and type (CoNLL 2003), by seqeval; twice over found + there.

    Args:
        class_names: Tags such as ``B-PER``; tags without a prefix are spans of one type each.
    """

    def meter(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
        del batch
        get_entities = library_of("span_f1").get_entities
        read = _read(loss, "softmax", "span_f1")
        counts, weights = [], []
        rows = zip(read.values.argmax(-1), read.targets, read.weights != 0, strict=True)
        for predicted, labels, counted in rows:
            found, there = (
                set(get_entities([class_names[i] for i in tags[counted].tolist()]))
                for tags in (predicted, labels)
            )
            counts.append(2.0 * len(found & there))
            weights.append(float(len(found) + len(there)))
        return torch.tensor(counts), torch.tensor(weights)

    return meter


def exact_span(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """Whether both ends of an answer are right."""
    del batch
    read = _read(loss, "softmax", "exact_match")
    right = (read.values.argmax(-1) == read.targets).all(1)
    return right.double(), torch.ones(len(right))


def whole_answers(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """Whether every place that counts is right."""
    del batch
    read = _read(loss, "softmax", "exact_match")
    right = (read.values.argmax(-1) == read.targets) | (read.weights == 0)
    return right.all(1).double(), torch.ones(len(right))


def f1_of_answers(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean over samples of the F1 of the tokens between the two ends."""
    del batch
    read = _read(loss, "softmax", "f1")
    scores = []
    for (start, end), (first, last) in zip(
        read.values.argmax(-1).tolist(), read.targets.tolist(), strict=True
    ):
        shared = max(0, min(end, last) - max(start, first) + 1)
        total = max(0, end - start + 1) + (last - first + 1)
        scores.append(2 * shared / total)
    return torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores))
