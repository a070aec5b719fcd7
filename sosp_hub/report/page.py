"""A static page of one result or of a study: one HTML file, no network, no script."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from sosp_hub.atomic import write_text
from sosp_hub.errors import HubError, without_secrets
from sosp_hub.report import numbers
from sosp_hub.report.facts import (
    Facts,
    collect,
    overall_metrics,
    with_spread,
)
from sosp_hub.report.figures import Picture, pareto_picture, pictures, read_saliency
from sosp_hub.report.grid import Grid
from sosp_hub.report.listing import PAGE
from sosp_hub.report.markup import html
from sosp_hub.report.schema import read_report


@dataclass(frozen=True)
class Part:
    """A section of words."""

    title: str
    points: tuple[str, ...] = ()
    text: str = ""
    code: str = ""


def write_page(folder: str | Path) -> Path:
    """Writes ``report.html`` into a run's folder: its tables and pictures.

    Raises:
        HubError: A folder without a report.
    """
    folder = Path(folder)
    report = _report_of(folder)
    facts = collect(report)
    page = render_page(
        title=folder.resolve().name,
        headline=facts.headline,
        tiles=facts.costs.rows,
        tables=[
            grid
            for grid in (facts.costs, facts.metrics, facts.drops, facts.curve, facts.rounds)
            if grid.rows
        ],
        drawn=pictures(report, read_saliency(folder), folder),
        parts=_parts(facts),
    )
    return _write(folder / PAGE, page)


def write_study(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Writes a page that compares runs of one model: a Pareto plot and a table, a row a run.

    Args:
        folders: Folders of finished runs.
        path: The HTML file.

    Raises:
        HubError: A folder without a report, or runs that measured no metric in common.
    """
    runs = {Path(folder).resolve().name: _report_of(Path(folder)) for folder in folders}
    names = [set(overall_metrics(report.get("metrics") or {})) for report in runs.values()]
    first = overall_metrics(next(iter(runs.values())).get("metrics") or {}) if runs else []
    shared = [name for name in first if all(name in of_file for of_file in names)]
    if not shared:
        raise HubError(
            "these runs share no metric, so they cannot be compared; give folders of runs "
            "that measured the same one (evaluate.metrics)"
        )
    grid = Grid(
        title="Runs",
        head=("run", "criterion", "parameters", "MACs", *map(numbers.metric_name, shared)),
        rows=tuple(_run_row(name, report, shared) for name, report in runs.items()),
        note="Parameters and MACs: the share that is kept. ± is one standard error.",
        num_left=2,
    )
    page = render_page(
        title=Path(path).stem,
        headline=f"{len(runs)} pruned models side by side.",
        tiles=(),
        tables=(grid,),
        drawn=[pareto_picture(runs, shared[0])],
        parts=(),
    )
    return _write(Path(path), page)


def render_page(
    *,
    title: str,
    headline: str,
    tiles: Sequence[Any],
    tables: Sequence[Grid],
    drawn: Sequence[Picture],
    parts: Sequence[Part],
) -> str:
    """The HTML of a page: a sentence, big numbers, tables, pictures, sections of words."""
    text = _template().render(
        title=title,
        headline=headline,
        tiles=tiles,
        tables=tables,
        figures=[
            {"title": one.title, "caption": one.caption, "source": _as_data(one)} for one in drawn
        ],
        parts=parts,
    )
    return without_secrets(text)


def _parts(facts: Facts) -> list[Part]:
    parts = []
    if facts.promise:
        parts.append(Part("What was promised", points=facts.promise))
    if facts.removed:
        parts.append(Part("What was removed", points=facts.removed + facts.made_up))
    parts.append(
        Part(
            "What got worse",
            points=facts.worse,
            text=f"Not measured: {'; '.join(facts.unmeasured)}.",
        )
    )
    if facts.command or facts.recipe:
        code = "\n\n".join(text for text in (facts.command, facts.recipe) if text)
        parts.append(Part("Reproduce it", code=code))
    return parts


def _run_row(run: str, report: Mapping[str, Any], metrics: Sequence[str]) -> tuple[str, ...]:
    cost = report.get("cost") or {}
    before, after = cost.get("before") or {}, cost.get("after") or {}
    kept = [
        numbers.share(after[key] / before[key]) if before.get(key) and key in after else ""
        for key in ("params", "macs")
    ]
    final = (report.get("metrics") or {}).get("final") or {}
    values = [with_spread(name, final[name]) if name in final else "" for name in metrics]
    criterion = str((report.get("criterion") or {}).get("name") or "")
    return (run, criterion, *kept, *values)


def _report_of(folder: Path) -> dict[str, Any]:
    report = read_report(folder)
    if report is None:
        raise HubError(f"{folder}: there is no sosp_report.json; give the output folder of a run")
    return report


def _as_data(picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path


@cache
def _template() -> Template:
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=html,
    )
    source = files("sosp_hub.report") / "page.html.jinja"
    return environment.from_string(source.read_text(encoding="utf-8"))
