"""Losses whose curvature is known: torch's own, and what models return as their own loss."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sosp_hub.errors import DataError
from sosp_hub.tasks.predictions import (
    IGNORED,
    Predictions,
    check_same_shape,
    sigmoid,
    softmax,
    squared,
)

# torch's own ----------------------------------------------------------------------------------

_OF_MODULES: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    nn.NLLLoss: (F.nll_loss, ("weight", "ignore_index")),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    nn.BCELoss: (F.binary_cross_entropy, ("weight",)),
    nn.MSELoss: (F.mse_loss, ()),
}


def torch_loss(loss_fn: Any) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """The function of ``torch.nn.functional`` that a loss is, and its options.

    A module is one of its class alone: a subclass may compute something else.
    """
    options: dict[str, Any] = {}
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        loss_fn, options = loss_fn.func, dict(loss_fn.keywords)
    kind: Any = type(loss_fn)
    if kind in _OF_MODULES:
        function, names = _OF_MODULES[kind]
        own = {name: getattr(loss_fn, name) for name in (*names, "reduction")}
        return function, own
    try:
        return (loss_fn, options) if loss_fn in _FORMS else None
    except TypeError:  # cannot be hashed
        return None


def check_reduction(options: Mapping[str, Any]) -> None:
    """Refuses a loss that is no mean: its size would depend on that of the batch."""
    if options.get("reduction", "mean") != "mean":
        raise DataError(
            f"the loss has reduction={options['reduction']!r}; expected 'mean', the default of "
            "torch's losses, so that batches of all sizes count alike"
        )


def predictions_of(
    function: Callable[..., Tensor], outputs: Tensor, targets: Tensor, options: Mapping[str, Any]
) -> Predictions | None:
    """What a function of ``torch.nn.functional`` reads of the outputs; None where not known.

    Raises:
        DataError: Outputs and targets that do not fit each other.
    """
    known = inspect.signature(_FORMS[function]).parameters
    rest = {name: value for name, value in options.items() if value not in (None, "mean")}
    if rest.keys() - known.keys():
        return None
    return _FORMS[function](outputs, targets, **rest)


def _cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
) -> Predictions | None:
    logits, probable = _classes_last(outputs, targets)
    if probable is not None:
        return None if weight is not None else softmax(logits, _smooth(probable, label_smoothing))
    if weight is not None and label_smoothing:
        return None  # each class then counts otherwise
    counted = targets.clamp(min=0, max=logits.shape[-1] - 1)
    found = softmax(
        logits,
        targets,
        weights=None if weight is None else weight.to(logits.device)[counted],
        ignore_index=ignore_index,
    )
    if label_smoothing:
        classes = logits.shape[-1]
        whole = F.one_hot(found.targets, classes).to(logits.dtype)
        smooth = _smooth(whole, label_smoothing)
        return Predictions(found.form, found.values, smooth, found.weights, found.weight)
    return found


def _smooth(targets: Tensor, smoothing: float) -> Tensor:
    return targets * (1 - smoothing) + smoothing / targets.shape[-1]


def _nll_loss(
    outputs: Tensor, targets: Tensor, weight: Tensor | None = None, ignore_index: int = IGNORED
) -> Predictions | None:
    if not (outputs.detach().double().exp().sum(1) - 1).abs().max() < 1e-3:
        raise DataError(
            "nll_loss takes log-probabilities, and the exponentials of the model's outputs do not "
            "sum to 1; write loss_fn=torch.nn.functional.cross_entropy for plain logits"
        )
    return _cross_entropy(outputs, targets, weight, ignore_index)


def _with_logits(
    outputs: Tensor, targets: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Predictions:
    check_same_shape(outputs, targets)
    if pos_weight is not None:
        positive = targets * pos_weight.to(targets) + 1 - targets
        weight = positive if weight is None else positive * weight.to(targets)
    return sigmoid(outputs, targets, weights=weight)


def _of_probabilities(
    outputs: Tensor, targets: Tensor, weight: Tensor | None = None
) -> Predictions:
    check_same_shape(outputs, targets)
    if not ((outputs >= 0) & (outputs <= 1)).all():
        raise DataError(
            "binary_cross_entropy takes probabilities, and the model's outputs leave 0 to 1; write "
            "loss_fn=torch.nn.functional.binary_cross_entropy_with_logits for plain logits"
        )
    return sigmoid(outputs.logit(torch.finfo(outputs.dtype).eps), targets, weights=weight)


_FORMS: dict[Callable[..., Any], Callable[..., Predictions | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.binary_cross_entropy_with_logits: _with_logits,
    F.binary_cross_entropy: _of_probabilities,
    F.mse_loss: squared,
}


def _classes_last(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits with the classes last, and so the targets where they are probabilities."""
    if outputs.ndim < 2:
        raise DataError(
            f"outputs of shape {list(outputs.shape)} have no classes; expected (samples, classes). "
            "For one number a sample write loss_fn=torch.nn.functional.mse_loss or "
            "binary_cross_entropy_with_logits"
        )
    if len(targets) != len(outputs):
        raise DataError(
            f"a batch has {len(targets)} labels for {len(outputs)} outputs of the model"
        )
    logits = outputs.movedim(1, -1)
    if targets.is_floating_point():
        shown = targets.movedim(1, -1) if targets.ndim == outputs.ndim else targets
        return logits, shown
    return logits, None


