"""How numbers are printed, everywhere: counts, sizes, times, shares, changes, metrics.

A minus is the sign, not a hyphen; a unit stands after a space.
"""

import math
from collections.abc import Mapping
from typing import Any

from sosp_hub.recipe.metrics import is_share, lower_is_better

_METRIC_DIGITS = 3
MINUS = "\N{MINUS SIGN}"


def count(value: float) -> str:
    """A number of things.

    >>> count(272_474), count(40_813_184), count(999)
    ('272 k', '40.8 M', '999')
    """
    return _scaled(value, ("", " k", " M", " G", " T"))


def whole(value: float) -> str:
    """A number of things, to the last one.

    >>> whole(272_474)
    '272,474'
    """
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes, in powers of 1000.

    >>> size(1_098_000), size(12)
    ('1.1 MB', '12 B')
    """
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def seconds(value: float) -> str:
    """A time.

    >>> seconds(0.0171), seconds(2.5)
    ('17.1 ms', '2.5 s')
    """
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def share(value: float, digits: int = 1) -> str:
    """A fraction in percent.

    >>> share(0.5), share(0.3333, 0)
    ('50.0 %', '33 %')
    """
    return f"{100 * value:.{digits}f} %"


def change(before: float, after: float) -> str:
    """How much more ``after`` is, in percent; nothing where there was nothing before, or as good.

    >>> change(100, 150), change(4e-17, 0.07)
    ('+50.0 %', '')
    """
    return "" if abs(before) <= 1e-9 * abs(after) else f"{signed(100 * (after / before - 1))} %"


def points(before: float, after: float) -> str:
    """The difference of two fractions.

    >>> points(0.978, 0.983)
    '+0.5 points'
    """
    return f"{signed(100 * (after - before))} points"


def signed(value: float, digits: int = 1) -> str:
    """With its sign."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def is_worse(metric: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a measured metric is worse than another by more than both standard errors."""
    loss = now["value"] - before["value"]
    loss = loss if lower_is_better(metric) else -loss
    return loss > math.hypot(now.get("stderr") or 0.0, before.get("stderr") or 0.0)


def metric_name(metric: str) -> str:
    """As words; ``METRIC@NAME`` is one on another data set.

    >>> metric_name("per_class_accuracy"), metric_name("perplexity@my_books")
    ('per class accuracy', 'perplexity on my_books')
    """
    name, _, other = metric.partition("@")
    return name.replace("_", " ") + (f" on {other}" if other else "")


def metric_value(metric: str, value: float, spread: float | None = None) -> str:
    """The value as people write it: percent for shares, three digits otherwise.

    Args:
        metric: Its name.
        value: Measured.
        spread: Its standard error, or its standard deviation over seeds; None = not known.

    >>> metric_value("accuracy", 0.978), metric_value("accuracy", 0.978, 0.0077)
    ('97.8 %', '97.8 ± 0.8 %')
    >>> metric_value("perplexity", 29.94, 1.44), metric_value("perplexity", 3120.0)
    ('29.9 ± 1.4', '3,120')
    """
    if not math.isfinite(value):
        return str(value)
    if spread is not None and not math.isfinite(spread):
        spread = None
    if is_share(metric):
        return share(value) if spread is None else f"{100 * value:.1f} ± {share(spread)}"
    text = whole(value) if abs(value) >= 1000 else f"{value:.{_METRIC_DIGITS}g}"
    return text if spread is None else f"{text} ± {spread:.2g}"


def metric_change(metric: str, before: float, after: float) -> str:
    """In points for shares, else in percent."""
    return points(before, after) if is_share(metric) else change(before, after)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.3g}{units[-1]}"
