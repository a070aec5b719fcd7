"""``python -m sosp_hub.doctor``: what is installed, what was tested, and whether it works."""

import argparse
import contextlib
import io
import platform
import sys
import time
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

import sosp_hub
from sosp_hub.command_name import command_name
from sosp_hub.compat.smoke import LIBRARIES, Smoke, smoke_tests
from sosp_hub.compat.versions import installed, is_newer, tested

_WIDTH = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found; the exit code: 0 fine, 1 something that is needed does not work."""
    command_parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    start, known = time.monotonic(), tested()
    tests = {library: smoke_tests(library) for library in LIBRARIES}
    faults = {test: fault for each in tests.values() for test in each if (fault := _fault(test))}
    console.print(
        f"sosp_hub {sosp_hub.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {_accelerator()}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("library", "installed", "tested", "works"):
        table.add_column(column)
    for library in (*LIBRARIES, *(name for name in known if name not in LIBRARIES)):
        table.add_row(*_row(library, known[library], tests.get(library, ()), faults))
    console.print(table)
    for test, fault in faults.items():
        console.print(f"{test.library}: {fault}", style="bold red", markup=False)
        console.print(f"  breaks: {test.breaks}", markup=False)
    missing = [library for library in known if installed(library) is None]
    if missing:
        console.print(f"not installed: {', '.join(missing)}", style="bold red")
    if faults or missing:
        console.print("`pip install sosp_hub -c constraints.txt` installs what was tested")
    count, taken_s = sum(len(each) for each in tests.values()), time.monotonic() - start
    console.print(f"{count - len(faults)} of {count} smoke tests in {taken_s:.0f} s")
    return 1 if faults or missing else 0


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``doctor``."""
    return argparse.ArgumentParser(
        prog=command_name("doctor"),
        description="Says which versions of the libraries are installed and which were tested, and "
        "tries each name of theirs that sosp_hub needs and they do not promise. Takes seconds; "
        "nothing is downloaded.",
    )


def _fault(test: Smoke) -> str | None:
    """What a smoke test says, in one line; None where it passes."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            test.run()
    except Exception as error:  # noqa: BLE001 - what another version may raise
        (line, *_) = str(error).strip().splitlines() or [""]
        return f"{test.run.__name__.replace('_', ' ')}: {type(error).__name__}: {line}"[:500]
    return None


def _row(
    library: str, known: str, tests: Sequence[Smoke], faults: dict[Smoke, str]
) -> tuple[str, ...]:
    version = installed(library)
    shown = version or "[bold red]missing[/]"
    if is_newer(version, known):
        shown = f"[yellow]{version} (newer)[/]"
    failed = sum(test in faults for test in tests)
    works = f"[bold red]{failed} of {len(tests)} do not[/]" if failed else "[green]yes[/]"
    return library, shown, known, works if tests else ""


def _accelerator() -> str:
    import torch

    if not torch.accelerator.is_available():
        return "no accelerator"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.accelerator.current_accelerator())


if __name__ == "__main__":
    sys.exit(main())
