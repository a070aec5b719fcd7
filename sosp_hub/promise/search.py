"""The smallest model that keeps a promise: a search on one part of the samples, a proof on another.

Bisection looks at the same samples again and again, so that the last model that seemed good enough
is so by luck more often than one test would allow. Therefore it sees a third of the held-out
samples alone. What it tried is then tested on the others, from the largest model to the smallest
and only until the first that fails (fixed sequence testing, as in Learn then Test, Angelopoulos et
al. 2021): with the confidence that was asked for, the model that is chosen loses no more than was
allowed, whatever the search did.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sosp_hub.errors import BudgetError, DataError
from sosp_hub.promise.bound import Lost, lost_quality, samples_needed
from sosp_hub.recipe.metrics import Drop, is_share

SEARCH_SHARE = 1 / 3
"""Of the held-out samples; the others prove."""

_RESERVES = (0.9, 0.75, 0.5)  # of what the search would cut

Rows = Mapping[str, Tensor]
"""By metric: what each held-out sample counts and weighs."""


@dataclass(frozen=True)
class Point:
    """A model that was tried.

    Attributes:
        macs: Share of the multiply-accumulates that it was allowed.
        cost: Shares of the dense model that it has: ``macs``, ``params``, ``bytes``.
        search: What it loses on the samples of the search, by metric.
        proof: What it loses on the others.
    """

    macs: float
    cost: Mapping[str, float]
    search: Mapping[str, Lost]
    proof: Mapping[str, Lost]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut."""
        return min(self.cost.values()) >= 1

    @property
    def holds(self) -> bool:
        """Whether the proof is within every bound."""
        return all(lost.holds for lost in self.proof.values())


@dataclass(frozen=True)
class Promise:
    """What was promised, what was tried, and which of it is kept.

    Attributes:
        drops: What may be lost.
        confidence: Of the proof, one-sided, for each metric.
        num_search: Samples that the search saw.
        num_proof: Samples of the proof.
        curve: What was tried, from the largest to the smallest.
        chosen: The place in it of the smallest that is proved; None where none is.
    """

    drops: tuple[Drop, ...]
    confidence: float
    num_search: int
    num_proof: int
    curve: tuple[Point, ...]
    chosen: int | None

    @property
    def point(self) -> Point | None:
        """The smallest that is proved."""
        return None if self.chosen is None else self.curve[self.chosen]

    def record(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return {
            "max_drop": [asdict(drop) for drop in self.drops],
            "confidence": self.confidence,
            "num_search": self.num_search,
            "num_proof": self.num_proof,
            "chosen": self.chosen,
            "curve": [asdict(point) for point in self.curve],
        }


def proof_of(
    drops: Sequence[Drop], dense: Rows, pruned: Rows, confidence: float
) -> dict[str, Lost]:
    """What a model loses on the samples that no search has seen, by metric."""
    return {
        drop.metric: lost_quality(
            drop,
            dense[drop.metric][_num_search(dense) :],
            pruned[drop.metric][_num_search(dense) :],
            confidence,
        )
        for drop in drops
    }


def _num_search(rows: Rows) -> int:
    return round(SEARCH_SHARE * len(next(iter(rows.values()))))


def check_samples(drops: Sequence[Drop], num_samples: int, confidence: float) -> None:
    """Refuses held-out samples that are too few to prove anything.

    Raises:
        DataError: Says how many are needed.
    """
    for drop in drops:
        needed = math.ceil(samples_needed(drop, confidence) / (1 - SEARCH_SHARE))
        if num_samples < needed:
            why = "even where no sample is lost" if is_share(drop.metric) else "at least"
            raise DataError(
                f"budget.max_drop: {drop.words()} at most, with {100 * confidence:g} % confidence, "
                f"needs {needed:,} held-out samples {why}; there are {num_samples:,}. Raise "
                "data.num_held_out (a fifth of the train split where it is not given) or "
                "data.num_train, or allow a larger drop"
            )


def smallest(
    drops: Sequence[Drop],
    dense: Rows,
    probe: Callable[[float], tuple[Mapping[str, float], Rows]],
    *,
    least: float,
    num_probes: int = 6,
    confidence: float = 0.95,
) -> Promise:
    """Searches along one order of elimination.

    Args:
        drops: What may be lost; all must hold.
        dense: Rows of the dense model.
        probe: From a share of the multiply-accumulates that is kept to the shares of cost that the
            model then has and its rows, for the same samples in the same order.
        least: The smallest share that can be reached.
        num_probes: Steps of bisection; three larger models are tried besides, in case that what
            it finds fails the proof.
        confidence: One-sided, of each bound.

    Raises:
        DataError: Fewer samples than could prove anything.
    """
    num_samples = len(next(iter(dense.values())))
    check_samples(drops, num_samples, confidence)
    num_search = _num_search(dense)
    spread = math.sqrt(num_search / (num_samples - num_search))
    low, high, points = least, 1.0, list[Point]()
    for number in range(num_probes + len(_RESERVES)):
        reserve = number - num_probes
        share = (low + high) / 2 if reserve < 0 else 1 - _RESERVES[reserve] * (1 - high)
        cost, rows = probe(share)
        search = {
            drop.metric: lost_quality(
                drop,
                dense[drop.metric][:num_search],
                rows[drop.metric][:num_search],
                confidence,
                spread,
            )
            for drop in drops
        }
        points.append(Point(share, cost, search, proof_of(drops, dense, rows, confidence)))
        if reserve >= 0:
            continue
        if all(lost.holds for lost in search.values()):
            high = share
        else:
            low = share
    by_cost = {tuple(point.cost.values()): point for point in points}
    curve = tuple(sorted(by_cost.values(), key=lambda point: -point.macs))
    num_proved = next((i for i, point in enumerate(curve) if not point.holds), len(curve))
    chosen = num_proved - 1 if num_proved else None
    return Promise(tuple(drops), confidence, num_search, num_samples - num_search, curve, chosen)


def not_met(promise: Promise, budgets: Mapping[str, float]) -> BudgetError:
    """That nothing keeps the promise: the best that there is, with its curve.

    Args:
        promise: What was tried.
        budgets: Of cost, that were to hold as well.
    """
    asked = " and ".join(drop.words() for drop in promise.drops)
    beside = f" together with {', '.join(f'{k}={v:g}' for k, v in budgets.items())}"
    best = promise.point
    told = (
        f"{_described(promise, best)} is the smallest of these that keeps it"
        if best
        else f"the best of these is {_described(promise, promise.curve[0])}"
    )
    if best and best.is_whole:
        told = "only the whole model keeps it"
    lines = "\n".join(f"  {_described(promise, point)}" for point in promise.curve)
    return BudgetError(
        f"budget.max_drop: {asked} at most cannot be promised{beside * bool(budgets)}, with "
        f"{100 * promise.confidence:g} % confidence on {promise.num_proof:,} held-out samples. "
        f"Tried:\n{lines}\n{told}. Allow a larger drop, raise data.num_held_out, or keep more"
    )


def _described(promise: Promise, point: Point) -> str:
    losses = (_told(drop, point.proof[drop.metric]) for drop in promise.drops)
    return f"{100 * point.cost['macs']:.1f} % of the MACs, where {', '.join(losses)}"


def _told(drop: Drop, lost: Lost) -> str:
    percent = drop.relative or is_share(drop.metric)
    value, upper = (100 * each if percent else each for each in (lost.value, lost.upper))
    unit = " %" if drop.relative else " points" if percent else ""
    return f"{drop.metric} loses {value:.3g}{unit} (at most {upper:.3g})"
