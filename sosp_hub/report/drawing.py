"""What all pictures share: colours, empty figures, and a picture that can be saved."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sosp_hub.report.markup import escaped

INK, MUTED, PALE = "#1f2933", "#7b8794", "#e4e7eb"
KEPT, CUT = "#2a6f97", "#e07a5f"
KIND_COLOURS = {
    "channel": "#2a6f97",
    "head": "#b5651d",
    "kv_group": "#9c4f96",
    "head_dim": "#c9a227",
    "neuron": "#2f8f83",
    "residual": "#5c6bc0",
    "expert": "#a44a3f",
    "layer": "#6b7280",
}
MOST_NAMED_GROUPS = 26  # more rows than this are drawn as columns without names
MOST_DRAWN = 2000  # structures of a picture of pairs; of more, every second, third, ...
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "sosp_hub",
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


@dataclass(frozen=True)
class Picture:
    """A figure that belongs on the card.

    Attributes:
        name: File name without its ending.
        title: A few words, used as the text that stands in for the picture.
        caption: One sentence that says how to read it.
        draw: Makes the figure.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]

    def save(self, file: Path | BinaryIO, kind: str = "png") -> None:
        """Draws the figure into a file (``png`` or ``svg``); the same data gives the same bytes."""
        metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        with drawing_style():
            self.draw().savefig(file, format=kind, dpi=160, metadata=metadata)


class NotebookFigure(Figure):
    """A figure that a notebook shows as it is, without pyplot; ``savefig`` writes it to a file."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> NotebookFigure:
    """An empty one; inches."""
    return NotebookFigure(figsize=(width, height), layout="constrained", facecolor="white")


@contextmanager
def drawing_style() -> Iterator[None]:
    """The style of all pictures, while they are drawn."""
    with rc_context(_STYLE):
        yield


def kind_words(kind: str) -> str:
    """Structures of a kind, in words."""
    known = {"kv_group": "KV groups", "residual": "residual channels"}
    return known.get(kind, escaped(kind, "figure").replace("_", " ") + "s")


def short_name(group: Mapping[str, Any]) -> str:
    """Without its kind."""
    return escaped(group["name"].rpartition(":")[0] or group["name"], "figure")


def tick_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names for an axis: without what all of them begin with, and of long ones the end."""
    parts = [(group["name"].rpartition(":")[0] or group["name"]).split(".") for group in groups]
    same = 0
    while len(parts) > 1 and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    names = [".".join(part[same:]) for part in parts]
    return [
        escaped(n if len(n) <= _LONGEST_TICK else f"…{n[-_LONGEST_TICK:]}", "figure") for n in names
    ]


_LONGEST_TICK = 28  # characters


def bare(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Takes away all lines but a pale grid."""
    axes.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)
    axes.grid(axis=grid, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")
