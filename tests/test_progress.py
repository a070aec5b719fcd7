"""Bars on a terminal, lines in a log, nothing where nobody is to be told."""

import io
import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from sosp_hub import progress as room
from sosp_hub.progress import TerminalHandler, progress, progress_bar


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def shown(monkeypatch):
    """A log of 100 columns, a clock that is moved by hand, and a command's patience."""
    file = io.StringIO()
    console = Console(file=file, width=100, markup=False, emoji=False, highlight=False)
    clock = Clock()
    monkeypatch.setattr(room._display, "console", console)
    monkeypatch.setattr(room._display, "patience_s", 0.0)
    monkeypatch.setattr(room, "time", clock)
    monkeypatch.setattr(room._log, "level", logging.INFO)
    return file, clock


def test_a_log_has_a_line_at_the_start_estimates_from_the_first_steps_and_the_time_it_took(shown):
    file, clock = shown
    with progress_bar("train", 100, unit="steps") as advance:
        assert file.getvalue() == "train: 100 steps\n"
        for _ in range(100):
            clock.now += 1
            advance("loss 0.5")
    assert file.getvalue().splitlines() == [
        "train: 100 steps",
        "train: 5 of 100 steps, elapsed 5.0 s, about 1:35 min left, loss 0.5",
        "train: 10 of 100 steps, elapsed 10.0 s, about 1:30 min left, loss 0.5",
        "train: 20 of 100 steps, elapsed 20.0 s, about 1:20 min left, loss 0.5",
        "train: 40 of 100 steps, elapsed 40.0 s, about 1:00 min left, loss 0.5",
        "train: 80 of 100 steps, elapsed 1:20 min, about 20 s left, loss 0.5",
        "train: done in 1:40 min, loss 0.5",
    ]


def test_an_estimate_counts_from_where_a_stopped_training_goes_on(shown):
    file, clock = shown
    with progress_bar("train", 100, start=90, unit="steps") as advance:
        for _ in range(6):
            clock.now += 1
            advance()
    assert "train: 100 steps, 90 of them done before\n" in file.getvalue()
    assert "95 of 100 steps, elapsed 5.0 s, about 5 s left\n" in file.getvalue()


def test_what_is_inside_a_stage_has_lines_only_where_it_is_long(shown):
    file, clock = shown
    with progress_bar("choose", 2, unit="dampings") as advance:
        for seconds in (1, 4):
            for _ in progress([1, 2], "measure"):
                clock.now += seconds
            advance()
    lines = file.getvalue().splitlines()
    assert lines[0] == "choose: 2 dampings"
    assert [line for line in lines if "measure" in line] == [
        "measure: 2 batches",
        "measure: done in 8.0 s",
    ]


def test_a_library_call_shows_what_takes_longer_than_a_moment_alone(shown, monkeypatch):
    file, clock = shown
    monkeypatch.setattr(room._display, "patience_s", 2.0)
    for _ in progress([1, 2], "score"):
        clock.now += 0.5
    assert file.getvalue() == ""
    for _ in progress([1, 2, 3], "score"):
        clock.now += 1.5
    assert file.getvalue() == "score: 3 batches\nscore: done in 4.5 s\n"


@pytest.mark.parametrize("why", ["level", "rank"])
def test_nothing_is_shown_by_other_processes_or_where_info_is_off(shown, monkeypatch, why):
    file, _ = shown
    if why == "level":
        monkeypatch.setattr(room._log, "level", logging.WARNING)
    else:
        monkeypatch.setenv("RANK", "1")
    with progress_bar("train", 2) as advance:
        advance("loss 1")
        advance(steps=1)
    assert file.getvalue() == ""


def test_a_stage_that_failed_is_not_called_done_and_leaves_nothing_open(shown):
    file, _ = shown
    with pytest.raises(RuntimeError), progress_bar("train", 2):
        raise RuntimeError("no")
    assert file.getvalue() == "train: 2 batches\n"
    assert room._display.open == []


def test_warnings_are_said_again_at_the_end_but_not_where_they_are_all_there_is(shown):
    file, _ = shown
    log, handler = logging.Logger("a command's"), TerminalHandler()
    log.addHandler(handler)
    log.warning("few samples\x1b[2J")
    handler.repeat_warnings()
    assert file.getvalue() == "warning: few samples\\x1b[2J\n"
    log.warning("few samples")
    log.warning("few samples")
    log.info("scored")
    assert file.getvalue().count("warning: few samples\n") == 1  # said once while the run lasts
    handler.repeat_warnings()
    assert file.getvalue().endswith("scored\n\n1 warning of this run:\n- few samples\n")


_SCRIPT = """
import logging
from sosp_hub.progress import TerminalHandler, progress, progress_bar, show_at_once
log = logging.getLogger("sosp_hub")
log.setLevel(logging.INFO)
log.addHandler(TerminalHandler())
show_at_once()
with progress_bar("allocate"):
    pass
for i in progress(range(30), "train dense", unit="steps"):
    if i == 3:
        log.info("a line above the bar")
"""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_has_bars_that_fit_it(columns, environment):
    main, side = pty.openpty()
    own = {**os.environ, "COLUMNS": str(columns), "LINES": "30", "TERM": "xterm", **environment}
    own.pop("FORCE_COLOR", None)
    child = subprocess.Popen([sys.executable, "-c", _SCRIPT], stderr=side, env=own)
    os.close(side)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    assert child.wait() == 0
    os.close(main)
    text = written.decode()
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)
    assert "train dense          ━" in plain
    assert "30/30  elapsed 0.0 s" in plain
    assert "a line above the bar" in plain
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= columns
    colours = re.findall(r"\x1b\[(?:3[0-7]|9[0-7])m", text)
    assert bool(colours) is not bool(environment)
