"""What a model is worth: accuracy, loss, perplexity, each with its standard error."""

import difflib
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sosp_hub.callable_module import make_callable
from sosp_hub.compat.accelerate import check_weights
from sosp_hub.compat.torch import is_sharded
from sosp_hub.distributed import process_rows, process_sum, processes_together, to_device
from sosp_hub.errors import DataError
from sosp_hub.modes import (
    as_the_caller,
    check_models,
    evaluating,
    in_own_modes,
    without_autocast,
)
from sosp_hub.recipe.metrics import DIVERGENCE
from sosp_hub.tasks.batches import as_batch, check_batches, in_step
from sosp_hub.tasks.loss import Loss, batch_loss
from sosp_hub.tasks.metrics import ROOTS, Meter, OfAll
from sosp_hub.tasks.predictions import Predictions

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

_OWN = ("accuracy", "loss", "perplexity", "per_class_accuracy")
_LOSS, _CORRECT, _METERS = 0, 1, 2  # rows of the sums; then one for each meter and class
_PARTS = 20  # that a metric of all samples is computed without in turn, for its standard error


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


@in_own_modes
@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    metrics: Sequence[str] = ("accuracy",),
    *,
    class_names: Sequence[str] = (),
    loss_fn: "LossFn | None" = None,
    meters: Mapping[str, Meter | OfAll] = MappingProxyType({}),
) -> dict[str, Metric]:
    """Measures a model on the batches of all processes; each sample counts once.

    Args:
        model: In eval mode while it is measured; afterwards as it was.
        batches: This process's batches; processes may have different numbers of them.
        metrics: ``accuracy``, ``loss``, ``perplexity``, ``per_class_accuracy`` (``accuracy/NAME``
            for each class that occurs).
        class_names: Names for ``per_class_accuracy``; the class's number where none is given.
        meters: What else can be measured, of a task's own.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.

    Raises:
        DataError: No batches at all, or a metric that this loss has not.
        ModelError: Not a module, or one without weights.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> batches = [(torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(4)]
        >>> accuracy = sosp_hub.evaluate(net, batches)["accuracy"]
        >>> accuracy.n, accuracy.stderr < 0.1
        (64, True)
    """
    check_models(model)
    check_weights(model, "evaluate")
    check_batches(batches, "evaluate")
    metrics = _known(metrics, meters)
    of_all, own_meters = dict[str, OfAll](), dict[str, Meter]()
    for name in metrics:
        meter = meters.get(name)
        if isinstance(meter, OfAll):
            of_all[name] = meter
        elif meter is not None:
            own_meters[name] = meter
    used = list(own_meters)
    collected: dict[Any, list[Any]] = {meter.collect: [] for meter in of_all.values()}
    first_class = _METERS + len(used)
    sums = torch.zeros(first_class, 6, dtype=torch.float64)
    with evaluating(model), without_autocast(model):
        for batch, counts in _passes(model, as_the_caller(batches)):
            batch = to_device(as_batch(batch))
            loss = batch_loss(model, batch, loss_fn)
            if not counts:
                continue
            own = [_moments_of(*meter(loss, batch)) for meter in own_meters.values()]
            for collect, samples in collected.items():
                samples.extend(collect(model, loss, batch))
            rows = _sums(loss).cpu()
            new = torch.cat([rows[:_METERS], *own, rows[_METERS:]])
            num_rows = max(len(new), len(sums))  # a batch without a label knows no class
            sums = _padded(new, num_rows) + _padded(sums, num_rows)
    sums = _over_processes(sums)
    if sums[_LOSS, 0] == 0:
        raise DataError(
            "nothing to evaluate on: there is no batch, or none with a label that counts (-100 "
            "stands for none); in a recipe raise data.num_test"
        )
    together = {collect: processes_together(samples) for collect, samples in collected.items()}
    metrics_by_name: dict[str, Metric] = {}
    for name in metrics:
        if name == "per_class_accuracy":
            if not sums[first_class:, 0].any():
                raise DataError(
                    f"evaluate.metrics: {name} needs samples that are of one class each, and the "
                    "loss of this model reads none of its outputs as such; write accuracy or loss"
                )
            for label, row in enumerate(sums[first_class:]):
                if row[0]:
                    shown = class_names[label] if label < len(class_names) else str(label)
                    if class_names.count(shown) > 1:  # as two classes of ImageNet are cranes
                        shown = f"{shown} ({label})"
                    metrics_by_name[f"accuracy/{shown}"] = _ratio(row)
        elif name == "perplexity":
            loss = _ratio(sums[_LOSS])
            value = math.exp(min(loss.value, 700.0))
            metrics_by_name[name] = Metric(value, loss.n, loss.stderr and value * loss.stderr)
        elif name in of_all:
            metrics_by_name[name] = _of_all(of_all[name], together[of_all[name].collect])
        elif name in used:
            ratio = _ratio(sums[_METERS + used.index(name)])
            if name in ROOTS:
                value, slope = ROOTS[name](ratio.value)
                ratio = Metric(value, ratio.n, ratio.stderr and slope * ratio.stderr)
            metrics_by_name[name] = ratio
        else:
            row = sums[{"loss": _LOSS, "accuracy": _CORRECT}[name]]
            if not row[0]:
                raise DataError(
                    f"evaluate.metrics: {name} counts classes, and the loss of this model reads "
                    "none of its outputs as such; write loss"
                )
            metrics_by_name[name] = _ratio(row)
    return metrics_by_name