# Models' own ----------------------------------------------------------------------------------


def own_forms(
    outputs: Any, batch: Mapping[str, Any], ignored: int
) -> Iterator[tuple[str, Callable[[], Predictions]]]:
    """What a model's own loss may be, by the names of outputs and labels: name and how to read it.

    Which of them it is its value tells.

    Args:
        outputs: With ``logits``, or ``start_logits`` and ``end_logits``.
        batch: With ``labels``, or ``start_positions`` and ``end_positions``.
        ignored: Label of pixels that do not count.
    """
    logits, labels = _named(outputs, "logits"), batch.get("labels")
    if isinstance(logits, Tensor) and isinstance(labels, Tensor):
        if labels.is_floating_point():
            if logits.shape == labels.shape:
                yield "sigmoid", lambda: sigmoid(logits, labels)
                yield "squared", lambda: squared(logits, labels)
            elif logits.squeeze(-1).shape == labels.shape:
                yield "squared, one output", lambda: squared(logits.squeeze(-1), labels)
        elif logits.shape[:-1] == labels.shape and logits.shape[-1] > 1:
            yield "places", lambda: softmax(logits, labels)
            if labels.ndim == 2:
                yield "next token", lambda: next_token(outputs, batch)
        elif logits.squeeze(-1).shape == labels.shape:
            yield "squared, one output", lambda: squared(logits.squeeze(-1), labels.to(logits))
        elif logits.ndim == 4 and labels.ndim == 3:
            yield "pixels", lambda: pixels(logits, labels, ignored)
    forecast, future = _named(outputs, "prediction_outputs"), batch.get("future_values")
    if isinstance(forecast, Tensor) and isinstance(future, Tensor):
        yield "squared", lambda: squared(forecast, future)
    if _named(outputs, "start_logits") is not None and "start_positions" in batch:
        yield "spans", lambda: spans(outputs, batch)


def next_token(outputs: Any, targets: Any) -> Predictions:
    """The cross-entropy of each token by the logits of the one before it.

    A ``loss_fn``: outputs are logits, or hold them under ``logits``; targets are the tokens, or
    hold them under ``labels``.
    """
    logits = outputs if isinstance(outputs, Tensor) else _named(outputs, "logits")
    labels = targets if isinstance(targets, Tensor) else targets["labels"]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or labels.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
        raise DataError(
            f"next_token: outputs are {shape} and labels {list(labels.shape)}; expected (samples, "
            "tokens, vocabulary) and (samples, tokens)"
        )
    return softmax(logits[:, :-1], labels[:, 1:])


def spans(outputs: Any, targets: Any) -> Predictions:
    """The mean of the cross-entropies of where an answer starts and where it ends."""
    both = ((_named(outputs, f"{end}_logits"), targets[f"{end}_positions"]) for end in _ENDS)
    ends = []
    for logits, positions in both:
        length = logits.shape[1]
        ends.append((logits, positions.view(len(logits)).clamp(0, length)))
    logits, labels = (torch.stack(parts, 1) for parts in zip(*ends, strict=True))
    counts = (labels != logits.shape[-1]).sum(0)
    found = softmax(logits, labels, ignore_index=logits.shape[-1])
    weight = max(int(counts.max()), 1)
    scale = weight / (2 * counts.clamp(min=1))  # each end is a mean of its own
    return Predictions(
        found.form, found.values, found.targets, found.weights * scale, weight * bool(counts.sum())
    )


_ENDS = "start", "end"


def pixels(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Predictions:
    """Softmax cross-entropy of each pixel; logits of fewer pixels are first made as many."""
    whole = logits
    if logits.shape[-2:] != labels.shape[-2:]:
        whole = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return softmax(whole.movedim(1, -1), labels, ignore_index=ignore_index)


def _named(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
