"""``sosp_hub.plot``: pictures of what the other verbs return."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sosp_hub.errors import OutputError, PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.report.drawing import drawing_style
from sosp_hub.report.figures import draw_saliency, draw_widths, pictures, read_saliency
from sosp_hub.report.schema import read_report
from sosp_hub.structure.graph import Graph


def plot(
    what: Graph | PruningPlan | Mapping[str, Any] | str | Path,
    plan: PruningPlan | None = None,
    *,
    picture: str | None = None,
) -> Figure:
    """Draws a graph, a saliency, a plan, a report or the folder of a run.

    A graph and a plan show the width of each group and what is kept of it; a saliency shows each
    structure's score, with ``plan`` coloured by what is kept; a report and a folder show one of the
    pictures of their card.

    Args:
        what: From ``trace``, ``score``, ``allocate`` or ``prune``; or an output folder.
        plan: For a saliency, what is kept of it.
        picture: Of a report or folder: ``widths``, ``saliency``, ``correlation`` or ``recovery``,
            as far as it has the data; None = the last of these that it has.

    Returns:
        A matplotlib figure: a notebook shows it, ``savefig("widths.svg")`` writes it.

    Raises:
        OutputError: A folder without a report, or a report without the data of that picture.
        PlanError: Something of none of these kinds, or a plan of other groups.

    Example:
        >>> import sosp_hub
        >>> plan = sosp_hub.PruningPlan(kept={"conv:channel": (0, 2)}, sizes={"conv:channel": 4})
        >>> figure = sosp_hub.plot(plan)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['2 of 4']
    """
    with drawing_style():
        if isinstance(what, str | Path):
            report = read_report(Path(what))
            if report is None:
                raise OutputError(f"{what}: there is no report; give the output folder of a run")
            return _of_report(report, picture, Path(what))
        if isinstance(what, Graph):
            sizes = {name: group.size for name, group in what.groups.items()}
            return draw_widths(_groups(sizes, sizes))
        if isinstance(what, PruningPlan):
            floors = what.provenance.get("floors") or ()
            return draw_widths(_groups(what.sizes, what.num_kept()), floors)
        if isinstance(what, Mapping) and "metrics" in what and "groups" in what:
            return _of_report(what, picture, None)
        if isinstance(what, Mapping) and what and all(hasattr(v, "tolist") for v in what.values()):
            return _of_scores(what, plan)
    raise PlanError(
        f"plot: got {type(what).__name__}, expected a graph, a saliency with groups, a plan, a "
        "report, or the output folder of a run"
    )


def _of_scores(scores: Mapping[str, Any], plan: PruningPlan | None) -> Figure:
    values = {name: np.asarray(own.tolist(), dtype=np.float64) for name, own in scores.items()}
    kept = {} if plan is None else plan.kept
    for name in kept.keys() & values.keys():
        if plan is not None and plan.sizes[name] != len(values[name]):
            raise PlanError(
                f"plot: {name!r} has {len(values[name])} scores, and {plan.sizes[name]} structures "
                "in the plan; give the plan that was made of these scores"
            )
    sizes = {name: len(own) for name, own in values.items()}
    return draw_saliency(_groups(sizes, sizes), values, kept)


def _of_report(report: Mapping[str, Any], name: str | None, folder: Path | None) -> Figure:
    saliency = read_saliency(folder) if folder is not None else {}
    drawn = {one.name: one for one in pictures(report, saliency, folder)}
    if not drawn or name not in (None, *drawn):
        has = ", ".join(drawn) or "none"
        more = "" if folder else "; an output folder has more than a report"
        raise OutputError(f"plot: there is no data for the picture {name!r}; there is {has}{more}")
    return drawn[name or list(drawn)[-1]].draw()


def _groups(sizes: Mapping[str, int], kept: Mapping[str, int]) -> list[dict[str, Any]]:
    """As a report has them; the kind stands at the end of a group's name."""
    return [
        {"name": name, "kind": name.rpartition(":")[2], "size": size, "kept": kept[name]}
        for name, size in sizes.items()
    ]
