"""What a run says at its end: before and after, and where the files are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sosp_hub.report import numbers
from sosp_hub.report.facts import STAGES, collect, overall_metrics, with_spread
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import new_console, show_files
from sosp_hub.report.markup import escaped


def show_result(report: Mapping[str, Any], output: Path) -> None:
    """Prints the before/after tables and the files of a finished run."""
    console = new_console()
    facts = collect(report)
    console.print(facts.costs.terminal())
    if overall_metrics(report["metrics"]):  # cut from stored scores, nothing may be measured
        console.print(_quality(report["metrics"]).terminal())
    if facts.drops.rows:
        console.print(facts.drops.terminal())
    for line in facts.promise:
        console.print(escaped(line, "terminal"))
    if facts.curve.rows:
        console.print(facts.curve.terminal())
    for line in facts.made_up:
        console.print(escaped(line, "terminal"))
    if facts.made_up:
        console.print()
    show_files(console, output)
    place = escaped(str(output), "terminal")
    console.out(f'\nLoad it: sosp_hub.from_pretrained("{place}")', highlight=False)


def _quality(metrics: Mapping[str, Any]) -> Grid:
    """A row for each stage: of three metrics at most, a terminal has the width."""
    names = overall_metrics(metrics)
    rows: list[tuple[str, ...]] = [
        (label, *(with_spread(name, metrics[stage][name]) for name in names))
        for stage, label in STAGES
        if metrics.get(stage)
    ]
    pairs = [(metrics["dense"][name]["value"], metrics["final"][name]["value"]) for name in names]
    changes = [numbers.metric_change(n, *pair) for n, pair in zip(names, pairs, strict=True)]
    rows.append(("change", *changes))
    note = f"n = {metrics['final'][names[0]]['n']:,}; ± one standard error"
    return Grid("Quality", ("", *map(numbers.metric_name, names)), tuple(rows), note)
