"""How far a model's outputs are from the dense model's where its gates are not 1."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sosp_hub.derivatives.average import DEFAULT, Protocol, Seen, average
from sosp_hub.errors import CriterionError
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.loss import Loss, batch_loss
from sosp_hub.tasks.predictions import Predictions
from sosp_hub.types import OutputLoss

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

_FAR = 1e30  # what counts as the distance where outputs are not finite


def divergence(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    at: "Saliency",
    protocol: Protocol = DEFAULT,
    *,
    loss: OutputLoss = "auto",
) -> float:
    """The mean over samples (or tokens) of ``KL(dense || gated)``, or of the squared distance.

    Where both are equal its Hessian is the Gauss-Newton matrix of the same ``loss``.

    Args:
        model: The model.
        groups: The groups that have gates.
        batches: Data, gone through once; labels only say which tokens count.
        at: The gates, of every group.
        protocol: How the loss is measured.
        loss: ``squared``: ``1/2 |outputs - dense|^2`` instead.

    Raises:
        CriterionError: Among others, a loss that says not what it reads of the outputs.
    """

    def step(gates: Gates, batch: Any, _: list[Tensor]) -> Seen:
        dense = dense_predictions(model, gates, batch, protocol, loss)
        with torch.no_grad():
            gates.set_(at)
            measured = batch_loss(model, batch, protocol.loss_fn)
            value = _needed(measured, loss).divergence(dense).nan_to_num(nan=_FAR, posinf=_FAR)
        return Seen(value.item(), measured.weight, [True] * len(groups))

    return average(model, groups, batches, protocol, 0, step).loss


def dense_predictions(
    model: nn.Module, gates: Gates, batch: Any, protocol: Protocol, loss: OutputLoss
) -> Predictions:
    """What the loss reads with all gates at 1."""
    gates.set_(1.0)
    with torch.no_grad():
        return _needed(batch_loss(model, batch, protocol.loss_fn), loss)


def chosen(measured: Loss, loss: OutputLoss) -> Predictions | None:
    """What the loss reads of the outputs, under the curvature that was asked for."""
    predictions = measured.predictions
    if loss == "auto" or predictions is None:
        return predictions
    return predictions.as_form("squared" if loss == "squared" else "softmax")


def _needed(measured: Loss, loss: OutputLoss) -> Predictions:
    predictions = chosen(measured, loss)
    if predictions is None:
        raise CriterionError(
            "rescore_every and compensate_steps compare the outputs with those of the dense model, "
            "and this loss does not say what it reads of them; leave them out, or let the loss "
            "return sosp_hub.tasks.softmax(logits, labels), sigmoid(...) or squared(...)"
        )
    return predictions
