"""What a run says at its end: before and after, and where the files are."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from sosp_hub.report import numbers
from sosp_hub.report.facts import (
    NO_SPREAD,
    STAGES,
    collect,
    compared_with,
    overall_metrics,
    with_spread,
)
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import new_console, show_files
from sosp_hub.report.markup import escaped, html


class Report(dict[str, Any]):
    """What a run measured: a dictionary that prints as the tables of its end."""

    def __str__(self) -> str:
        """Cost, quality and what was made up for, before and after."""
        console = new_console(io.StringIO())
        _print(console, self)
        return console.file.getvalue().strip("\n").rstrip()  # pyright: ignore[reportAttributeAccessIssue]

    def _repr_html_(self) -> str:
        return "".join(
            part.html() if isinstance(part, Grid) else f"<p>{html(part)}</p>"
            for part in _parts(self)
        )


def show_result(report: Mapping[str, Any], output: Path) -> None:
    """Prints the before/after tables and the files of a finished run."""
    console = new_console()
    _print(console, report)
    show_files(console, output)
    place = escaped(str(output), "terminal")
    console.out(f'\nLoad it: sosp_hub.from_pretrained("{place}")', highlight=False)


def _print(console: Console, report: Mapping[str, Any]) -> None:
    after_table = True
    for part in _parts(report):
        if isinstance(part, Grid) or after_table:
            console.print()
        after_table = isinstance(part, Grid)
        console.print(part.terminal() if isinstance(part, Grid) else escaped(part, "terminal"))
    console.print()


def _parts(report: Mapping[str, Any]) -> Iterator[Grid | str]:
    facts = collect(report)
    yield facts.costs
    if overall_metrics(report["metrics"]):  # cut from stored scores, nothing may be measured
        yield _quality(report["metrics"])
    if facts.drops.rows:
        yield facts.drops
    yield from facts.promise
    if facts.curve.rows:
        yield facts.curve
    yield from (line for line in (facts.masks, *facts.made_up) if line)


def _quality(metrics: Mapping[str, Any]) -> Grid:
    """A row for each stage: of three metrics at most, a terminal has the width."""
    names = overall_metrics(metrics)
    rows: list[tuple[str, ...]] = [
        (label, *(with_spread(name, metrics[stage][name]) for name in names))
        for stage, label in STAGES
        if metrics.get(stage)
    ]
    before = compared_with(metrics)[0]
    if before:
        pairs = [(before[name]["value"], metrics["final"][name]["value"]) for name in names]
        changes = [numbers.metric_change(n, *pair) for n, pair in zip(names, pairs, strict=True)]
        rows.append(("change", *changes))
    spread = any("±" in cell for row in rows for cell in row)
    error = "± one standard error" if spread else NO_SPREAD.lower()
    note = f"n = {metrics['final'][names[0]]['n']:,}; {error}"
    return Grid("Quality", ("", *map(numbers.metric_name, names)), tuple(rows), note)