def _passes(model: nn.Module, batches: Iterable[Any]) -> Iterable[tuple[Any, bool]]:
    """The batches, all of which count; where weights are sharded, as many on every process."""
    if not is_sharded(model):
        return ((batch, True) for batch in batches)
    nothing = DataError(
        "a process has nothing to evaluate on, and all have to go through sharded weights (FSDP2) "
        "together: give each at least one batch"
    )
    return in_step(batches, process_sum, nothing)


def _known(metrics: Sequence[str], meters: Mapping[str, Any]) -> Sequence[str]:
    """The metrics, if each can be measured.

    Raises:
        DataError: One that cannot; names the nearest.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    known = [*_OWN, *meters]
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(f"no metric {name!r}{hint}; there are {', '.join(known)}")
    return metrics


@torch.no_grad()
def metrics_of_samples(
    model: nn.Module,
    batches: Iterable[Any],
    metrics: Sequence[str],
    *,
    loss_fn: "LossFn | None" = None,
    meters: Mapping[str, Meter | OfAll] = MappingProxyType({}),
    dense: nn.Module | None = None,
) -> dict[str, Float[Tensor, "samples 2"]]:
    """What each sample counts and weighs: a metric is the one sum over the other.

    Samples of all processes, in an order that depends on the batches alone, so that two models can
    be compared sample by sample. Of ``perplexity`` it is the loss, of root mean squares the square.

    Args:
        model: In eval mode while it is measured; afterwards as it was.
        batches: This process's batches.
        metrics: As for `evaluate`, without ``per_class_accuracy``; also ``divergence`` from the
            outputs of ``dense``.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        meters: What else can be measured, of a task's own.
        dense: The dense model, for ``divergence``.

    Raises:
        DataError: No batches at all, or a metric that this loss has not.
    """
    for name in metrics:
        if isinstance(meters.get(name), OfAll):
            raise DataError(f"{name}: is of all samples together, and no mean over them")
    rows: dict[str, list[Tensor]] = {name: [] for name in metrics}
    with evaluating(model, *([] if dense is None else [dense])), without_autocast(model):
        for batch in batches:
            batch = to_device(as_batch(batch))
            loss = batch_loss(model, batch, loss_fn)
            for name in metrics:
                meter = meters.get(name)
                if meter is not None and not isinstance(meter, OfAll):
                    pair = meter(loss, batch)
                elif name == DIVERGENCE:
                    assert dense is not None
                    pair = _divergences(loss, batch_loss(dense, batch, loss_fn))
                else:
                    pair = _pair(loss, name)
                rows[name].append(torch.stack([x.double().cpu() for x in pair], dim=1))
    found = {
        name: process_rows(torch.cat(parts) if parts else torch.zeros(0, 2, dtype=torch.float64))
        for name, parts in rows.items()
    }
    if any(not len(pairs) for pairs in found.values()):
        raise DataError("nothing to measure on: the data gives no batch")
    return found


def measure_latency(
    models: Sequence[nn.Module],
    inputs: Any,
    budget_s: float = 2.0,
) -> list[float]:
    """Median seconds of one forward pass of each model; arguments as for `time_passes`."""
    return [statistics.median(mine) for mine in time_passes(models, inputs, budget_s)]


@torch.no_grad()
def time_passes(
    models: Sequence[nn.Module], inputs: Any, budget_s: float = 2.0
) -> list[list[float]]:
    """Seconds of forward passes of each model.

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
    return [mine[3:] for mine in seconds]  # the first ones warm up


def _of_all(meter: OfAll, samples: Sequence[Any]) -> Metric:
    """With the standard error of a jackknife that leaves out a twentieth of the samples in turn."""
    value, num = meter.value(samples), min(_PARTS, len(samples))
    if num < 2:
        return Metric(value, len(samples), None)
    without = [
        meter.value([sample for i, sample in enumerate(samples) if i % num != part])
        for part in range(num)
    ]
    spread = (num - 1) * statistics.pvariance(without)
    return Metric(value, len(samples), math.sqrt(spread) if math.isfinite(spread) else None)


