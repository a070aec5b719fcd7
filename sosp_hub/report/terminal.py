"""What a run says at its end: before and after, and where the files are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sosp_hub.report.facts import STAGES, Row, collect, format_metric, overall_metrics


def show_result(report: Mapping[str, Any], output: Path) -> None:
    """Prints the before/after tables and the files of a finished run."""
    console = Console()
    console.print(_costs(report))
    if overall_metrics(report["metrics"]):  # cut from stored scores, nothing may be measured
        console.print(_metrics(report["metrics"]))
    facts = collect(report)
    if facts.drops:
        console.print(_drops(facts.drops))
    for line in facts.made_up:
        console.print(line, highlight=False)
    if facts.made_up:
        console.print()
    console.out(f"{output}/", style="bold", highlight=False)
    for path in sorted(output.iterdir()):
        what = _FILES.get(path.name, "weights" if path.suffix == ".safetensors" else "")
        size = f"{_bytes(path.stat().st_size):>9}" if path.is_file() else " " * 9
        name = path.name + ("/" if path.is_dir() else "")
        console.out(f"  {name:<24}{size}  {what}", highlight=False)
    console.out(f'\nLoad it: sosp_hub.from_pretrained("{output}")', highlight=False)


def _costs(report: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("cost")
    for label in ("dense", "pruned", "change"):
        table.add_column(label, justify="right")
    before, after = report["cost"]["before"], report["cost"]["after"]
    for key, label, show in (
        ("params", "parameters", _count),
        ("macs", "MACs of one input", _count),
        ("bytes", "size on disk", _bytes),
    ):
        change = _percent(before[key], after[key])
        table.add_row(label, show(before[key]), show(after[key]), change)
    if report.get("latency"):
        times = [report["latency"][when]["seconds"] for when in ("before", "after")]
        label = f"latency, batch of {report['latency']['after']['batch']}"
        table.add_row(label, _seconds(times[0]), _seconds(times[1]), _percent(*times))
    if report.get("peak_memory"):
        peaks = [report["peak_memory"][when]["bytes"] for when in ("before", "after")]
        label = f"peak memory, batch of {report['peak_memory']['after']['batch']}"
        table.add_row(label, _bytes(peaks[0]), _bytes(peaks[1]), _percent(*peaks))
    return table


def _metrics(metrics: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("quality")
    names = overall_metrics(metrics)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for key, label in STAGES:
        found = metrics.get(key)
        if found:
            table.add_row(label, *[_metric(name, found[name]) for name in names])
    table.add_row(
        "change", *[_change(name, metrics["dense"][name], metrics["final"][name]) for name in names]
    )
    table.caption = f"n = {metrics['final'][names[0]]['n']:,}; ± one standard error"
    return table


def _drops(drops: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("classes that lost most")
    for label in ("dense", "final", "change"):
        table.add_column(label, justify="right")
    for row in drops:
        table.add_row(row.name, row.before, row.after, row.change)
    return table


_FILES = {
    "README.md": "model card",
    "config.json": "configuration",
    "curvature.safetensors": "correlations of structures",
    "dense": "the dense model, for --from-scores",
    "figures": "kept widths, saliency, recovery",
    "model.safetensors": "weights",
    "report.html": "the same as a page",
    "saliency.safetensors": "scores of all structures",
    "tokenizer.json": "tokenizer",
    "sosp_report.json": "plan, metrics, costs, timings, versions",
}


def _metric(name: str, metric: Mapping[str, Any]) -> str:
    shown = format_metric(name, metric["value"])
    if metric["stderr"] is None:
        return shown
    if shown.endswith(" %"):
        return f"{shown.removesuffix(' %')} ± {100 * metric['stderr']:.1f} %"
    return f"{shown} ± {metric['stderr']:.2g}"


def _change(name: str, dense: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    if name == "accuracy":
        return f"{100 * (final['value'] - dense['value']):+.1f} points"
    return _percent(dense["value"], final["value"])


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    return f"{_count(value).rstrip()}{'' if value >= 1e3 else ' '}B"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""
