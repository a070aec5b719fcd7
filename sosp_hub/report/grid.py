"""A table, and the forms it is shown in."""

import csv
import io
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sosp_hub.report.markup import Markdown, escaped, markdown
from sosp_hub.summary import html_table


@dataclass(frozen=True)
class Grid:
    """A table whose cells are ready to print; pages show it through their template.

    Attributes:
        title: Above it.
        head: Names of the columns.
        rows: As many cells each.
        note: Below it.
        num_left: Columns of words, at the left; the others are numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    note: str = ""
    num_left: int = 1

    def markdown(self) -> Markdown:
        """The table alone."""
        marks = ["---" if i < self.num_left else "---:" for i in range(len(self.head))]
        lines = [_line(self.head), f"|{'|'.join(marks)}|", *map(_line, self.rows)]
        return Markdown("\n".join(lines))

    def html(self) -> str:
        """With title and note, for notebooks."""
        words = [f"<p><b>{escaped(self.title, 'html')}</b></p>"] if self.title else []
        note = [f"<p>{escaped(self.note, 'html')}</p>"] if self.note else []
        return "".join([*words, html_table(self.head, self.rows, self.num_left), *note])

    def csv(self) -> str:
        """Head and rows."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.head, *self.rows])
        return buffer.getvalue()

    def terminal(self) -> Group:
        """With title and note, which may be wider than the table."""
        table = Table(
            title=_text(self.title) if self.title else None,
            box=box.SIMPLE_HEAD,
            header_style="bold",
        )
        for number, name in enumerate(self.head):
            justify = "left" if number < self.num_left else "right"
            table.add_column(_text(name), justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*map(_text, row))
        note = [Padding(_text(self.note), (0, 1))] if self.note else []
        return Group(table, *note)


def _line(cells: tuple[object, ...]) -> str:
    shown = [markdown(cell) for cell in cells]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in shown) + "|"


def _text(cell: object) -> Text:
    return Text(escaped(str(cell), "terminal"))
