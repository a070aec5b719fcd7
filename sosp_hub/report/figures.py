"""The pictures of a card: what was kept where, the scores, what the cut cost and what was won back.

Every function draws from plain data into a matplotlib figure; pyplot's global state is not touched.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from sosp_hub.report.drawing import (
    CUT,
    INK,
    KEPT,
    KIND_COLOURS,
    MOST_DRAWN,
    MOST_NAMED_GROUPS,
    MUTED,
    PALE,
    Picture,
    bare,
    kind_words,
    new_figure,
    short_name,
    tick_names,
)
from sosp_hub.report.facts import STAGES, overall_metrics
from sosp_hub.report.listing import CURVATURE, SALIENCY
from sosp_hub.report.markup import escaped
from sosp_hub.report.matrices import draw_correlation
from sosp_hub.report.numbers import is_share, metric_name, metric_value, share, whole
from sosp_hub.report.study_figures import study_picture


def pictures(
    report: Mapping[str, Any],
    saliency: Mapping[str, NDArray[Any]],
    folder: Path | None = None,
) -> list[Picture]:
    """The pictures that this report has the data for; what was not measured is not drawn.

    Args:
        report: What ``sosp_report.json`` holds.
        saliency: One float per structure and group.
        folder: Where ``curvature.safetensors`` is, for runs that measured correlations, and
            ``compare/results.json``, where there is a study of the same model.
    """
    drawn = []
    groups = report.get("groups") or []
    kept = (report.get("plan") or {}).get("kept") or {}
    floors = ((report.get("plan") or {}).get("provenance") or {}).get("floors") or ()
    if groups:
        drawn.append(
            Picture(
                "widths",
                "Kept share per layer",
                "Kept structures of each group, from input to output; pale is the dense width.",
                lambda: draw_widths(groups, floors),
            )
        )
    scored = [group for group in groups if group["name"] in saliency]
    if scored:
        drawn.append(
            Picture(
                "saliency",
                "Saliency per layer",
                "Each dot is one structure; on the right the distribution over all groups.",
                lambda: draw_saliency(scored, saliency, kept),
            )
        )
    path = folder / CURVATURE if folder is not None else None
    if path is not None and path.is_file():
        drawn.append(
            Picture(
                "correlation",
                "Correlation of structures",
                "How far two structures change the output alike; lines are between groups.",
                lambda: _draw_curvature(path, groups),
            )
        )
    metrics = report.get("metrics") or {}
    if len([stage for stage, _ in STAGES if metrics.get(stage)]) > 1 and overall_metrics(metrics):
        drawn.append(
            Picture(
                "recovery",
                "Metrics before the cut, after it, and after recovery",
                "Bars are 95 % intervals of the measurement; the dashed line is the dense model.",
                lambda: draw_recovery(metrics),
            )
        )
    study = study_picture(folder, report) if folder is not None else None
    return [*drawn, study] if study is not None else drawn


def write_figures(
    report: Mapping[str, Any],
    folder: str | Path,
    saliency: Mapping[str, NDArray[Any]] | None = None,
) -> list[Picture]:
    """Draws every picture the report has data for into ``folder/figures/NAME.png``.

    Args:
        report: What ``sosp_report.json`` holds.
        folder: The model's folder.
        saliency: One float per structure and group; None reads ``saliency.safetensors`` there.

    Returns:
        The pictures that were written.
    """
    folder = Path(folder)
    scores = read_saliency(folder) if saliency is None else saliency
    drawn = pictures(report, scores, folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        picture.save(folder / "figures" / f"{picture.name}.png")
    return drawn


def read_saliency(folder: Path) -> dict[str, NDArray[Any]]:
    """The full scores that a run leaves beside its report; empty where there are none."""
    path = folder / SALIENCY
    if not path.is_file():
        return {}
    return load_file(path)


def _draw_curvature(path: Path, groups: Sequence[Mapping[str, Any]]) -> Figure:
    """The matrix that a run leaves beside its report, with its groups as the report has them."""
    with safe_open(path, "np") as file:
        names = json.loads(file.metadata()["about"])["groups"]
        by_name = {group["name"]: group for group in groups}
        if "factor" in file.keys():  # noqa: SIM118 no dict
            factor = file.get_tensor("factor")
            step = -(-factor.shape[1] // MOST_DRAWN)
            matrix = factor[:, ::step].T @ factor[:, ::step]
        else:
            matrix, step = file.get_tensor("matrix"), 1
    return draw_correlation(matrix, [by_name[name] for name in names], step)


def draw_widths(groups: Sequence[Mapping[str, Any]], floors: Iterable[str] = ()) -> Figure:
    """Kept width of each group: named rows for a small network, columns per kind for a deep one."""
    return (
        _rows(groups, set(floors))
        if len(groups) <= MOST_NAMED_GROUPS
        else _columns(groups, set(floors))
    )


def _rows(groups: Sequence[Mapping[str, Any]], floors: set[str]) -> Figure:
    figure = new_figure(7.2, 0.9 + 0.27 * len(groups))
    axes = figure.subplots()
    place = np.arange(len(groups))
    kept = _shares(groups)
    axes.barh(place, np.ones(len(groups)), height=0.72, color=PALE)
    axes.barh(place, kept, height=0.72, color=[_colour(group) for group in groups])
    for row, group in enumerate(groups):
        floor = "  (at its floor)" if group["name"] in floors else ""
        label = f"{group['kept']:,} of {group['size']:,}{floor}"
        axes.text(1.015, row, label, va="center", fontsize=8)
    axes.set_yticks(place, [short_name(group) for group in groups], color=INK)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _mean_line(axes.axvline, groups)
    bare(axes, grid="x")
    _kind_legend(figure, groups)
    return figure


def _columns(groups: Sequence[Mapping[str, Any]], floors: set[str]) -> Figure:
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    figure = new_figure(8.2, 0.7 + 1.75 * len(kinds))
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        members = [group for group in groups if group["kind"] == kind]
        place = np.arange(len(members))
        axes.bar(place, np.ones(len(members)), width=0.82, color=PALE)
        axes.bar(place, _shares(members), width=0.82, color=_colour(members[0]))
        bitten = [i for i, group in enumerate(members) if group["name"] in floors]
        if bitten:
            axes.plot(
                bitten, [0.05] * len(bitten), "v", color=CUT, markersize=4, label="at its floor"
            )
            axes.legend(frameon=False, fontsize=8, loc="upper right")
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.7, len(members) - 0.3)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        kept, size = (sum(group[key] for group in members) for key in ("kept", "size"))
        words = f"{kind_words(kind)}: {whole(kept)} of {whole(size)} kept"
        axes.set_title(f"{words} ({share(kept / size, 0)})", loc="left")
        _mean_line(axes.axhline, members)
        bare(axes, grid="y")
    panels[-1].set_xlabel("group, from input to output")
    return figure


def draw_saliency(
    groups: Sequence[Mapping[str, Any]],
    saliency: Mapping[str, NDArray[Any]],
    kept: Mapping[str, Sequence[int]],
) -> Figure:
    """Every structure's score by layer, kept and cut apart; beside it the distribution."""
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    named = len(groups) <= MOST_NAMED_GROUPS
    figure = new_figure(8.2, 0.9 + 2.6 * len(kinds) + 0.4 * named)
    panels = figure.subplots(len(kinds), 2, squeeze=False, sharey="row", width_ratios=(4, 1))
    for (strip, side), kind in zip(panels, kinds, strict=True):
        members = [group for group in groups if group["kind"] == kind]
        _strip(strip, side, members, saliency, kept)
        if len(kinds) > 1:
            strip.set_title(kind_words(kind), loc="left")
        if named:
            strip.set_xticks(
                np.arange(len(members)),
                tick_names(members),
                rotation=45,
                ha="right",
                rotation_mode="anchor",
                color=INK,
            )
        else:
            strip.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not named:
        panels[-1, 0].set_xlabel("group, from input to output")
    panels[-1, 1].set_xlabel("structures")
    figure.supylabel("saliency (higher = keep)", fontsize=9)
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colour, label=name)
        for colour, name in ((KEPT, "kept"), (CUT, "cut"))
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _strip(
    strip: Axes,
    side: Axes,
    groups: Sequence[Mapping[str, Any]],
    saliency: Mapping[str, NDArray[Any]],
    kept: Mapping[str, Sequence[int]],
) -> None:
    values = [np.asarray(saliency[group["name"]], dtype=np.float64) for group in groups]
    every = np.concatenate(values)
    mask = np.concatenate(
        [_keep_mask(g["name"], len(v), kept) for g, v in zip(groups, values, strict=True)]
    )
    place = np.repeat(np.arange(len(groups)), [len(v) for v in values]).astype(np.float64)
    place += np.random.default_rng(0).uniform(-0.32, 0.32, size=place.size)
    height = _score_scale(strip, every)
    bins = _bins(strip, height)
    many = every.size > 4000
    for colour, chosen in ((CUT, ~mask), (KEPT, mask)):
        strip.scatter(
            place[chosen],
            height[chosen],
            s=2 if many else 10,
            alpha=0.35 if many else 0.75,
            color=colour,
            linewidths=0,
            rasterized=many,
        )
        side.hist(
            height[chosen], bins=bins.tolist(), orientation="horizontal", color=colour, alpha=0.6
        )
    strip.set_xlim(-0.7, len(groups) - 0.3)
    bare(strip, grid="y")
    bare(side, grid="y")


