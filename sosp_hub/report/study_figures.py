"""The plots of a comparison: quality over cost, and how alike criteria rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from sosp_hub.errors import HubError
from sosp_hub.report.drawing import INK, MUTED, Picture, bare, new_figure
from sosp_hub.report.facts import read_recipe
from sosp_hub.report.markup import escaped
from sosp_hub.report.numbers import is_share, metric_name
from sosp_hub.report.study_numbers import Compared
from sosp_hub.untrusted import read_json

_COSTS = (("macs", "MACs"), ("params", "parameters"))
_MARKERS = "osD^vP*X<>"


def comparison_pictures(compared: Compared) -> list[Picture]:
    """Every plot that there are numbers for."""
    name = metric_name(compared.metrics[0])
    drawn = [
        Picture(
            f"pareto_{unit}",
            f"{name} over {words}",
            "Mean over the seeds, bars are one standard deviation; the dashed line is the dense "
            "model. Dotted lines are of plans with compensation.",
            lambda unit=unit, words=words: draw_pareto(compared, unit, words),
        )
        for unit, words in _COSTS
    ]
    drawn += [
        Picture(
            "ranks" if number == 0 else f"ranks_{number + 1}",
            f"Rank correlation between criteria ({', '.join(one['kinds'])})",
            "Spearman's correlation over the structures that both score, mean over the seeds.",
            lambda one=one: draw_ranks(one),
        )
        for number, one in enumerate(compared.results["rank_correlations"])
    ]
    return drawn


def study_picture(folder: Path, report: Mapping[str, Any]) -> Picture | None:
    """Quality over MACs from ``compare/results.json`` beside a run; None of another model.

    Args:
        folder: Of the run. ``python -m sosp_hub.compare`` writes the file.
        report: Of the run.

    Raises:
        HubError: The file is damaged.
    """
    path = folder / "compare" / "results.json"
    if not path.is_file():
        return None
    try:
        compared = Compared(read_json(path))
        model = read_recipe(str(report.get("recipe") or "")).get("model") or {}
        if compared.results["model"] != model.get("id"):
            return None
        return comparison_pictures(compared)[0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise HubError(
            f"{path}: these are not the results of a comparison ({type(error).__name__}: {error}); "
            f"copy results.json from the output of python -m sosp_hub.compare, or remove it"
        ) from error


def draw_pareto(compared: Compared, unit: str, words: str) -> Figure:
    """A panel for each stage, a line for each criterion."""
    name = compared.metrics[0]
    num = len(compared.stages)
    figure = new_figure(2.6 + 3.1 * num, max(3.6, 0.9 + 0.17 * len(compared.criteria)))
    panels = figure.subplots(1, num, squeeze=False, sharey=True)[0]
    styles = _styles(compared)
    for axes, (stage, title) in zip(panels, compared.stages, strict=True):
        for criterion in compared.criteria:
            points = [
                (
                    compared.kept(criterion, budget, unit).mean,
                    (result := compared.metric(criterion, budget, stage, name)).mean,
                    result.std or 0.0,
                )
                for budget in compared.budgets
            ]
            x, y, spread = np.array(sorted(points)).T
            axes.errorbar(x, y, yerr=spread, capsize=2, elinewidth=0.8, **styles[criterion])
        axes.axhline(compared.dense(name).mean, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_title(title, loc="left")
        axes.set_xlabel(f"{words} that are kept")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.08, y=0.06)
        _scale(axes, name)
        bare(axes, grid="y")
    panels[0].set_ylabel(escaped(metric_name(name), "figure"))
    handles = [Line2D([], [], **styles[criterion]) for criterion in compared.criteria]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _scale(axes: Axes, metric: str) -> None:
    if is_share(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif metric == "perplexity":
        axes.set_yscale("log")


def _styles(compared: Compared) -> dict[str, dict[str, Any]]:
    """A colour for each criterion; with compensation the same one, dotted."""
    colours = matplotlib.colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    plain: dict[str, int] = {}
    styles = {}
    for one in compared.results["criteria"]:
        rest = str(
            {k: v for k, v in one.items() if k not in ("label", "compensate", "compensate_steps")}
        )
        number = plain.setdefault(rest, len(plain))
        styles[one["label"]] = {
            "color": colours[(2 * number) % 20 + (number // 10) % 2],
            "marker": _MARKERS[(number + number // 20) % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 2.0 if one["name"].startswith("sosp") else 1.1,
            "linestyle": ":" if one.get("compensate") else "-",
            "label": escaped(one["label"], "figure"),
        }
    return styles


def draw_ranks(ranks: Mapping[str, Any]) -> Figure:
    """The matrix, with its numbers."""
    names = [escaped(name, "figure") for name in ranks["criteria"]]
    matrix = np.array([[np.nan if x is None else x for x in row] for row in ranks["matrix"]])
    side = 2.2 + 0.42 * len(names)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    place = np.arange(len(names))
    axes.set_xticks(place, names, rotation=45, ha="right", rotation_mode="anchor", color=INK)
    axes.set_yticks(place, names, color=INK)
    for row in range(len(names)):
        for column in range(len(names)):
            value = matrix[row, column]
            axes.text(
                column,
                row,
                "" if np.isnan(value) else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.7 else INK,
            )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, which="both")
    figure.colorbar(image, ax=axes, shrink=0.7, label="Spearman's rank correlation")
    return figure
