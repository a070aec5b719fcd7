"""The loss of a batch, the same for scoring, training, evaluation and distillation."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import Dropout, RunningNorm, unwrapped
from sosp_hub.errors import DataError
from sosp_hub.tasks.batches import check_batch, described, is_listed, num_samples, tensors
from sosp_hub.tasks.predictions import IGNORED, Predictions, check_classes, softmax, whole
from sosp_hub.tasks.recognised import check_reduction, own_forms, predictions_of, torch_loss

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

log = logging.getLogger(__name__)


class Loss(NamedTuple):
    """The mean loss of a batch, how much it weighs, and what it reads of the outputs.

    Attributes:
        value: Mean over what counts. Scalar.
        weight: What was averaged: samples, or the tokens or pixels that have a label.
        outputs: What the model returned.
        predictions: What the loss reads of the outputs, which says its curvature; None where that
            is not known.
    """

    value: Tensor
    weight: float
    outputs: Any
    predictions: Predictions | None


def batch_loss(model: nn.Module, batch: Any, loss_fn: "LossFn | None" = None) -> Loss:
    """Runs ``model`` on ``(inputs, targets)``, or on a dict as a transformers model takes it.

    Without ``loss_fn`` it is the model's own loss where it returns one, else cross-entropy of
    ``(samples, classes)``. A model that takes ``targets`` and returns a dict of losses in training
    mode, as torchvision's detectors do, has their sum as its own. A ``loss_fn(outputs, targets)``
    gets the outputs as the model returned them and the targets as the batch has them: its second
    element, or the whole dict. It returns the mean over the samples, or ``(mean, weight)``, or
    ``Predictions``. torch's own losses are given the logits and the labels alone. Images take the
    dtype of the model's weights; a generating model is told ``use_cache=False``.

    Raises:
        DataError: A batch of another form, targets that do not fit the outputs, a loss that is no
            number, or no loss at all.
    """
    batch = check_batch(batch, targets=not getattr(loss_fn, "at_minimum", False))
    if loss_fn is None and isinstance(batch, Mapping):
        batch = _with_classes(batch)
        _check_for_own_loss(model, batch)
    if loss_fn is None and not isinstance(batch, Mapping) and _takes_targets(model):
        outputs = _with_targets(model, batch)
        if _are_losses(outputs):
            value = torch.stack([each.reshape(()) for each in outputs.values()]).sum()
            return Loss(value, num_samples(batch), outputs, None)
    outputs = forward(model, batch, with_targets=loss_fn is None)
    if loss_fn is not None:
        return _given(outputs, batch, loss_fn)
    own = getattr(outputs, "loss", None)
    if own is None and isinstance(outputs, Mapping):
        own = outputs.get("loss")
    if isinstance(own, Tensor):
        return _own(model, outputs, batch, own)
    predictions = _default(outputs, batch)
    return Loss(predictions.value(), predictions.weight, outputs, predictions)


def forward(model: nn.Module, batch: Any, *, with_targets: bool = False) -> Any:
    """What the model returns for the inputs of a batch.

    Args:
        model: The model.
        batch: ``(inputs, targets)``, or a dict. Inputs are a tensor, several, or a dict.
        with_targets: Whether a dict's labels are given to the model, which may need them for its
            own loss. An encoder-decoder gets them always: it makes its inputs of them.

    Raises:
        DataError: A batch of another form.
    """
    batch = check_batch(batch)
    if isinstance(batch, Mapping):
        named = dict(batch)
        if not with_targets:
            if not _reads_labels(model):
                named.pop("labels", None)
            named = _accepted(model, named)
        elif "labels" not in (accepted := _accepted(model, named)):
            unread = named.keys() - accepted.keys() - {"labels"}
            if strange := [name for name in unread if any(True for _ in tensors(named[name]))]:
                raise DataError(
                    f"a batch is a dict of {', '.join(batch)}; {type(unwrapped(model)).__name__} "
                    f"takes no {', '.join(sorted(strange))}. Take it out, or give a loss_fn that "
                    "reads it"
                )
            named = accepted
        return _run(model, (), named)
    if isinstance(batch[0], Mapping):
        return _run(model, (), dict(batch[0]))
    return _run(model, _positional(batch), {})


def _positional(batch: Any) -> tuple[Any, ...]:
    """The arguments of a call: several inputs, or one, which may be a list with a sample each."""
    inputs = batch[0]
    if is_listed(batch):
        return (list(inputs),)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _run(model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if named and _generates(model):
        named.setdefault("use_cache", False)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        positional, named = _cast(positional, dtype), _cast(named, dtype)
    return model(*positional, **named)


# What the caller gives --------------------------------------------------------------------------


def _given(outputs: Any, batch: Any, loss_fn: "LossFn") -> Loss:
    targets = batch if isinstance(batch, Mapping) else batch[1]
    known = torch_loss(loss_fn)
    if known is not None:
        function, options = known
        check_reduction(options)
        logits, labels = _tensors_for(function, outputs, targets)
        predictions = predictions_of(function, logits, labels, options)
        value = function(logits, labels, **options)
        weight = num_samples(batch) if predictions is None else predictions.weight
        return Loss(value, weight, outputs, predictions)
    shown = f"outputs: {described(outputs)}; targets: {described(targets)}"
    try:
        result = loss_fn(outputs, targets)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"loss_fn(outputs, targets) failed with {type(error).__name__}: {error}. It was given "
            f"the outputs as the model returned them and the targets as the batch has them: {shown}"
        ) from error
    except (RuntimeError, ValueError) as error:
        error.add_note(f"loss_fn(outputs, targets) was given {shown}")
        raise
    if isinstance(result, Predictions):
        return Loss(result.value(), result.weight, outputs, result)
    weight: float = num_samples(batch)
    if isinstance(result, tuple) and len(result) == 2:
        result, weight = result[0], whole(float(result[1]))
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise DataError(
            f"loss_fn(outputs, targets) returned {described(result)}; expected one number, the "
            "mean over the samples, or (mean, how many were averaged)"
        )
    return Loss(result.reshape(()), weight, outputs, None)


def _tensors_for(function: Callable[..., Any], outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The logits and the labels, which is all that torch's own losses can take."""
    logits = outputs if isinstance(outputs, Tensor) else _value(outputs, "logits")
    labels = targets if isinstance(targets, Tensor) else _value(targets, "labels")
    for found, what, of in ((logits, "logits", outputs), (labels, "labels", targets)):
        if not isinstance(found, Tensor):
            raise DataError(
                f"loss_fn={getattr(function, '__name__', function)} takes two tensors, and there "
                f"is no {what!r} in {described(of)}. Write the loss, for example\n{EXAMPLE}"
            )
    return logits, labels


