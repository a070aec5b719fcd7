"""Tables of groups in plain text, short enough for a screen."""

import html
import re
from collections.abc import Iterable, Sequence

from sosp_hub.errors import printable

_NUMBER = re.compile(r"(?<![^.:])\d+(?![^.:])")
_MOST_ROWS = 40


def alike(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in one number between dots alone, by what they have in common.

    >>> alike(["layers.0.mlp:neuron", "layers.1.mlp:neuron", "head:channel"])
    {'layers.*.mlp:neuron': ['layers.0.mlp:neuron', 'layers.1.mlp:neuron'], 'head:channel': ['head:channel']}
    """  # noqa: E501
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(_NUMBER.sub("*", name), []).append(name)
    return {
        pattern if len(members) > 1 else members[0]: members
        for pattern, members in by_pattern.items()
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]], more: str = "") -> str:
    """Columns under their names; the first is words, the others are numbers.

    Args:
        head: Names of the columns.
        rows: As many cells each; more than a screen holds are left out.
        more: Where the rest is found.
    """
    shown = [[_cell(cell) for cell in row] for row in rows[:_MOST_ROWS]]
    widths = [max(map(len, column)) for column in zip(head, *shown, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in [list(head), *shown]
    ]
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} more rows{more}")
    return "\n".join(lines)


def _cell(value: object) -> str:
    """One line of it, in which a terminal finds no orders."""
    return printable(str(value)).replace("\n", "\\n")


def span(values: Sequence[float | int]) -> str:
    """The least and the greatest value, or the only one."""
    low, high = (f"{value:.4g}" if value < 1e4 else f"{value:,.0f}" for value in _ends(values))
    return low if low == high else f"{low} to {high}"


def _ends(values: Sequence[float | int]) -> tuple[float, float]:
    return float(min(values)), float(max(values))


def preformatted(text: str) -> str:
    """The same text in HTML, for notebooks."""
    return f"<pre>{html.escape(text)}</pre>"
