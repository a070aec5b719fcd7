"""What the name of a metric says: whether it is a share, which way is better, how it may drop."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ERRORS = {"loss", "perplexity", "error", "divergence"}
"""Words in the name of a metric of which less is better, as in ``word_error_rate``."""
_SHARES = (
    *("accuracy", "top", "f1", "precision", "recall", "span_f1", "exact_match", "agreement"),
    *("mean_average_precision", "average_precision", "mean_iou", "word_error_rate"),
    *("bleu", "chrf", "rouge"),
)
_SCORES = ("cosine", "spearman", "score")
_NONLINEAR = ("perplexity", "root_mean_squared_error")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
DIVERGENCE = "divergence"
"""From the dense model's outputs: what a drop may be asked of beside the metrics of a task."""


def is_share(metric: str) -> bool:
    """Whether the metric is a fraction that people read in percent."""
    return metric.startswith(_SHARES)


def lower_is_better(metric: str) -> bool:
    """Whether less of the metric is better, by what stands before ``@DATA`` and ``/CLASS``."""
    return not _ERRORS.isdisjoint(re.split("[@/]", metric)[0].split("_"))


def has_direction(metric: str) -> bool:
    """Whether the name says which way is better."""
    return lower_is_better(metric) or metric.startswith((*_SHARES, *_SCORES))


@dataclass(frozen=True)
class Drop:
    """How much worse than the dense model's a metric may be.

    Attributes:
        metric: Its name, or ``divergence``: the mean Kullback-Leibler divergence from the dense
            model's outputs (squared distance, where the loss is squared).
        amount: A share of 1 for metrics that are shares, else in the metric's unit; with
            ``relative`` a share of the dense model's value.
        relative: Which of the two.
    """

    metric: str
    amount: float
    relative: bool = False

    def words(self) -> str:
        """As people write it: ``accuracy by 1 point``."""
        if self.relative:
            return f"{self.metric} by {100 * self.amount:g} %"
        if not is_share(self.metric):
            return f"{self.metric} by {self.amount:g}"
        points = 100 * self.amount
        return f"{self.metric} by {points:g} point{'s' * (points != 1)}"


def read_drops(
    given: Mapping[str, float | str], metrics: Sequence[str], of_all: Sequence[str] = ()
) -> tuple[Drop, ...]:
    """Drops as recipes write them: ``{accuracy: 1.0}`` in points, ``{perplexity: 5%}``.

    Args:
        given: By metric: points for shares, else the metric's unit; or a percentage of the dense
            model's value.
        metrics: What can be measured.
        of_all: What is of all samples together: no model is compared by it sample by sample.

    Raises:
        ValueError: An unknown metric, one that is no mean over samples or whose name does not tell
            which way is better, or an amount that is none; says what to write.
    """
    closed = {"per_class_accuracy", *of_all}
    known = tuple(dict.fromkeys([*(name for name in metrics if name not in closed), DIVERGENCE]))
    for metric in given:
        if metric in of_all:
            raise ValueError(
                f"max_drop.{metric}: is of all samples together, so that no bound can be tested "
                f"sample by sample; there are {', '.join(known)}"
            )
    return tuple(_read_drop(metric, amount, known) for metric, amount in given.items())


def _read_drop(metric: str, amount: float | str, known: Sequence[str]) -> Drop:
    key = f"max_drop.{metric}"
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{key}: no such metric{guess}; there are {', '.join(known)}")
    if not has_direction(metric):
        raise ValueError(
            f"{key}: its name does not tell whether less of it is better; call it {metric}_error "
            f"where less is, score_{metric} where more is"
        )
    told = f"{key}: got {amount!r}; expected"
    percent = _PERCENT.fullmatch(amount) if isinstance(amount, str) else None
    if percent and metric == DIVERGENCE:
        raise ValueError(f"{told} a number such as 0.05, since the dense model's is 0")
    if percent:
        share = float(percent[1]) / 100
        if not 0 < share < (math.inf if lower_is_better(metric) else 1):
            raise ValueError(f"{told} a share of what there is, such as 5%")
        return Drop(metric, share, relative=True)
    if isinstance(amount, str | bool) or not amount > 0:
        raise ValueError(f"{told} a number more than 0, or such as 5%")
    if metric in _NONLINEAR:
        raise ValueError(f"{told} a percentage of the dense model's, such as 5%")
    if not is_share(metric):
        return Drop(metric, float(amount))
    if amount >= 100:
        raise ValueError(f"{told} points, less than 100")
    return Drop(metric, float(amount) / 100)
