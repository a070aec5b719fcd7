"""One batch: the loss, and its gradient by the gates as a row."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sosp_hub.derivatives.average import Protocol, Seen
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.loss import batch_loss

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


def first_order(
    model: nn.Module, gates: Gates, batch: Any, protocol: Protocol
) -> tuple[Seen, Tensor]:
    """One forward and backward pass: the gradient of the summed loss, as a row."""
    loss = batch_loss(model, batch, protocol.loss_fn)
    gradient = gradient_by(loss.value, gates)
    seen = Seen(loss.value.item(), loss.weight, used(gradient))
    return seen, row(gradient, gates, loss.weight)


def gradient_by(
    loss: Tensor, gates: Gates, *, create_graph: bool = False, retain_graph: bool | None = None
) -> list[Tensor | None]:
    """The gradient by the gates of each group; None where the loss does not depend on them."""
    leaves = list(gates.values.values())
    if not loss.requires_grad:
        return [None] * len(leaves)
    parts = torch.autograd.grad(
        loss, leaves, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return list(parts)


def used(parts: list[Tensor | None]) -> list[bool]:
    """Which groups the loss depends on."""
    return [part is not None for part in parts]


def row(parts: list[Tensor | None], gates: Gates, weight: float) -> Tensor:
    """All groups in a row, times ``weight``: float64 on the CPU, 0 where None."""
    whole = [
        torch.zeros_like(leaf) if part is None or not weight else part.detach()
        for part, leaf in zip(parts, gates.values.values(), strict=True)
    ]
    return torch.cat(whole, -1).detach().to("cpu", torch.float64) * weight


def by_group(groups: Groups, row: Tensor) -> "Saliency":
    """The row cut into groups, each with its own memory."""
    parts = row.split([group.size for group in groups.values()])
    return {name: part.clone() for name, part in zip(groups, parts, strict=True)}
