"""The files of an expansion: table, plots and a page."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from sosp_hub.atomic import write_text
from sosp_hub.report import numbers
from sosp_hub.report.drawing import CUT, KEPT, MUTED, Picture, bare, new_figure
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import new_console, show_files
from sosp_hub.report.markup import block, escaped, markdown
from sosp_hub.report.page import Part, render_page
from sosp_hub.report.study_numbers import RULE, Compared, Spread

VARIANTS = ("base", "bottlenecks widened", "all widened")
_COLOURS = dict(zip(VARIANTS, (MUTED, CUT, KEPT), strict=True))
_MARKERS = dict(zip(VARIANTS, "soD", strict=True))


def write_expansion(results: Mapping[str, Any], folder: Path, *, figures: bool = True) -> None:
    """Writes ``results.json``, ``table.md``, the figures and ``report.html``.

    Args:
        results: Rows, and what was found with each seed.
        folder: Is there, and empty.
        figures: Draw the figures, and the page that shows them.
    """
    compared = Compared(results)
    differences = [each.record() for each in _differences(compared)]
    whole = {**results, "summary": compared.summary(), "differences": differences}
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    drawn = _pictures(compared) if figures else []
    for picture in drawn:
        picture.save(folder / f"{picture.name}.png")
    grid = _grid(compared)
    words = list(_words(compared))
    parts = [
        f"# Expand-pruning of {markdown(results['model'])}",
        grid.markdown(),
        "\n".join(f"- {markdown(point)}" for point in words),
        *(f"![{markdown(picture.title)}]({picture.name}.png)" for picture in drawn),
    ]
    if results["command"]:
        parts.append(block(results["command"]))
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    if figures:
        page = render_page(
            title=folder.name,
            headline=words[0],
            tiles=(),
            tables=(grid,),
            drawn=drawn,
            parts=[
                Part("What was found", tuple(words[1:])),
                Part("Reproduce it", code=f"{results['command']}\n\n{results['recipe']}".strip()),
            ],
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def brief(results: Mapping[str, Any], output: Path) -> None:
    """Prints the table and the files."""
    console = new_console()
    console.print(_grid(Compared(results)).terminal())
    show_files(console, output)


def _grid(compared: Compared) -> Grid:
    name = compared.metrics[0]
    titles = [title for _, title in compared.stages]
    head = ("budget", "model", "parameters", "trained", "left", "MACs", *titles)
    rows = [
        (
            budget,
            variant,
            _mean(_cost(compared, variant, budget, "before", "params")),
            _shown(name, compared.metric(variant, budget, "dense", name)),
            _mean(_cost(compared, variant, budget, "after", "params")),
            _mean(_cost(compared, variant, budget, "after", "macs")),
            *(
                _shown(name, compared.metric(variant, budget, stage, name))
                for stage, _ in compared.stages
            ),
        )
        for budget in compared.budgets
        for variant in VARIANTS
    ]
    title = f"{numbers.metric_name(name)} at the same cost"
    return Grid(title, head, tuple(rows), num_left=2)


def _cost(compared: Compared, variant: str, budget: str, when: str, unit: str) -> Spread:
    spread = compared.of(variant, budget, lambda cell: cell["cost"][when][unit])
    assert spread is not None
    return spread


def _words(compared: Compared) -> Iterator[str]:
    """What was widened, by how much, and which differences are real."""
    results = compared.results
    section, seeds = results["expand"], results["found"]
    often: dict[str, int] = {}
    for seed in seeds:
        for name in seed["bottlenecks"]:
            often[name] = often.get(name, 0) + 1
    named = ", ".join(f"{name} ({number} of {len(seeds)})" for name, number in often.items())
    yield (
        f"Bottlenecks, of which a cut to {results['paper']} on paper takes less than "
        f"{section['threshold']:g} times the share it takes of all structures, by seed: {named}."
    )
    factor = Spread(tuple(seed["factor"] for seed in seeds))
    yield (
        f"Widened {section['widen']:g} times ({section['init']}); with all layers "
        f"{factor.mean:.3f} times as wide the model has as many parameters. All three models were "
        "trained again as long, scored, and cut to what the base's share costs."
    )
    many = len(results["seeds"]) > 1
    yield f"Seeds {', '.join(map(str, results['seeds']))}: " + (
        f"± is the standard deviation over them. {RULE}"
        if many
        else "one seed has no spread, and nothing is claimed."
    )
    if many:
        for each in _differences(compared):
            claim = "larger than" if each.is_real else "within"
            yield (
                f"{each.budget}, {dict(compared.stages)[each.stage]}: {each.better} over "
                f"{each.worse} {each}, {claim} the seed spread."
            )


def _differences(compared: Compared) -> Iterator[Any]:
    stage = compared.stages[-1][0]
    for budget in compared.budgets:
        for other in (VARIANTS[0], VARIANTS[2]):
            yield compared.difference(VARIANTS[1], other, budget, stage)


def _pictures(compared: Compared) -> list[Picture]:
    name = compared.metrics[0].replace("_", " ")
    return [
        Picture(
            "parameters",
            f"{name} over parameters",
            "Mean over the seeds, bars are one standard deviation; hollow marks: before the cut.",
            lambda: _draw_parameters(compared),
        ),
        Picture(
            "ratios",
            "Share of each layer that goes",
            "The cut of the base on paper, mean over the seeds; what is below the line in a seed "
            "is widened.",
            lambda: _draw_ratios(compared),
        ),
    ]


def _draw_parameters(compared: Compared) -> Figure:
    name = compared.metrics[0]
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    stage = compared.stages[-1][0]
    for variant in VARIANTS:
        style: dict[str, Any] = {"color": _COLOURS[variant], "marker": _MARKERS[variant]}
        points = []
        for budget in compared.budgets:
            result = compared.metric(variant, budget, stage, name)
            params = _cost(compared, variant, budget, "after", "params").mean
            points.append((params, result.mean, result.std or 0.0))
        x, y, spread = np.array(sorted(points)).T
        axes.errorbar(x, y, yerr=spread, capsize=2, elinewidth=0.8, label=variant, **style)
        dense = compared.metric(variant, compared.budgets[0], "dense", name)
        before = _cost(compared, variant, compared.budgets[0], "before", "params").mean
        axes.errorbar(
            before, dense.mean, yerr=dense.std or 0.0, capsize=2, fillstyle="none", **style
        )
    if numbers.is_share(name):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel(numbers.metric_name(name))
    axes.legend(frameon=False)
    bare(axes, grid="y")
    return figure


def _draw_ratios(compared: Compared) -> Figure:
    seeds = compared.results["found"]
    names = [escaped(group["name"], "figure") for group in seeds[0]["groups"]]
    shares = np.array([[1 - g["kept"] / g["size"] for g in seed["groups"]] for seed in seeds])
    often = [sum(name in seed["bottlenecks"] for seed in seeds) for name in names]
    figure = new_figure(max(5.0, 1.5 + 0.28 * len(names)), 3.6)
    axes = figure.subplots()
    place = np.arange(len(names))
    colours = [CUT if number else MUTED for number in often]
    axes.bar(place, shares.mean(0), yerr=shares.std(0), color=colours, ecolor=MUTED, capsize=2)
    limit = float(np.mean([seed["limit"] for seed in seeds]))
    axes.axhline(limit, color=CUT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xticks(place, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("structures that go")
    bare(axes, grid="y")
    return figure


def _shown(name: str, spread: Spread) -> str:
    return numbers.metric_value(name, spread.mean, spread.std)


def _mean(spread: Spread) -> str:
    return numbers.whole(spread.mean)