def _sums(loss: Loss) -> Float[Tensor, "rows 6"]:
    """Samples, sum of x, w, x^2, x w, w^2 of each row, for means sum(x) / sum(w) over samples.

    Rows are the loss, what is right, and where a sample is of one class, what is right of each. A
    sample's weight is that of its places: of the tokens, say, that have a label.
    """
    read = loss.predictions
    if read is None:  # one number a batch, with the spread of batches
        weight = torch.tensor([float(loss.weight)], dtype=torch.float64)
        value = loss.value.double().cpu().view(1) * weight
        return torch.stack([_moments(value, weight), torch.zeros(6, dtype=torch.float64)])
    rows = [_moments(*_losses(read))]
    if read.form == "squared":
        return torch.stack([*rows, torch.zeros_like(rows[0])])
    right, weights = _correct(read)
    rows.append(_moments(right, weights))
    if read.form == "softmax" and read.weights.shape[1] == 1:
        labels = _labels(read)[:, 0]
        for label in range(read.values.shape[-1]):
            mine = labels == label
            rows.append(_moments(right[mine], weights[mine]))
    return torch.stack(rows)


def _losses(read: Predictions) -> tuple[Float[Tensor, " samples"], Float[Tensor, " samples"]]:
    """Summed losses and weight of each sample."""
    weights = read.weights.double()
    losses = torch.where(weights != 0, weights * read.losses().double(), 0.0)
    return losses.sum(1), weights.sum(1)


def _correct(read: Predictions) -> tuple[Float[Tensor, " samples"], Float[Tensor, " samples"]]:
    """What is predicted right of each sample, and its weight."""
    if read.form == "sigmoid":
        right = (read.values > 0) == (read.targets > 0.5)
    else:
        right = read.values.argmax(-1) == _labels(read)
        right &= ~read.values.isnan().any(-1)  # of these argmax takes the first
    return (right * read.weights.double()).sum(1), read.weights.double().sum(1)


def _labels(read: Predictions) -> Tensor:
    return read.targets.argmax(-1) if read.targets.is_floating_point() else read.targets


def _pair(loss: Loss, name: str) -> tuple[Tensor, Tensor]:
    """Counts and weights of loss, perplexity or accuracy of each sample."""
    read = loss.predictions
    if read is None or (name == "accuracy" and read.form == "squared"):
        raise DataError(
            f"{name}: it has to be known for each sample, and what this loss reads of the outputs "
            "is not known; give a loss_fn that returns sosp_hub.tasks.softmax(logits, labels), "
            "sigmoid(...) or squared(...)"
        )
    return _correct(read) if name == "accuracy" else _losses(read)


def _divergences(loss: Loss, dense: Loss) -> tuple[Tensor, Tensor]:
    if loss.predictions is None or dense.predictions is None:
        raise DataError(
            "divergence: what this loss reads of the outputs is not known; give a loss_fn that "
            "returns sosp_hub.tasks.softmax(logits, labels), sigmoid(...) or squared(...)"
        )
    weights = loss.predictions.weights.double()
    each = loss.predictions.divergences(dense.predictions).double()
    return (weights * each).sum(1), weights.sum(1)


def _moments_of(x: Tensor, w: Tensor) -> Float[Tensor, "1 6"]:
    return _moments(x.double().cpu(), w.double().cpu()).unsqueeze(0)


def _moments(x: Float[Tensor, " samples"], w: Float[Tensor, " samples"]) -> Float[Tensor, " 6"]:
    terms = torch.stack([(w != 0).to(x), x, w, x * x, x * w, w * w])
    return terms.sum(dim=1)


def _over_processes(sums: Float[Tensor, "rows 6"]) -> Float[Tensor, "all_rows 6"]:
    """The sum over processes; one without a label does not know the number of classes."""
    return process_sum(_padded(sums, max(processes_together([len(sums)]))))


def _padded(rows: Float[Tensor, "rows 6"], num: int) -> Float[Tensor, "num 6"]:
    return F.pad(rows, (0, 0, 0, num - len(rows)))


def _ratio(row: Float[Tensor, " 6"]) -> Metric:
    """Mean sum(x) / sum(w), with the standard error of a ratio of sums over independent samples."""
    num, x, w, xx, xw, ww = row.tolist()
    mean = x / w if w else math.nan
    if num < 2:
        return Metric(mean, int(w), None)
    squares = xx - 2 * mean * xw + mean * mean * ww
    variance = (0.0 if squares < 0 else squares) * num / (num - 1)
    return Metric(mean, int(w), math.sqrt(variance) / w if w else None)


make_callable(__name__, evaluate)
