"""How far a model's outputs are from the dense model's where its gates are not 1."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sosp_hub.derivatives.average import DEFAULT, Protocol, Seen, average
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.zoo.loss import IGNORED, BatchLoss, batch_loss

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

_FAR = 1e30  # what counts as the distance where outputs are not finite

OutputLoss = Literal["cross_entropy", "squared"]
"""What is compared: distributions, or the logits themselves."""


def divergence(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    at: "Saliency",
    protocol: Protocol = DEFAULT,
    *,
    loss: OutputLoss = "cross_entropy",
) -> float:
    """The mean over samples (or label tokens) of ``KL(dense || gated)``.

    Where both are equal its Hessian is the Gauss-Newton matrix of the same ``loss``.

    Args:
        model: The model.
        groups: The groups that have gates.
        batches: Data, gone through once; labels only say which tokens count.
        at: The gates, of every group.
        protocol: How the loss is measured.
        loss: ``squared``: ``1/2 |logits - dense|^2`` instead.
    """

    def step(gates: Gates, batch: Any, _: list[Tensor]) -> Seen:
        dense = dense_logits(model, gates, batch, protocol)
        with torch.no_grad():
            gates.set_(at)
            found = batch_loss(model, batch, protocol.loss_fn)
            value = distance(found, dense, batch, loss).nan_to_num(nan=_FAR, posinf=_FAR)
        return Seen(value.item(), found.weight, [True] * len(groups))

    return average(model, groups, batches, protocol, 0, step).loss


def dense_logits(model: nn.Module, gates: Gates, batch: Any, protocol: Protocol) -> Tensor:
    """What the model returns with all gates at 1."""
    gates.set_(1.0)
    with torch.no_grad():
        return batch_loss(model, batch, protocol.loss_fn).logits


def distance(found: BatchLoss, dense: Tensor, batch: Any, loss: OutputLoss) -> Tensor:
    """The divergence of a batch from the logits ``dense``; a scalar, with a gradient."""
    (logits, counts), (dense, _) = counted(found.logits, batch), counted(dense, batch)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, dense = logits.to(dtype), dense.to(dtype)
    if counts is not None:
        logits, dense = logits[counts], dense[counts]
    if loss == "squared":
        total = (logits - dense).square().sum() / 2
    else:
        shares = logits.log_softmax(-1), dense.log_softmax(-1)
        total = F.kl_div(*shares, reduction="sum", log_target=True)
    return total / max(found.weight, 1)


def counted(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor | None]:
    """The logits that have a label, and which of them count; None = all do.

    A causal language model's at one token are for the label of the next.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if labels is None or logits.ndim != labels.ndim + 1 or labels.ndim == 1:
        return logits, None
    return logits[:, :-1], labels[:, 1:] != IGNORED
