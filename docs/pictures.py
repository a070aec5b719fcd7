"""Draws the pictures of the pages: one for each concept, `python docs/pictures.py FOLDER`."""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

KEPT, GONE, OTHER, INK = "#2a6f97", "#d9d9d9", "#e08e45", "#333333"
STYLE = {"svg.hashsalt": "sosp_hub", "font.size": 9, "font.family": "sans-serif"}


def matrix(axes: Axes, x: float, y: float, rows: int, columns: int, *, lost: set[int], by: str):
    """A weight of unit cells whose lost rows or columns are grey."""
    for row in range(rows):
        for column in range(columns):
            gone = (row if by == "rows" else column) in lost
            cell = Rectangle(
                (x + column, y - row - 1), 0.92, 0.92, color=GONE if gone else KEPT, lw=0
            )
            axes.add_patch(cell)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK))


def label(axes: Axes, x: float, y: float, text: str, **options):
    axes.text(x, y, text, ha=options.pop("ha", "center"), va="center", color=INK, **options)


def structure(axes: Axes):
    """One channel: a row of what makes it, an entry of its norm, a column of what reads it."""
    lost = {1}
    matrix(axes, 0, 4, 4, 3, lost=lost, by="rows")
    matrix(axes, 5, 4, 4, 1, lost=lost, by="rows")
    matrix(axes, 8, 4, 3, 4, lost=lost, by="columns")
    for x, text in ((1.5, "conv1\n(makes)"), (5.5, "norm\n(makes)"), (10, "conv2\n(reads)")):
        label(axes, x, -0.9, text)
    arrow(axes, (3.2, 2), (4.8, 2))
    arrow(axes, (6.2, 2), (7.8, 2))


def gates(axes: Axes):
    """A gate multiplies what a structure hands on; at 0 the structure is gone."""
    for i, value in enumerate((1, 1, 0, 1)):
        y = 3 - i
        axes.add_patch(Rectangle((0, y), 2.2, 0.7, color=KEPT if value else GONE, lw=0))
        arrow(axes, (2.3, y + 0.35), (4, y + 0.35))
        label(axes, 4.4, y + 0.35, f"× {value}")
        arrow(axes, (4.9, y + 0.35), (6.6, y + 0.35))
    axes.add_patch(Rectangle((6.7, 0), 1.1, 3.7, color=OTHER, lw=0))
    label(axes, 1.1, 4.1, "activations")
    label(axes, 4.4, 4.1, "gates")
    label(axes, 7.2, 4.1, "reads")


def saliency(axes: Axes):
    """A number for each structure: what the loss would lose without it."""
    scores = np.sort(np.random.default_rng(0).gamma(1.3, 1.0, 24))[::-1]
    kept = scores >= scores[13]
    axes.bar(range(24), scores, color=[KEPT if one else GONE for one in kept], width=0.85)
    axes.axvline(13.5, color=INK, lw=1, ls="--")
    label(axes, 6.5, scores[0] * 0.95, "kept")
    label(axes, 18.5, scores[0] * 0.95, "cut")
    label(axes, 12, -0.45, "structures of all layers, by score")


def budget(axes: Axes):
    """A share of the cost; layers lose different amounts to meet it."""
    dense, kept = (64, 64, 128, 128, 256, 256), (60, 41, 90, 70, 88, 120)
    for i, (all_of_it, rest) in enumerate(zip(dense, kept, strict=True)):
        axes.barh(-i, all_of_it, color=GONE, height=0.8)
        axes.barh(-i, rest, color=KEPT, height=0.8)
    label(axes, 190, 0.05, "width of each layer", ha="left")


def plan(axes: Axes):
    """What is kept, as data."""
    lines = (
        '{"sizes": {"layer1:channel": 64, ...},',
        ' "kept":  {"layer1:channel": [0, 2, 3, 7, ...], ...},',
        ' "provenance": {"criterion": "sosp_h", "macs": 0.5}}',
    )
    for i, line in enumerate(lines):
        label(axes, 0, -i, line, ha="left", family="monospace")
    axes.set_xlim(0, 10)
    axes.set_ylim(-2.6, 0.6)


def rebuild(axes: Axes):
    """The rest of a layer's inputs is weighted anew, so that its output comes back."""
    x = np.linspace(0, 6, 200)
    dense = np.sin(x) + 0.4 * np.sin(3 * x)
    axes.plot(x, dense, color=INK, lw=2, label="output, uncut")
    axes.plot(x, 0.55 * np.sin(x), color=OTHER, lw=1.5, ls="--", label="after the cut")
    axes.plot(x, dense + 0.08 * np.cos(7 * x), color=KEPT, lw=1.5, label="rebuilt")
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def recovery(axes: Axes):
    """Training goes on; the best state on held-out samples is the one that is kept."""
    steps = np.arange(30)
    quality = 0.9 - 0.25 * np.exp(-steps / 5) - 0.0003 * (steps - 14).clip(0) ** 2
    axes.plot(steps, quality, color=KEPT, lw=2)
    best = int(quality.argmax())
    axes.plot(best, quality[best], "o", color=OTHER)
    axes.plot(0, quality[0], "o", color=INK)
    label(axes, best, quality[best] + 0.025, "kept")
    label(axes, 1, quality[0] - 0.025, "rebuilt", ha="left")
    label(axes, 15, 0.6, "steps")
    axes.set_ylim(0.58, 0.96)


def delta(axes: Axes):
    """A config that says what differs from the dense model, beside weights of the new sizes."""
    boxes = (
        (0, "config.json", "the dense model's,\nand a delta: sizes\nthat differ"),
        (4, "model.safetensors", "the cut weights,\nnothing else"),
        (8, "sosp_report.json", "plan, scores,\nmetrics, recipe"),
    )
    for x, name, text in boxes:
        axes.add_patch(Rectangle((x, 0), 3.5, 2.4, fill=False, edgecolor=KEPT, lw=1.5))
        label(axes, x + 1.75, 2.0, name, weight="bold", fontsize=8)
        label(axes, x + 1.75, 0.95, text, fontsize=8)


PICTURES: tuple[Callable[[Axes], None], ...] = (
    *(structure, gates, saliency, budget, plan, rebuild, recovery, delta),
)


def draw_all(folder: Path) -> None:
    """Writes each picture as NAME.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(6, 2.4))
            axes = figure.add_axes((0, 0, 1, 1))
            axes.axis("off")
            picture(axes)
            if picture in (structure, gates, delta):
                axes.set_aspect("equal")
                axes.autoscale_view()
            path = folder / f"{picture.__name__}.svg"
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