def draw_recovery(metrics: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Each metric at each stage, with the spread of its measurement."""
    names = overall_metrics(metrics)[:3]
    figure = new_figure(1.4 + 3.4 * len(names), 3.2)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        measured = [
            (label, metrics[s][name]) for s, label in STAGES if name in (metrics.get(s) or {})
        ]
        values = np.array([metric["value"] for _, metric in measured], dtype=np.float64)
        spread = np.array([1.96 * (metric.get("stderr") or 0.0) for _, metric in measured])
        place = np.arange(len(measured))
        axes.plot(place, values, color=PALE, linewidth=2.5, zorder=1)
        colours = [CUT if label == "after the cut" else KEPT for label, _ in measured]
        axes.errorbar(
            place,
            values,
            yerr=spread,
            fmt="none",
            ecolor=MUTED,
            elinewidth=1.2,
            capsize=3,
            zorder=2,
        )
        axes.scatter(place, values, s=52, color=colours, zorder=3)
        for x, (_, metric), half in zip(place, measured, spread, strict=True):
            axes.annotate(
                metric_value(name, metric["value"]),
                (x, metric["value"] + half),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        if measured[0][0] == "dense":
            axes.axhline(values[0], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.margins(x=0.14, y=0.18)
        if is_share(name):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.yaxis.set_major_locator(FixedLocator(_share_ticks(*axes.get_ylim())))
        elif values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(place, [label.replace(" ", "\n", 1) for label, _ in measured], color=INK)
        axes.set_title(escaped(metric_name(name), "figure"), loc="left")
        bare(axes, grid="y")
    return figure


def pareto_picture(runs: Mapping[str, Mapping[str, Any]], metric: str) -> Picture:
    """Final quality over cost of several runs, each named by its criterion."""
    return Picture(
        "pareto",
        f"{metric} over the share of MACs that is kept",
        "Each dot is one pruned model, with a 95 % interval; the dashed line is the dense model.",
        lambda: draw_pareto(runs, metric),
    )


def draw_pareto(runs: Mapping[str, Mapping[str, Any]], metric: str) -> Figure:
    """Quality over the kept share of MACs; runs of one criterion are joined."""
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    dense = []
    for report in runs.values():
        cost, metrics = report["cost"], report["metrics"]
        final = metrics["final"][metric]
        point = (
            cost["after"]["macs"] / cost["before"]["macs"],
            final["value"],
            1.96 * (final.get("stderr") or 0.0),
        )
        name = escaped(str((report.get("criterion") or {}).get("name")), "figure")
        lines.setdefault(name, []).append(point)
        if metric in (metrics.get("dense") or {}):
            dense.append(metrics["dense"][metric]["value"])
    colours = list(KIND_COLOURS.values())
    for i, (name, points) in enumerate(sorted(lines.items())):
        x, y, spread = (np.array(column) for column in zip(*sorted(points), strict=True))
        colour = colours[i % len(colours)]
        axes.errorbar(
            x, y, yerr=spread, color=colour, marker="o", capsize=3, linewidth=1.6, label=name
        )
    if dense:
        axes.axhline(float(np.mean(dense)), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if is_share(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("multiply-accumulates that are kept")
    axes.set_ylabel(escaped(metric_name(metric), "figure"))
    axes.margins(x=0.08, y=0.1)
    figure.legend(loc="outside upper left", ncols=min(len(lines), 5), frameon=False)
    bare(axes, grid="y")
    return figure


def _shares(groups: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    return np.array([group["kept"] / group["size"] for group in groups])


def _colour(group: Mapping[str, Any]) -> str:
    return KIND_COLOURS.get(group["kind"], MUTED)


def _share_ticks(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [tick for tick in ticks if low <= tick <= min(high, 1.0)]


def _mean_line(draw: Callable[..., Any], groups: Sequence[Mapping[str, Any]]) -> None:
    mean = sum(group["kept"] for group in groups) / sum(group["size"] for group in groups)
    draw(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))


def _kind_legend(figure: Figure, groups: Sequence[Mapping[str, Any]]) -> None:
    mean = sum(group["kept"] for group in groups) / sum(group["size"] for group in groups)
    handles: list[Any] = [
        Patch(color=KIND_COLOURS.get(kind, MUTED), label=kind_words(kind))
        for kind, _ in groupby(sorted(group["kind"] for group in groups))
    ]
    handles.append(
        Line2D(
            [],
            [],
            color=INK,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            label=f"all groups: {share(mean, 0)} kept",
        )
    )
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)


def _keep_mask(name: str, size: int, kept: Mapping[str, Sequence[int]]) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=bool)
    mask[list(kept[name]) if name in kept else slice(None)] = True
    return mask


def _score_scale(axes: Axes, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log axis for positive scores (zeros go to its lower edge), a plain one for signed scores."""
    positive = scores[scores > 0]
    if not positive.size or scores.min() < 0 or positive.max() < 20 * positive.min():
        return scores
    axes.set_yscale("log")
    return np.maximum(scores, positive.min() / 2)


def _bins(axes: Axes, values: NDArray[np.float64]) -> NDArray[np.float64]:
    number = int(np.clip(np.sqrt(values.size), 8, 36))
    low, high = values.min(), values.max()
    if axes.get_yscale() == "log":
        return np.geomspace(low, high, number + 1)
    return np.linspace(low, high if high > low else low + 1.0, number + 1)
