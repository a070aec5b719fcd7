"""The Gauss-Newton matrix of the loss by the gates."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sosp_hub.derivatives.average import DEFAULT, Protocol, Seen, average, num_samples, tensors
from sosp_hub.derivatives.divergence import counted, dense_logits, distance
from sosp_hub.derivatives.gram import Gram, Matrix
from sosp_hub.derivatives.rows import by_group, gradient_by, row, used
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.zoo.loss import batch_loss

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency


class GaussNewton(NamedTuple):
    """The Gauss-Newton approximation of the gate Hessian, over the gates of all groups in a row.

    Attributes:
        loss: The mean loss.
        num_samples: Samples that were seen.
        gradient: The gate gradient of each group.
        matrix: Structures x structures, float64, positive semidefinite; ``LowRank`` where there
            were few samples.
        exact: Whether labels were summed over; otherwise they were drawn from the model.
    """

    loss: float
    num_samples: int
    gradient: "Saliency"
    matrix: Matrix
    exact: bool


def gauss_newton(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol = DEFAULT,
    *,
    loss: Literal["cross_entropy", "squared"] = "cross_entropy",
    max_classes: int = 32,
    num_draws: int = 1,
    seed: int = 0,
    at: "Saliency | None" = None,
) -> GaussNewton:
    """``mean_n J' R J`` with ``J`` the Jacobian of the logits by the gates.

    Each sample has its own gates, so that one backward pass gives one row per sample of a factor
    ``B`` with ``B'B = J'RJ``: for each class ``d`` the row ``sqrt(p_d) (J_d - sum_k p_k J_k)``, or
    for a class ``d`` drawn from the model ``J_d - sum_k p_k J_k``, the gradient of the loss with
    that label. The sum of the latter over the tokens of a sequence is a row as well: terms between
    tokens vanish in the mean.

    Args:
        model: The model.
        groups: The groups that have gates.
        batches: Calibration data, gone through once.
        protocol: How the loss is measured; the labels matter for the gradient alone.
        loss: Which curvature ``R`` by the logits: ``diag(p) - pp'`` of the cross-entropy, or 1.
        max_classes: Up to so many classes are summed over; above, and for tokens, labels are drawn.
        num_draws: Labels drawn per sample.
        seed: Of the drawn labels. They depend on it and on the sample alone, so that they are the
            same in whichever batch and process the sample is.
        at: The gates where derivatives are taken, of every group; the gradient is then that of
            ``divergence``, and so is ``loss``. None = all 1, and the gradient of the loss.
    """
    exact, gram = True, Gram(_size(groups), alone=protocol.process_sum is None)

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        nonlocal exact
        dense = None if at is None else dense_logits(model, gates, batch, protocol)
        gates.set_(at or 1.0, num_samples=num_samples(batch))
        found = batch_loss(model, batch, protocol.loss_fn)
        value = found.value if dense is None else distance(found, dense, batch, loss)
        gradient = gradient_by(value, gates, retain_graph=True)
        exact = found.logits.ndim == 2 and found.logits.shape[1] <= max_classes
        if exact:
            factors = _class_factors(found.logits, loss)
        else:
            factors = _drawn_factors(found.logits, batch, num_draws, seed)
        rows = [row(gradient_by(f, gates, retain_graph=True), gates, 1) for f in factors]
        whole, summed = torch.cat(rows), row(gradient, gates, found.weight).sum(0)
        totals[0] += summed  # last: a batch that runs out of memory leaves no trace
        return Seen(value.item(), found.weight, used(gradient), whole)

    mean = average(model, groups, batches, protocol, 1, step, gram.add)
    matrix = gram.mean(mean.weight, protocol.process_sum, protocol.process_rows)
    gradient = by_group(groups, mean.totals[0])
    return GaussNewton(mean.loss, mean.num_samples, gradient, matrix, exact)


def _size(groups: Groups) -> int:
    return sum(group.size for group in groups.values())


def _class_factors(logits: Tensor, loss: str) -> Iterator[Tensor]:
    """For each class a scalar whose gradients by the samples' gates are rows of ``B``."""
    if loss == "squared":
        yield from logits.sum(0)
        return
    share = logits.detach().softmax(-1)
    mean = (share * logits).sum(-1)
    for d in range(logits.shape[-1]):
        yield (share[:, d].sqrt() * (logits[:, d] - mean)).sum()


def _drawn_factors(logits: Tensor, batch: Any, num_draws: int, seed: int) -> Iterator[Tensor]:
    """The same with labels drawn from the model, at the tokens that have a label."""
    logits, counts = counted(logits, batch)
    log_share = logits.log_softmax(-1).reshape(len(logits), -1, logits.shape[-1])
    chance = _chance(batch, log_share.shape[1], num_draws, seed)
    for drawn in _drawn(log_share.detach(), chance).split(1, -1):
        loss = -log_share.gather(-1, drawn)[..., 0] / math.sqrt(num_draws)
        yield (loss if counts is None else loss[counts.flatten(1)]).sum()


def _drawn(
    log_share: Float[Tensor, "samples places classes"],
    chance: Float[Tensor, "samples places draws"],
) -> Int[Tensor, "samples places draws"]:
    """The class at which the distribution function passes each number, a sample at a time."""
    place = "cpu" if log_share.device.type == "mps" else log_share.device  # that has no float64
    drawn = []
    for own, points in zip(log_share, chance.to(place), strict=True):
        below = own.to(place, torch.float64).exp().cumsum(-1)
        drawn.append(torch.searchsorted(below, points * below[:, -1:], right=True))
    most = log_share.shape[-1] - 1  # beyond it where logits are not finite
    return torch.stack(drawn).clamp(max=most).to(log_share.device)


def _chance(
    batch: Any, num_places: int, num_draws: int, seed: int
) -> Float[Tensor, "samples places draws"]:
    """Numbers from 0 to 1, from the seed and each sample's own tensors without their padding."""
    size, rows = num_samples(batch), []
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    mask = None if mask is None else mask.cpu().bool()
    parts = [part.cpu() for part in tensors(batch) if part.ndim and len(part) == size]
    for n in range(size):
        digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, signed=True))
        for part in parts:
            own = part[n]
            if mask is not None and part.shape == mask.shape:
                own = own[mask[n]]
            digest.update(own.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()))
        shape = num_places, num_draws
        rows.append(torch.rand(shape, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
