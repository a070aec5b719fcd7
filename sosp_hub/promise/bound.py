"""How much worse a smaller model is at most, with a confidence, on the same samples."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from sosp_hub.recipe.metrics import DIVERGENCE, Drop, is_share, lower_is_better

LEAST_SAMPLES = 100
"""Of which a standard error is believed."""


@dataclass(frozen=True)
class Lost:
    """What was lost of a metric, in the unit of its `Drop`; less than 0 where it became better.

    Attributes:
        value: The estimate.
        upper: With the confidence that was asked for, the true loss is at most this.
        holds: Whether that is within what was allowed.
    """

    value: float
    upper: float
    holds: bool


def samples_needed(drop: Drop, confidence: float) -> int:
    """Fewer held-out samples cannot show a drop to be this small, even if none of them is lost."""
    if not is_share(drop.metric):
        return LEAST_SAMPLES
    return max(LEAST_SAMPLES, math.ceil(math.log(1 - confidence) / math.log(1 - drop.amount)))


def lost_quality(
    drop: Drop,
    dense: Float[Tensor, "samples 2"],
    pruned: Float[Tensor, "samples 2"],
    confidence: float = 0.95,
    spread: float = 1.0,
) -> Lost:
    """The loss of quality between two models that were measured on the same samples.

    A metric is a ratio of sums, ``sum(x) / sum(w)``; its change is bounded from above by the
    estimate and a multiple of the standard error of paired samples (delta method), with Student's
    quantile. Two corrections for few samples: of metrics that are shares, one more sample counts
    that the dense model has right and the smaller one wrong, so that nothing lost on n samples is
    no proof of no loss; of the others, a skewed spread counts as in Johnson (1978, eq. 2.5).

    Args:
        drop: What may be lost.
        dense: ``x`` and ``w`` of each sample; all 0 for a divergence.
        pruned: The same of the smaller model.
        confidence: Of the bound, one-sided.
        spread: Factor of the standard error: how the bound would be on other samples of the same
            kind, so many that their error is this times as large.
    """
    dense, pruned = dense.double(), pruned.double()
    if is_share(drop.metric):
        one = dense[:, 1].mean()
        right, wrong = (0 * one, one) if lower_is_better(drop.metric) else (one, 0 * one)
        dense = torch.cat([dense, torch.stack([right, one])[None]])
        pruned = torch.cat([pruned, torch.stack([wrong, one])[None]])
    ratio, each = _linear(pruned)
    if drop.metric == DIVERGENCE:
        value = ratio
    else:
        sign = 1.0 if lower_is_better(drop.metric) else -1.0
        factor = _factor(drop)
        dense_ratio, dense_each = _linear(dense)
        value = sign * (ratio - factor * dense_ratio)
        each = sign * (each - factor * dense_each)
    number = len(each)
    variance = each.square().sum().item() / max(number - 1, 1)
    error = spread * math.sqrt(variance / number)
    quantile = _student(confidence, number - 1)
    skew = 0.0
    if variance > 0 and not is_share(drop.metric):
        third = each.pow(3).mean().item()
        skew = max(0.0, spread**2 * third / (6 * variance * number) * (1 + 2 * quantile**2))
    upper = value + quantile * error + skew
    return _in_units(drop, value, upper, dense)


def _linear(rows: Float[Tensor, "samples 2"]) -> tuple[float, Float[Tensor, " samples"]]:
    """A ratio of sums, and what each sample moves it by, times their number."""
    x, w = rows.unbind(1)
    ratio = (x.sum() / w.sum()).item()
    return ratio, (x - ratio * w) / w.mean()


def _factor(drop: Drop) -> float:
    """Of the dense value: with it the limit is 0, and the change remains linear."""
    if not drop.relative or drop.metric == "perplexity":
        return 1.0
    if drop.metric == "root_mean_squared_error":
        return (1 + drop.amount) ** 2
    return 1 + drop.amount if lower_is_better(drop.metric) else 1 - drop.amount


def _in_units(drop: Drop, value: float, upper: float, dense: Tensor) -> Lost:
    if not drop.relative:
        return Lost(value, upper, upper <= drop.amount)
    if drop.metric == "perplexity":  # the exponential of a mean loss
        holds = upper <= math.log1p(drop.amount)
        return Lost(_expm1(value), _expm1(upper), holds)
    reference = (dense[:, 0].sum() / dense[:, 1].sum()).item()
    shares = [each / reference if reference else math.inf for each in (value, upper)]
    if drop.metric == "root_mean_squared_error":
        whole = (1 + drop.amount) ** 2
        told = [math.sqrt(max(0.0, whole + share)) - 1 for share in shares]
    else:
        told = [drop.amount + share for share in shares]
    return Lost(told[0], told[1], upper <= 0)


def _expm1(value: float) -> float:
    return math.expm1(min(value, 700.0))


def _student(confidence: float, freedom: int) -> float:
    """Its quantile, by two terms of the expansion at the normal one (Abramowitz 26.7.5)."""
    z = NormalDist().inv_cdf(confidence)
    nu = max(freedom, 1)
    return z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
