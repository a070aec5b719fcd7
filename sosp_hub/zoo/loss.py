"""The loss of a batch, the same for scoring, fine-tuning and evaluation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sosp_hub.errors import DataError

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

IGNORED = -100  # label that counts for nothing, as PyTorch and transformers have it


class BatchLoss(NamedTuple):
    """A mean loss and how much it weighs.

    Attributes:
        value: Mean over the samples, or over the label tokens of a causal language model. Scalar.
        weight: Samples or label tokens that were averaged.
        logits: What the model returned, before the loss.
    """

    value: Tensor
    weight: int
    logits: Tensor


def batch_loss(
    model: nn.Module,
    batch: Any,
    loss_fn: "LossFn | None" = None,
) -> BatchLoss:
    """Runs ``model`` on ``(inputs, labels)``, or on a dict as a transformers model takes it.

    Without ``loss_fn`` it is the model's own loss where it returns one, else cross-entropy. A
    ``loss_fn`` gets the logits and the labels as they are in the batch. Images take the dtype of
    the model's weights; a generating model is told ``use_cache=False``.

    Raises:
        DataError: A batch of another form, or labels that do not fit the logits.
    """
    check_batch(batch)
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    if isinstance(batch, Mapping):
        inputs = dict(batch) if loss_fn is None else _without(batch, "labels")
        if loss_fn is None:
            _check_for_own_loss(model, batch)
        if _generates(model):
            inputs.setdefault("use_cache", False)
        output = model(**{name: _as_weights(value, model) for name, value in inputs.items()})
    else:
        inputs = batch[0]
        inputs = inputs if isinstance(inputs, tuple | list) else (inputs,)
        output = model(*(_as_weights(value, model) for value in inputs))
    logits, own = _logits(output), getattr(output, "loss", None)
    counted = labels[:, 1:] if _is_shifted(logits, labels) else labels
    weight = int((counted != IGNORED).sum()) if not counted.is_floating_point() else len(counted)
    if loss_fn is not None:
        value = loss_fn(logits, labels)
    else:
        value = own if own is not None else _cross_entropy(logits, labels)
    return BatchLoss(value, weight, logits)


def check_batch(batch: Any) -> None:
    """Sees that a batch is ``(inputs, labels)`` of tensors, or a dict with ``labels``.

    Raises:
        DataError: It is something else; says what.
    """
    if isinstance(batch, Mapping):
        given, inputs, labels = f"a dict of {', '.join(map(str, batch))}", [], batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
        inputs = inputs if isinstance(inputs, tuple | list) else [inputs]
        kinds = ", ".join(type(value).__name__ for value in inputs)
        given = f"inputs as {kinds} and labels as {type(labels).__name__}"
    else:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        given, inputs, labels = f"a {type(batch).__name__}{length}", [], None
    if not isinstance(labels, Tensor) or not all(isinstance(value, Tensor) for value in inputs):
        raise DataError(
            f"a batch is {given}; expected (inputs, labels) as tensors, or a dict of tensors with "
            "`labels` among them (torch.from_numpy(array) makes a tensor of an array)"
        )


def _check_for_own_loss(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """What a transformers model that computes its own loss does not say, or not in clear words."""
    inner, labels = getattr(model, "module", model), batch["labels"]
    config, num_classes = getattr(inner, "config", None), None
    sizes = {len(v) for v in _without(batch, "labels").values() if isinstance(v, Tensor) and v.ndim}
    if sizes and len(labels) not in sizes:
        raise DataError(f"a batch has {len(labels)} labels for {min(sizes)} inputs of the model")
    if not labels.is_floating_point() and config is not None:
        if _generates(model) and hasattr(config, "get_text_config"):
            num_classes = getattr(config.get_text_config(), "vocab_size", None)
        elif type(inner).__name__.endswith("Classification"):  # others have `num_labels` too
            num_classes = getattr(config, "num_labels", None)
        if num_classes is not None and num_classes > 1:  # one output is a regression
            _check_range(labels, num_classes)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if len(labels) != len(logits):
        raise DataError(f"a batch has {len(labels)} labels for {len(logits)} outputs of the model")
    if not labels.is_floating_point():
        _check_range(labels, logits.shape[1])
    elif labels.shape != logits.shape:
        raise DataError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}; expected class numbers "
            f"as int64, or one probability for each of the {logits.shape[1]} classes"
        )


def _check_range(labels: Tensor, num_classes: int) -> None:
    """Before a loss is computed: on a GPU that would end the process, with no word of labels."""
    odd = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if len(odd):
        raise DataError(
            f"the label {odd[0].item()} does not fit a head with {num_classes} outputs; "
            f"labels go from 0 to {num_classes - 1}"
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if _is_shifted(logits, labels):
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    _check_labels(logits, labels)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def _is_shifted(logits: Tensor, labels: Tensor) -> bool:
    """Whether position ``t`` of the logits is for label ``t + 1``: a causal language model's."""
    return logits.ndim == 3 and labels.ndim == 2 and logits.shape[:2] == labels.shape


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output[0]


def _as_weights(value: Any, model: nn.Module) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), value.dtype)
    return value if dtype not in (torch.float32, torch.bfloat16, torch.float16) else value.to(dtype)


def _generates(model: nn.Module) -> bool:
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    can_generate = getattr(inner, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def _without(batch: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != name}
