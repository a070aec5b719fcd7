"""How a run looks while it works: bars on a terminal, lines in a log; nothing here needs torch.

In a command each stage begins with a bar or a line. In a script or notebook of the user's own only
a stage that takes longer than a moment shows one. All of it goes to standard error, from the first
process alone, and nothing where the logger ``sosp_hub`` is set above INFO.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from sosp_hub.errors import printable

_PATIENCE_S = 2.0  # before a stage of a library call is shown
_FIRST_LINE_S, _MOST_S = 5.0, 60.0  # between two lines of one stage in a log
_LEAST_BAR, _MOST_BAR = 6, 40
_log = logging.getLogger("sosp_hub")


class _Display:
    """What is open, and where it is shown."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self.patience_s = _PATIENCE_S
        self.open: list[_Bar] = []
        self.live: Progress | None = None

    @property
    def draws(self) -> bool:
        """Whether bars can move; else lines are written."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def line(self, text: str, style: str | None = None) -> None:
        """A line, above the bars."""
        self.console.print(Text(printable(text)), style=style, soft_wrap=True)

    def bars(self) -> Progress:
        """The bars of the stages that are open."""
        if self.live is None:
            room = self.console.width - 70
            self.live = Progress(
                TextColumn("{task.description:<20}", markup=False),
                BarColumn(bar_width=max(_LEAST_BAR, min(room, _MOST_BAR))),
                _Words(),
                console=self.console,
            )
            self.live.start()
        return self.live

    def end(self) -> None:
        """Leaves the bars as they are."""
        if self.live is not None:
            self.live.stop()
            self.live = None


class _Words(ProgressColumn):
    """Count, time and note, in as few columns as they take."""

    def render(self, task: Task) -> Text:
        parts = [f"{task.completed:.0f}/{task.total:.0f}"] if task.fields["counts"] else []
        parts.append(f"elapsed {clock(task.elapsed or 0.0)}")
        if task.stop_time is None and not task.finished and task.time_remaining is not None:
            parts.append(f"left {clock(task.time_remaining, whole=True)}")
        if task.fields["note"]:
            parts.append(task.fields["note"])
        return Text("  ".join(parts), overflow="ellipsis", no_wrap=True)


_display = _Display()


class _Bar:
    """One stage while it runs."""

    def __init__(self, description: str, total: int | None, start: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self.first = start
        self.note = ""
        self.began = time.monotonic()
        self.shown = False
        self.task: Any = None
        self.next_line_s = _FIRST_LINE_S
        self.inner = bool(_display.open)
        _display.open.append(self)
        self._show_if_due()

    def advance(self, note: str | None = None, steps: int = 1) -> None:
        """One more is done, or so many."""
        self.done += steps
        self.note = self.note if note is None else note
        self._show_if_due()
        if self.task is not None:
            _display.bars().update(self.task, completed=self.done, note=self.note)
        elif self.shown and self._seconds() >= self.next_line_s and self.done != self.total:
            self.next_line_s = self._seconds() + min(self._seconds(), _MOST_S)
            _display.line(self._so_far())

    def close(self, *, failed: bool) -> None:
        """It is over; what was inside another, or never began, leaves no bar behind."""
        _display.open.remove(self)
        if self.task is not None and _display.live is not None:
            unbegun = failed and self.done == self.first
            if unbegun or (self.inner and _display.open):
                _display.live.remove_task(self.task)
            else:
                whole = 1 if self.total is None and not failed else self.total
                done = 1 if self.total is None else self.done
                _display.live.update(self.task, total=whole, completed=done, counts=self.total)
                _display.live.stop_task(self.task)
        elif self.shown and not failed:
            note = f", {self.note}" if self.note else ""
            _display.line(f"{self.description}: done in {clock(self._seconds())}{note}")
        if not _display.open:
            _display.end()

    def _show_if_due(self) -> None:
        wait = _display.patience_s
        if self.inner and not _display.draws:
            wait = max(wait, _FIRST_LINE_S)  # a log has the lines of what it is part of
        if self.shown or self._seconds() < wait:
            return
        self.shown = True
        if _display.draws:
            self.task = _display.bars().add_task(
                printable(self.description),
                total=self.total,
                completed=self.done,
                note=self.note,
                counts=self.total,
            )
        else:
            count = "" if self.total is None else f": {self.total:,} {self.unit}"
            after = f", {self.first:,} of them done before" if self.first else ""
            _display.line(f"{self.description}{count}{after}")

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _so_far(self) -> str:
        elapsed, done = self._seconds(), self.done - self.first
        words = f"{self.description}: {self.done:,}"
        if self.total is not None:
            words += f" of {self.total:,}"
        words += f" {self.unit}, elapsed {clock(elapsed)}"
        if self.total is not None:
            words += f", about {clock(elapsed / done * (self.total - self.done), whole=True)} left"
        return words + (f", {self.note}" if self.note else "")


@contextmanager
def progress_bar(
    description: str, total: int | None = None, start: int = 0, unit: str = "batches"
) -> Iterator[Callable[..., None]]:
    """A bar, or lines, of one stage.

    Args:
        description: What is done.
        total: How many steps there are; None = it is not known.
        start: How many of them were done before.
        unit: What is counted.

    Yields:
        A function that moves the bar on, by one unless it is given ``steps``; its first argument,
        if any, is shown behind the bar.
    """
    if os.environ.get("RANK", "0") != "0" or _log.level > logging.INFO:
        yield lambda *_, **__: None
        return
    bar, failed = _Bar(description, total, start, unit), True
    try:
        yield bar.advance
        failed = False
    finally:
        bar.close(failed=failed)


def progress(
    iterable: Iterable[Any], description: str, total: int | None = None, unit: str = "batches"
) -> Iterator[Any]:
    """What is iterated over, with a bar."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # pyright: ignore[reportArgumentType]
    with progress_bar(description, total, unit=unit) as advance:
        for item in iterable:
            yield item
            advance()


def clock(seconds: float, *, whole: bool = False) -> str:
    """A length of time for a person, in whole seconds for what is only estimated.

    >>> clock(0.04), clock(7.3), clock(7.3, whole=True), clock(75), clock(3725)
    ('0.0 s', '7.3 s', '7 s', '1:15 min', '1:02:05 h')
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s" if whole else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


class TerminalHandler(logging.Handler):
    """Log lines of a command, above its bars; warnings are kept to be said once more at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._warnings: dict[str, None] = {}
        self._num_lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Prints it; a warning that was said already comes only once more, at the end."""
        text = self.format(record)
        if text in self._warnings:
            return
        self._num_lines += 1
        if record.levelno < logging.WARNING:
            _display.line(text)
            return
        self._warnings[text] = None
        _display.line(f"warning: {text}", style="yellow")

    def repeat_warnings(self) -> None:
        """Says them together, where anything else was said since."""
        if self._warnings and self._num_lines > len(self._warnings):
            num = len(self._warnings)
            _display.line(f"\n{num} warning{'s' if num > 1 else ''} of this run:", style="yellow")
            for text in self._warnings:
                _display.line(f"- {text}", style="yellow")
        self._warnings.clear()


def show_at_once() -> None:
    """From now on every stage is shown when it begins, as commands do."""
    _display.patience_s = 0.0


@contextmanager
def only_errors(library: str) -> Iterator[None]:
    """The log of a library without what it would say of a step that is ours alone."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
