"""What a comparison of criteria found: means over seeds, and which differences are real.

A difference between two criteria is taken within each seed: they share the dense weights, the
calibration data and the test samples. It is *larger than the seed spread* where its mean over the
seeds is more than twice its standard deviation over them (our rule; chance alone does that in 7 of
100 comparisons with three seeds). With one seed there is no spread, and nothing is claimed.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sosp_hub.report.facts import overall_metrics
from sosp_hub.report.numbers import is_share, lower_is_better

STAGES = (
    ("cut", "after the cut"),
    ("rebuilt", "rebuilt"),
    ("recalibrated", "norms re-estimated"),
    ("final", "fine-tuned"),
)
RULE = (
    "A difference is taken within each seed (same dense weights, calibration data and test "
    "samples); it is larger than the seed spread where its mean over the seeds is more than twice "
    "its standard deviation over them."
)


@dataclass(frozen=True)
class Spread:
    """A number measured once for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Over the seeds (n - 1); None for one."""
        many = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return statistics.stdev(self.values) if many else None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"mean": self.mean, "std": self.std, "values": list(self.values)}


@dataclass(frozen=True)
class Difference:
    """How much better one criterion is than another at one budget and stage.

    Attributes:
        metric: What was measured; of a perplexity the logarithm counts.
        by: How much better, seed by seed.
    """

    budget: str
    stage: str
    metric: str
    better: str
    worse: str
    by: Spread

    @property
    def is_real(self) -> bool:
        """Whether it is larger than the seed spread."""
        return self.by.std is not None and abs(self.by.mean) > 2 * self.by.std

    def record(self) -> dict[str, Any]:
        """As JSON."""
        words = {"budget": self.budget, "stage": self.stage, "metric": self.metric}
        pair = {"better": self.better, "worse": self.worse}
        return {**words, **pair, **self.by.record(), "larger_than_seed_spread": self.is_real}

    def __str__(self) -> str:
        mean, std = self.by.mean, self.by.std
        if self.metric == "perplexity":
            mean, unit = math.expm1(min(mean, 50.0)), "%"
        else:
            unit = "points" if is_share(self.metric) else ""
        scale = 100 if unit else 1
        spread = "" if std is None else f" ± {scale * std:.2g}"
        return f"{scale * mean:+.3g}{spread} {unit}".rstrip()


class Compared:
    """The numbers of ``results.json`` by criterion and budget.

    Attributes:
        criteria: Labels, in the order of the recipe.
        budgets: Labels.
        metrics: Metrics over all samples; the first one ranks.
        stages: The stages that were measured, with their titles.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.criteria = [one["label"] for one in results["criteria"]]
        self.budgets: list[str] = list(results["budgets"])
        self._cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for cell in results["cells"]:
            self._cells.setdefault((cell["criterion"], cell["budget"]), []).append(cell)
        first = results["cells"][0]["metrics"]
        self.metrics = overall_metrics(first)
        self.stages = [(stage, title) for stage, title in STAGES if stage in first]

    def of(
        self, criterion: str, budget: str, number: Callable[[Mapping[str, Any]], float | None]
    ) -> Spread | None:
        """A number of each seed; None where it was not measured."""
        values = [number(cell) for cell in self._cells[criterion, budget]]
        return Spread(tuple(x for x in values if x is not None)) if None not in values else None

    def metric(self, criterion: str, budget: str, stage: str, name: str) -> Spread:
        """A metric of each seed."""
        spread = self.of(criterion, budget, lambda cell: cell["metrics"][stage][name]["value"])
        assert spread is not None
        return spread

    def dense(self, name: str) -> Spread:
        """A metric of the dense models."""
        return Spread(tuple(one[name]["value"] for one in self.results["dense"].values()))

    def kept(self, criterion: str, budget: str, unit: str) -> Spread:
        """The share of ``macs``, ``params`` or ``bytes`` that is left."""

        def share(cell: Mapping[str, Any]) -> float:
            return cell["cost"]["after"][unit] / cell["cost"]["before"][unit]

        spread = self.of(criterion, budget, share)
        assert spread is not None
        return spread

    def ranked(self, budget: str) -> list[str]:
        """Criteria at a budget, the best first, by what the last stage left."""
        stage, name = self.stages[-1][0], self.metrics[0]
        sign = 1 if lower_is_better(name) else -1
        return sorted(
            self.criteria, key=lambda one: sign * self.metric(one, budget, stage, name).mean
        )

    def difference(self, better: str, worse: str, budget: str, stage: str) -> Difference:
        """How much better one is than another."""
        name = self.metrics[0]
        one, two = (self.metric(who, budget, stage, name).values for who in (better, worse))
        by = Spread(tuple(_gain(name, a, b) for a, b in zip(one, two, strict=True)))
        return Difference(budget, stage, name, better, worse, by)

    def leads(self, budget: str, stage: str) -> list[Difference]:
        """The leader's lead over every other criterion, the nearest first."""
        name = self.metrics[0]
        sign = 1 if lower_is_better(name) else -1
        order = sorted(
            self.criteria, key=lambda one: sign * self.metric(one, budget, stage, name).mean
        )
        return [self.difference(order[0], other, budget, stage) for other in order[1:]]

    def compensations(self, budget: str, stage: str) -> list[Difference]:
        """What compensation changes, for each criterion that ran with and without."""
        return [
            self.difference(label, plain, budget, stage) for plain, label in self._compensated()
        ]

    def _compensated(self) -> Iterator[tuple[str, str]]:
        def rest(one: Mapping[str, Any]) -> dict[str, Any]:
            return {
                k: v for k, v in one.items() if k not in ("label", "compensate", "compensate_steps")
            }

        criteria: Sequence[Mapping[str, Any]] = self.results["criteria"]
        for one in criteria:
            for other in criteria:
                on, off = other.get("compensate"), one.get("compensate")
                if on and not off and rest(one) == rest(other):
                    yield one["label"], other["label"]

    def differences(self) -> list[Difference]:
        """All that is said in words."""
        return [
            difference
            for budget in self.budgets
            for stage, _ in self.stages
            for difference in (*self.leads(budget, stage), *self.compensations(budget, stage))
        ]

    def summary(self) -> list[dict[str, Any]]:
        """A row for each criterion and budget, as JSON."""
        return [
            {
                "criterion": criterion,
                "budget": budget,
                "metrics": {
                    stage: {
                        name: self.metric(criterion, budget, stage, name).record()
                        for name in self.metrics
                    }
                    for stage, _ in self.stages
                },
                "kept": {
                    unit: self.kept(criterion, budget, unit).record()
                    for unit in ("macs", "params", "bytes")
                },
            }
            for budget in self.budgets
            for criterion in self.criteria
        ]


def _gain(metric: str, one: float, other: float) -> float:
    """By how much ``one`` is better."""
    if metric == "perplexity":
        return math.log(other) - math.log(one)
    return other - one if lower_is_better(metric) else one - other