EXAMPLE = """\
    def loss_fn(outputs, targets):  # as the model returns them, as the batch has them
        return torch.nn.functional.cross_entropy(outputs, targets)
    sosp_hub.score(model, graph, batches, loss_fn=loss_fn)"""


# What the model computes itself -----------------------------------------------------------------

_FORM_OF: "WeakKeyDictionary[nn.Module, dict[Any, str | None]]" = WeakKeyDictionary()
"""Which form the own loss of a model has, as its first batch told."""


def _own(model: nn.Module, outputs: Any, batch: Any, own: Tensor) -> Loss:
    batch = batch if isinstance(batch, Mapping) else {}
    labels = batch.get("labels")
    config = getattr(unwrapped(model), "config", None)
    ignored = getattr(config, "semantic_loss_ignore_index", 255)
    forms = dict(own_forms(outputs, batch, ignored))
    known, key = _FORM_OF.setdefault(model, {}), (*sorted(batch), *forms)
    if isinstance(labels, Tensor) and labels.numel() and bool((labels == IGNORED).all()):
        name = known[key] if key in known else _nearest(forms, own.detach())[0]
        predictions = None if name is None else forms[name]()
        value = _nothing(outputs, own) if predictions is None else predictions.value()
        return Loss(value, 0, outputs, predictions)  # theirs is 0 / 0
    if key in known:
        name = known[key]
        predictions = forms[name]() if name is not None else None
    else:
        name, predictions = _nearest(forms, own.detach())
        if own.isfinite() and (predictions is None or predictions.weight):
            known[key] = name
            if name is None and forms:
                log.info(
                    "the loss of %s is not one of %s; its curvature is unknown",
                    type(unwrapped(model)).__name__,
                    ", ".join(forms),
                )
    weight = num_samples(batch) if predictions is None else predictions.weight
    return Loss(own.reshape(()) if own.numel() == 1 else own.mean(), weight, outputs, predictions)


def _nothing(outputs: Any, own: Tensor) -> Tensor:
    """A loss of 0 with a gradient of 0."""
    logits = _value(outputs, "logits")
    of = logits if isinstance(logits, Tensor) else own
    return of.masked_fill(torch.ones_like(of, dtype=torch.bool), 0.0).sum()


