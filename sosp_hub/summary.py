"""Tables of groups, short enough for a screen, in plain text and for notebooks."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Summary:
    """A table between lines of words; the first column is words, the others are numbers.

    Attributes:
        before: Lines above it.
        head: Names of the columns.
        rows: As many cells each; more than a screen holds are left out.
        after: Lines below it.
    """

    before: Sequence[str]
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    after: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal: columns under their names."""
        return "\n".join([*self.before, table(self.head, self.rows), *self.after])

    def html(self) -> str:
        """For a notebook."""
        left = len(self.rows) - _MOST_ROWS
        after = [f"and {left} more rows", *self.after] if left > 0 else self.after
        grid = html_table(self.head, self.rows[:_MOST_ROWS])
        return "".join([*map(_paragraph, self.before), grid, *map(_paragraph, after)])


class Summarised:
    """What prints as a table, and shows one in a notebook."""

    def summary(self) -> Summary:
        """What ``print`` shows, as data."""
        raise NotImplementedError

    def __str__(self) -> str:
        """One screen of text."""
        return self.summary().text()

    def _repr_html_(self) -> str:
        return self.summary().html()


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns under their names; the first is words, the others are numbers.

    Args:
        head: Names of the columns.
        rows: As many cells each; more than a screen holds are left out.
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
        lines.append(f"and {len(rows) - len(shown)} more rows")
    return "\n".join(lines)


def html_table(head: Sequence[object], rows: Sequence[Sequence[object]], num_left: int = 1) -> str:
    """The same in HTML, with nothing in it that is obeyed.

    Args:
        head: Names of the columns.
        rows: As many cells each, all of them.
        num_left: Columns of words, at the left; the others are numbers.
    """

    def row(cells: Sequence[object], tag: str) -> str:
        sides = ["left" if i < num_left else "right" for i in range(len(cells))]
        shown = [
            f'<{tag} style="text-align:{side}">{html.escape(_cell(cell))}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def _paragraph(line: str) -> str:
    return f"<p>{html.escape(_cell(line))}</p>"


def _cell(value: object) -> str:
    """One line of it, in which a terminal finds no orders."""
    return printable(str(value)).replace("\n", "\\n")


def span(values: Sequence[float | int]) -> str:
    """The least and the greatest value, or the only one."""
    low, high = (f"{value:.4g}" if value < 1e4 else f"{value:,.0f}" for value in _ends(values))
    return low if low == high else f"{low} to {high}"


def _ends(values: Sequence[float | int]) -> tuple[float, float]:
    return float(min(values)), float(max(values))
