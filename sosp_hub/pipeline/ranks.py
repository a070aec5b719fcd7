"""How alike the orders are in which criteria would remove structures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


def rank_correlations(
    scores: "Mapping[tuple[tuple[str, ...], int], Mapping[str, Saliency]]",
) -> list[dict[str, Any]]:
    """Spearman's correlation between criteria over all structures that both score, mean over seeds.

    Args:
        scores: For each (kinds, seed) the saliency by criterion.

    Returns:
        For each set of kinds that two criteria or more have scored: ``kinds``, ``criteria``, the
        ``matrix``; None in it where a criterion gave every
        structure the same score, or two scored no group in common.
    """
    tables = []
    for kinds in dict.fromkeys(kinds for kinds, _ in scores):
        seeds = [by_criterion for (k, _), by_criterion in scores.items() if k == kinds]
        names = list(seeds[0])
        if len(names) > 1:
            mean = np.mean([_matrix([one[name] for name in names]) for one in seeds], axis=0)
            matrix = [[None if np.isnan(x) else float(x) for x in row] for row in mean]
            tables.append({"kinds": list(kinds), "criteria": names, "matrix": matrix})
    return tables


def _matrix(saliencies: "Sequence[Saliency]") -> NDArray[np.float64]:
    return np.array([[_correlation(one, other) for other in saliencies] for one in saliencies])


def _correlation(one: "Saliency", other: "Saliency") -> float:
    """Over the groups that both have scored; nan where there is nothing to compare."""
    shared = [group for group in one if group in other]
    if not shared:
        return np.nan
    rows = [
        ranks(np.concatenate([scores[group].double().numpy() for group in shared]))
        for scores in (one, other)
    ]
    first, second = (row - row.mean() for row in rows)
    size = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / size) if size else np.nan


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs.

    >>> ranks(np.array([0.5, 2.0, 0.5, 1.0]))
    array([1.5, 4. , 1.5, 3. ])
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
