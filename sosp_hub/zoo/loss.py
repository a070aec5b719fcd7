"""The loss of a batch, the same for scoring, fine-tuning and evaluation."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from sosp_hub.types import LossFn


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


def batch_loss(model: nn.Module, batch: Any, loss_fn: "LossFn | None" = None) -> BatchLoss:  # noqa: ANN401
    """Runs ``model`` on a batch ``(inputs, labels)``, or on a dict as a transformers model takes it.

    Without ``loss_fn`` it is the model's own loss where it returns one, else cross-entropy of the logits. A ``loss_fn``
    gets the logits and the labels as they are in the batch.
    """
    raise NotImplementedError
