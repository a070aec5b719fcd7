"""The files of a comparison: tables, plots and a page."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sosp_hub.atomic import write_text
from sosp_hub.report import numbers
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import new_console, show_files
from sosp_hub.report.markup import block, markdown
from sosp_hub.report.page import Part, render_page
from sosp_hub.report.study_figures import comparison_pictures
from sosp_hub.report.study_numbers import RULE, Compared, Difference, Spread


def write_comparison(results: Mapping[str, Any], folder: Path, *, figures: bool = True) -> None:
    """Writes ``results.json``, ``results.csv``, ``table.md``, ``report.html`` and the figures.

    Args:
        results: Cells, and what belongs to a criterion or a seed.
        folder: Is there, and empty.
        figures: Draw the figures, and the page that shows them.
    """
    compared = Compared(results)
    whole = {
        **results,
        "summary": compared.summary(),
        "differences": [difference.record() for difference in compared.differences()],
    }
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    write_text(folder / "results.csv", _cells(compared).csv())
    pictures = comparison_pictures(compared) if figures else []
    for picture in pictures:
        picture.save(folder / f"{picture.name}.png")
    table = _markdown(compared, [(p.name, p.title) for p in pictures])
    write_text(folder / "table.md", table)
    if figures:
        page = render_page(
            title=folder.name,
            headline=_headline(compared),
            tiles=(),
            tables=_grids(compared),
            drawn=pictures,
            parts=[
                Part("Which differences are larger than the seed spread", tuple(_words(compared))),
                Part("How it was measured", tuple(_notes(compared))),
                Part("Reproduce it", code=f"{results['command']}\n\n{results['recipe']}".strip()),
            ],
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def brief(results: Mapping[str, Any], output: Path) -> None:
    """Prints a table for each budget and the files."""
    console = new_console()
    for grid in _grids(Compared(results)):
        console.print(grid.terminal())
    show_files(console, output)


def _headline(compared: Compared) -> str:
    results = compared.results
    name, seeds = compared.metrics[0], results["seeds"]
    return (
        f"{len(compared.criteria)} criteria on {results['model']} at {len(compared.budgets)} "
        f"budget{'s' * (len(compared.budgets) > 1)} with {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}; {name.replace('_', ' ')} of the dense model: "
        f"{_shown(name, compared.dense(name))}."
    )


def _grids(compared: Compared) -> list[Grid]:
    name = compared.metrics[0]
    head = (
        "criterion",
        *(title for _, title in compared.stages),
        "MACs",
        "parameters",
        "latency",
        "scoring",
        "peak memory",
    )
    return [
        Grid(
            f"{name.replace('_', ' ')} with a budget of {budget}",
            head,
            tuple(
                (
                    criterion,
                    *(
                        _shown(name, compared.metric(criterion, budget, stage, name))
                        for stage, _ in compared.stages
                    ),
                    *(numbers.share(compared.kept(criterion, budget, x).mean) for x in _KEPT),
                    _one(compared.of(criterion, budget, _latency_share), _whole_percent),
                    _one(compared.of(criterion, budget, _scoring_s), numbers.seconds),
                    _one(compared.of(criterion, budget, _peak_bytes), numbers.size),
                )
                for criterion in compared.ranked(budget)
            ),
        )
        for budget in compared.budgets
    ]


_KEPT = ("macs", "params")
_NAMED = 4  # criteria that are clearly behind a leader, the nearest; results.json has them all
_UNEQUAL = 0.05  # share of the MACs, between criteria at one budget, that has to be said


def _latency_share(cell: Mapping[str, Any]) -> float | None:
    latency = cell["latency"]
    return latency["after"]["seconds"] / latency["before"]["seconds"] if latency else None


def _scoring_s(cell: Mapping[str, Any]) -> float | None:
    return cell["scoring"]["seconds"]


def _peak_bytes(cell: Mapping[str, Any]) -> float | None:
    return cell["scoring"]["peak_bytes"]


def _notes(compared: Compared) -> Iterator[str]:
    results = compared.results
    n = results["cells"][0]["metrics"][compared.stages[0][0]][compared.metrics[0]]["n"]
    many = len(results["seeds"]) > 1
    seeds = ", ".join(map(str, results["seeds"]))
    spread = "± is the standard deviation over them" if many else "one seed has no spread"
    yield f"Seeds {seeds}: {spread}. Each measurement is of {n:,} test samples or tokens."
    yield (
        "MACs, parameters and latency (one forward pass, measured in turn with the dense model): "
        "the share that is left. Scoring: seconds and peak memory above what the process held."
    )
    for budget in compared.budgets:
        macs = [compared.kept(criterion, budget, "macs").mean for criterion in compared.criteria]
        if max(macs) - min(macs) > _UNEQUAL:
            yield (
                f"With {budget} the criteria keep from {_whole_percent(min(macs))} to "
                f"{_whole_percent(max(macs))} of the MACs: its table does "
                "not compare at equal cost, the plots over MACs do."
            )
    floors = sum(cell["floors"] > 0 for cell in results["cells"])
    if floors:
        yield (
            f"In {floors} of {len(results['cells'])} cells a floor, a tie or rounding kept more of "
            "some group than the scores alone."
        )
    latency = results["cells"][0]["latency"]
    if latency:
        on = latency["after"]
        yield (
            f"Latency on {on['hardware']}, {on['threads']} thread{'s' * (on['threads'] > 1)}, "
            f"batch of {on['batch']}, {on['dtype']}."
        )


def _words(compared: Compared) -> Iterator[str]:
    """A sentence for each budget and stage, and what compensation changes."""
    yield RULE
    if len(compared.results["seeds"]) == 1:
        yield "There is one seed, so nothing is said about any difference."
        return
    for budget in compared.budgets:
        for stage, title in compared.stages:
            leads = compared.leads(budget, stage)
            if leads:
                yield f"{budget}, {title}: {_lead(leads)}"
            changes = compared.compensations(budget, stage)
            if changes:
                against = "against the same without compensation"
                yield f"{budget}, {title}, {against}: {_changes(changes)}."


def _lead(leads: list[Difference]) -> str:
    real = [f"{lead.worse} ({lead})" for lead in leads if lead.is_real]
    near = [f"{lead.worse} ({lead})" for lead in leads if not lead.is_real]
    parts = []
    if real:
        rest = f" and {len(real) - _NAMED} more" if len(real) > _NAMED else ""
        parts.append(f"by more than the seed spread over {', '.join(real[:_NAMED])}{rest}")
    if near:
        parts.append(f"within the seed spread over {', '.join(near)}")
    return f"{leads[0].better} leads {'; '.join(parts)}."


def _changes(changes: list[Difference]) -> str:
    return ", ".join(
        f"{change.better} {change}{'' if change.is_real else ' (within the seed spread)'}"
        for change in changes
    )


def _markdown(compared: Compared, figures: list[tuple[str, str]]) -> str:
    parts = [f"# {markdown(compared.results['model'])}", markdown(_headline(compared))]
    for grid in _grids(compared):
        title = f"{grid.title[0].upper()}{grid.title[1:]}"
        parts += [f"## {markdown(title)}", grid.markdown()]
    for title, points in (
        ("Which differences are larger than the seed spread", _words(compared)),
        ("How it was measured", _notes(compared)),
    ):
        parts.append(f"## {title}")
        parts.append("\n".join(f"- {markdown(point)}" for point in points))
    parts += [f"![{markdown(title)}]({name}.png)" for name, title in figures]
    if compared.results["command"]:
        parts.append(block(compared.results["command"]))
    return "\n\n".join(parts) + "\n"


def _cells(compared: Compared) -> Grid:
    """A row for each cell, as they were measured."""
    measured = [(stage, name) for stage, _ in compared.stages for name in compared.metrics]
    costs = [(unit, when) for unit in (*_KEPT, "bytes") for when in ("before", "after")]
    head = (
        "criterion",
        "budget",
        "seed",
        *(f"{name}_{stage}" for stage, name in measured),
        *(f"{name}_dense" for name in compared.metrics),
        *(f"{unit}_{when}" for unit, when in costs),
        "structures_before",
        "structures_after",
        "latency_before_s",
        "latency_after_s",
        "scoring_s",
        "scoring_peak_bytes",
    )
    rows = []
    for cell in compared.results["cells"]:
        latency, dense = cell["latency"], compared.results["dense"][str(cell["seed"])]
        rows.append(
            (
                cell["criterion"],
                cell["budget"],
                cell["seed"],
                *(cell["metrics"][stage][name]["value"] for stage, name in measured),
                *(dense[name]["value"] for name in compared.metrics),
                *(cell["cost"][when][unit] for unit, when in costs),
                cell["structures"]["before"],
                cell["structures"]["after"],
                *(latency[when]["seconds"] if latency else "" for when in ("before", "after")),
                cell["scoring"]["seconds"],
                cell["scoring"]["peak_bytes"],
            )
        )
    return Grid("cells", head, tuple(rows))


def _shown(name: str, spread: Spread) -> str:
    return numbers.metric_value(name, spread.mean, spread.std)


def _one(spread: Spread | None, show: Any) -> str:
    return "" if spread is None else show(spread.mean)


def _whole_percent(share: float) -> str:
    return numbers.share(share, 0)