@torch.no_grad()
def _nearest(
    forms: Mapping[str, Callable[[], Predictions]], own: Tensor
) -> tuple[str | None, Predictions | None]:
    """The form whose value is that of the own loss, but for rounding."""
    tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) else 4 * _eps(own)
    best, found = math.inf, None
    for name in forms:
        try:
            predictions = forms[name]()
        except DataError:  # the model reads its labels otherwise
            continue
        value = predictions.value().item()
        if math.isnan(own.item()) and not predictions.weight:
            return name, predictions
        distance = abs(value - own.item()) / max(abs(own.item()), 1e-3)
        if distance < min(best, tolerance):
            best, found = distance, name
    if found is None:
        return None, None
    with torch.enable_grad():
        return found, forms[found]()


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _with_classes(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Labels that are whole numbers as torch's losses take them."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int8, torch.int16, torch.int32):
        return batch
    return {**batch, "labels": labels.long()}


def _check_for_own_loss(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """What a transformers model that computes its own loss does not say, or not in clear words."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return
    bare = unwrapped(model)
    config, num_classes = getattr(bare, "config", None), None
    others = (value for name, value in batch.items() if name != "labels")
    sizes = {len(v) for v in others if isinstance(v, Tensor) and v.ndim}
    if sizes and labels.ndim and len(labels) not in sizes:
        raise DataError(f"a batch has {len(labels)} labels for {min(sizes)} inputs of the model")
    if not labels.is_floating_point() and config is not None:
        if _generates(model) and hasattr(config, "get_text_config"):
            num_classes = getattr(config.get_text_config(), "vocab_size", None)
        elif type(bare).__name__.endswith("Classification"):  # others have `num_labels` too
            num_classes = getattr(config, "num_labels", None)
        if num_classes is not None and num_classes > 1:  # one output is a regression
            check_classes(labels, num_classes)


# Detectors of torchvision ------------------------------------------------------------------------


def _takes_targets(model: nn.Module) -> bool:
    return "targets" in inspect.signature(unwrapped(model).forward).parameters


def _with_targets(model: nn.Module, batch: Any) -> Any:
    """What a model returns that takes its targets, and gives losses only in training mode.

    Norms and dropout stay in the mode that they are in.
    """
    steady = (Dropout, RunningNorm)
    turned = [m for m in model.modules() if not m.training and not isinstance(m, steady)]
    try:
        for module in turned:
            module.training = True
        return _run(model, (*_positional(batch), batch[1]), {})
    finally:
        for module in turned:
            module.training = False


def _are_losses(outputs: Any) -> bool:
    return (
        isinstance(outputs, Mapping)
        and bool(outputs)
        and all(isinstance(x, Tensor) and x.numel() == 1 for x in outputs.values())
    )


# Neither ----------------------------------------------------------------------------------------


def _default(outputs: Any, batch: Any) -> Predictions:
    """Cross-entropy of (samples, classes), and nothing else: a shape says no more."""
    targets = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    logits = outputs if isinstance(outputs, Tensor) else _value(outputs, "logits")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not isinstance(targets, Tensor):
        targets = batch if isinstance(batch, Mapping) else targets
        raise DataError(
            f"the model has no loss of its own and returns {described(outputs)}, for targets "
            f"{described(targets)}; without a loss_fn these have to be logits (samples, classes) "
            "and one class a sample (in a dict under `labels`). Write the loss, for example\n"
            f"{EXAMPLE}\n"
            "(sosp_hub.tasks.next_token is that of a language model)"
        )
    if len(targets) != len(logits):
        raise DataError(f"a batch has {len(targets)} labels for {len(logits)} outputs of the model")
    return softmax(logits, targets)


# Words and shapes -------------------------------------------------------------------------------


def _generates(model: nn.Module) -> bool:
    can_generate = getattr(unwrapped(model), "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def _reads_labels(model: nn.Module) -> bool:
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def _accepted(model: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """Without what the forward pass takes no argument for: targets under names of their own."""
    parameters = inspect.signature(unwrapped(model).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return named
    return {name: value for name, value in named.items() if name in parameters}


def _value(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(part, dtype) for name, part in value.items()}
    return type(value)(_cast(part, dtype) for part in value) if type(value) in _PLAIN else value


_PLAIN = tuple, list
