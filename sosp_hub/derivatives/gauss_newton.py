"""The Gauss-Newton matrix of the loss by the gates."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sosp_hub.derivatives.average import DEFAULT, Protocol, Seen, average
from sosp_hub.derivatives.divergence import OutputLoss, chosen, dense_predictions
from sosp_hub.derivatives.gram import Gram, Matrix
from sosp_hub.derivatives.rows import by_group, gradient_by, row, used
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.batches import num_samples, tensors
from sosp_hub.tasks.loss import batch_loss
from sosp_hub.tasks.predictions import Predictions, at_least_float32

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

logger = logging.getLogger("sosp_hub")


class GaussNewton(NamedTuple):
    """The Gauss-Newton approximation of the gate Hessian, over the gates of all groups in a row.

    Attributes:
        loss: The mean loss.
        num_samples: Samples that were seen.
        gradient: The gate gradient of each group.
        matrix: Structures x structures, float64, positive semidefinite; ``LowRank`` where there
            were few samples.
        exact: Whether labels were summed over; otherwise they were drawn from the model.
        form: How outputs enter the loss, which says its curvature: ``softmax``, ``sigmoid``,
            ``squared``; ``empirical`` where that is not known and the matrix is the empirical
            Fisher, the mean of the outer products of the samples' own gradients.
        unused: Groups that the loss does not depend on, where the protocol allows some; their rows
            are zero.
    """

    loss: float
    num_samples: int
    gradient: "Saliency"
    matrix: Matrix
    exact: bool
    form: str = "softmax"
    unused: tuple[str, ...] = ()


def gauss_newton(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol = DEFAULT,
    *,
    loss: OutputLoss = "auto",
    max_classes: int = 32,
    num_draws: int = 1,
    seed: int = 0,
    at: "Saliency | None" = None,
) -> GaussNewton:
    """``mean_n J' R J`` with ``J`` the Jacobian of the outputs by the gates.

    ``R`` is the second derivative of the loss by the outputs, which the loss's form says
    (``Predictions``). Each sample has its own gates, so that one backward pass gives one row per
    sample of a factor ``B`` with ``B'B = J'RJ``. For a softmax and each class ``d`` that is
    ``sqrt(p_d) (J_d - sum_k p_k J_k)``, or for a class ``d`` drawn from the model ``J_d - sum_k p_k
    J_k``, the gradient of the loss with that label; for a sigmoid ``sqrt(p (1 - p)) J`` or the
    gradient with a label that is drawn; for a squared error ``sqrt(2) J`` or that with a random
    sign. The sum of drawn ones over the places of a sample (tokens, pixels, numbers) is a row as
    well: terms between places vanish in the mean.

    Where the loss does not say what it reads, the rows are the samples' own gradients: the
    empirical Fisher. A log line says so.

    Args:
        model: The model.
        groups: The groups that have gates.
        batches: Calibration data, gone through once.
        protocol: How the loss is measured; the labels matter for the gradient alone.
        loss: Which curvature ``R`` by the outputs: the loss's own; or ``diag(p) - pp'`` of the
            cross-entropy, or 1, whatever the loss.
        max_classes: Up to so many classes (times places) are summed over; above, labels are drawn.
        num_draws: Labels drawn per sample.
        seed: Of the drawn labels. They depend on it and on the sample alone, so that they are the
            same in whichever batch and process the sample is.
        at: The gates where derivatives are taken, of every group; the gradient is then that of
            ``divergence``, and so is ``loss``. None = all 1, and the gradient of the loss.
    """
    exact, form = True, "softmax"
    gram = Gram(_size(groups), alone=protocol.process_sum is None)

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        nonlocal exact, form
        dense = None if at is None else dense_predictions(model, gates, batch, protocol, loss)
        gates.set_(at or 1.0, own=(num_samples(batch),))
        measured = batch_loss(model, batch, protocol.loss_fn)
        predictions = chosen(measured, loss)
        value = measured.value
        if dense is not None and predictions is not None:
            value = predictions.divergence(dense)
        gradient = gradient_by(value, gates, retain_graph=True)
        own_rows = row(gradient, gates, measured.weight)
        if predictions is None:
            if form != "empirical":
                logger.info(
                    "the second derivative of this loss with respect to the outputs is unknown; "
                    "using the empirical Fisher matrix, from the gradient of each sample"
                )
            form, rows = "empirical", [own_rows]
        else:
            form = predictions.form
            size = math.prod(predictions.values.shape[1:])
            exact = exact and size <= max_classes
            if size <= max_classes:
                factors = _summed_factors(predictions)
            else:
                factors = _drawn_factors(predictions, batch, num_draws, seed)
            rows = [row(gradient_by(f, gates, retain_graph=True), gates, 1) for f in factors]
        whole, summed = torch.cat(rows), own_rows.sum(0)
        totals[0] += summed  # last: a batch that runs out of memory leaves no trace
        return Seen(value.item(), measured.weight, used(gradient), whole)

    mean = average(model, groups, batches, protocol, 1, step, gram.add, own_gates=True)
    matrix = gram.mean(mean.weight, protocol.process_sum, protocol.process_rows)
    gradient = by_group(groups, mean.totals[0])
    unused = tuple(sorted(protocol.unused or ()))
    return GaussNewton(mean.loss, mean.num_samples, gradient, matrix, exact, form, unused)


def _size(groups: Groups) -> int:
    return sum(group.size for group in groups.values())


def _summed_factors(predictions: Predictions) -> Iterator[Tensor]:
    """Scalars whose gradients by the samples' gates are rows of ``B``; none is random."""
    values = at_least_float32(predictions.values)
    scale = predictions.weights.to(values).sqrt()
    if predictions.form == "softmax":
        share = values.detach().softmax(-1)
        mean = (share * values).sum(-1, keepdim=True)
        each = scale.unsqueeze(-1) * share.sqrt() * (values - mean)
    elif predictions.form == "sigmoid":
        share = values.detach().sigmoid()
        each = scale * (share * (1 - share)).sqrt() * values
    else:
        each = scale * math.sqrt(2) * values
    yield from each.flatten(1).sum(0)


def _drawn_factors(
    predictions: Predictions, batch: Any, num_draws: int, seed: int
) -> Iterator[Tensor]:
    """The same with targets drawn from the model, all places of a sample in one row."""
    values = at_least_float32(predictions.values)
    scale = (predictions.weights.to(values) / num_draws).sqrt()
    counts = predictions.weights != 0
    chance = _chance(batch, values.shape[1], num_draws, seed)
    if predictions.form == "softmax":
        log_share = values.log_softmax(-1)
        for drawn in _drawn(log_share.detach(), chance).split(1, -1):
            loss = -log_share.gather(-1, drawn)[..., 0]
            yield (scale * loss)[counts].sum()
        return
    share = values.detach().sigmoid()
    for points in chance.to(values.device, torch.float32).unbind(-1):
        if predictions.form == "sigmoid":
            factor = share - (points < share).to(share)
        else:
            factor = math.sqrt(2) * torch.where(points < 0.5, -1.0, 1.0).to(share)
        yield (scale * factor * values)[counts].sum()


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
