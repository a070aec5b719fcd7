"""The Gauss-Newton matrix of the loss by the gates."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sosp_hub.derivatives.average import DEFAULT, Protocol, Seen, average, num_samples
from sosp_hub.derivatives.gram import Gram, Matrix
from sosp_hub.derivatives.rows import by_group, gradient_by, row, used
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.zoo.loss import IGNORED, batch_loss

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
        seed: Of the drawn labels.
    """
    generator = torch.Generator().manual_seed(seed)
    exact, gram = True, Gram(_size(groups), alone=protocol.process_sum is None)

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        nonlocal exact
        gates.set_(1.0, num_samples=num_samples(batch))
        found = batch_loss(model, batch, protocol.loss_fn)
        gradient = gradient_by(found.value, gates, retain_graph=True)
        exact = found.logits.ndim == 2 and found.logits.shape[1] <= max_classes
        if exact:
            factors = _class_factors(found.logits, loss)
        else:
            factors = _drawn_factors(found.logits, _labels(batch), num_draws, generator)
        rows = [row(gradient_by(f, gates, retain_graph=True), gates, 1) for f in factors]
        whole, summed = torch.cat(rows), row(gradient, gates, found.weight).sum(0)
        totals[0] += summed  # last: a batch that runs out of memory leaves no trace
        return Seen(found.value.item(), found.weight, used(gradient), whole)

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


def _drawn_factors(
    logits: Tensor, labels: Tensor | None, num_draws: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """The same with labels drawn from the model, at the tokens that have a label."""
    counts = None
    if labels is not None and logits.ndim == labels.ndim + 1 and labels.ndim > 1:
        logits, counts = logits[:, :-1], labels[:, 1:] != IGNORED
    log_share = logits.log_softmax(-1).flatten(0, -2)
    share = log_share.detach().exp().cpu()
    for _ in range(num_draws):
        drawn = torch.multinomial(share, 1, generator=generator).to(log_share.device)
        loss = -log_share.gather(1, drawn)[:, 0] / math.sqrt(num_draws)
        yield (loss if counts is None else loss[counts.flatten()]).sum()


def _labels(batch: Any) -> Tensor | None:
    return batch.get("labels") if isinstance(batch, Mapping) else batch[1]
