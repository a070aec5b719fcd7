"""The loss of a batch, the same for scoring, fine-tuning and evaluation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """
    if isinstance(batch, Mapping):
        labels = batch["labels"]
        inputs = dict(batch) if loss_fn is None else _without(batch, "labels")
        if _generates(model):
            inputs.setdefault("use_cache", False)
        output = model(**{name: _as_weights(value, model) for name, value in inputs.items()})
    else:
        inputs, labels = batch
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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if _is_shifted(logits, labels):
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


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
