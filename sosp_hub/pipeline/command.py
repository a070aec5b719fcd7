"""What every verb that runs a recipe does with its command line."""

import argparse
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from sosp_hub.command_name import command_name
from sosp_hub.errors import SospHubError
from sosp_hub.progress import TerminalHandler, show_at_once
from sosp_hub.recipe.load import as_recipe, load_recipe
from sosp_hub.recipe.schema import Recipe, Verb


def recipe_parser(verb: Verb, description: str, *other_uses: str) -> argparse.ArgumentParser:
    """A parser of a recipe, overrides and ``--overwrite``.

    Args:
        verb: Name of the module.
        description: For ``--help``.
        other_uses: Arguments of other ways to use it.
    """
    name = command_name(verb)
    usage = f"{name} RECIPE [key.path=value ...] [--overwrite]"
    parser = argparse.ArgumentParser(
        prog=name,
        usage="\n       ".join([usage, *(f"{name} {use}" for use in other_uses)]),
        allow_abbrev=False,
        description=f"{description} The same command goes on where a stopped run was.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "given",
        metavar="RECIPE key.path=value",
        nargs="*",
        help="a YAML file or the name of a shipped recipe, and what goes before what it says, "
        "such as budget.macs=0.3",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that holds a finished run"
    )
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    said.add_argument(
        "--json",
        action="store_true",
        help="print the report as JSON at the end; all else goes to standard error",
    )
    return parser


def run_shown(
    work: Callable[..., Any], recipe: Recipe, options: argparse.Namespace, **more: Any
) -> None:
    """Runs a verb and prints its result as the command line asks for it.

    With ``--json`` standard output holds the report alone, whatever a library prints meanwhile.
    """
    if not options.json:
        work(recipe, **({"show": None} if options.quiet else {}), **more)
        return
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        work(recipe, show=lambda report, _: print(json.dumps(report), file=out), **more)


def run_as_guest(
    verb: Verb,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str],
    *,
    overwrite: bool,
) -> Any:
    """Runs a verb in a process of the caller's; arguments as of ``sosp_hub.prune``."""
    checked = as_recipe(recipe, overrides, verb)
    from sosp_hub.pipeline.guest import as_guest  # torch, which a faulty recipe need not wait for

    with as_guest():  # importing the libraries draws random numbers too
        name = f"sosp_hub.{verb}(...)"
        return _work_of(verb)(checked, overwrite=overwrite, command=name, show=None)


def run_recipe(
    verb: Verb, parser: argparse.ArgumentParser, arguments: Sequence[str] | None, example: str
) -> int:
    """`run_command` of a verb that takes a recipe and nothing else, such as ``example``."""

    def run(options: argparse.Namespace, command: str) -> None:
        if not options.given:
            parser.error(f"the name or path of a recipe is missing, such as {example}")
        recipe = load_recipe(options.given[0], options.given[1:], verb)
        log_to_terminal(quiet=options.quiet)
        work = _work_of(verb)
        run_shown(work, recipe, options, overwrite=options.overwrite, command=command)

    return run_command(parser, run, arguments)


def _work_of(verb: Verb) -> Callable[..., Any]:
    """What does it; loads torch."""
    name = "run" if verb == "prune" else verb
    return getattr(importlib.import_module(f"sosp_hub.pipeline.{name}"), name)


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, str], int | None],
    arguments: Sequence[str] | None,
) -> int:
    """Runs a verb and explains what went wrong.

    Args:
        parser: Of its command line.
        run: Takes the options, and the command as it was typed; may give an exit code.
        arguments: Of the command line; None = those of this process.

    Returns:
        The exit code: what was given, 0 done, 2 something for the user to change, 130 stopped from
        the keyboard, 143 by SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if asked := {"-h", "--help"} & set(given):
        parser.epilog = _help(parser.prog, given[given.index(asked.pop()) + 1 :])
    options = parser.parse_intermixed_args(given)
    try:
        with _stopped_by_schedulers():
            code = run(options, shlex.join([*parser.prog.split(), *given])) or 0
    except SospHubError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        _tell_launcher(f"error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    _repeat_warnings()
    return code


class _Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end a job whose time is over."""


@contextmanager
def _stopped_by_schedulers() -> Iterator[None]:
    """SIGTERM ends a run as ctrl-c does: what it made stays, temporary folders go, and it says so.

    Not where somebody else answers the signal, or a launcher ends its own processes by it.
    """
    mine = threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() == process:
            raise _Terminated
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a process that was forked from this one
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _repeat_warnings() -> None:
    """Says at the end what may have scrolled by."""
    for handler in logging.getLogger("sosp_hub").handlers:
        if isinstance(handler, TerminalHandler):
            handler.repeat_warnings()


def _help(program: str, topics: Sequence[str]) -> str:
    """What ``--help TOPIC`` says below the options."""
    from sosp_hub.recipe.describe import describe_recipe, list_sections
    from sosp_hub.recipe.schema import Recipe

    topic = topics[0] if topics else None
    if topic == "all":
        return f"A recipe is YAML with these sections and keys:\n\n{describe_recipe()}"
    if topic in Recipe.model_fields:
        return f"Keys of this part of a recipe:\n\n{describe_recipe(topic)}"
    known = "" if topic is None else f"There is no section {topic!r}. "
    return (
        f"{known}A recipe is YAML with these sections; `{program} --help SECTION` lists the keys "
        f"of one,\n`{program} --help all` those of all:\n\n{list_sections()}\n\n"
        "`sosp recipes` lists the recipes that come with the package, `sosp recipes copy NAME` "
        "copies one to edit."
    )


def _tell_launcher(message: str) -> None:
    """Leaves a message where ``torchrun`` looks for the cause; it ends its own report with it.

    Only so is an error seen that another process than the first has alone.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        info = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": info}))


def log_to_terminal(*, quiet: bool = False) -> None:
    """Log lines of this package for a person; called when the recipe is known to be valid.

    Args:
        quiet: Warnings alone; bars are not shown either.
    """
    log = logging.getLogger("sosp_hub")
    log.handlers[:] = [TerminalHandler()]
    show_at_once()
    level = logging.WARNING if quiet else logging.INFO
    log.setLevel(level if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    from sosp_hub.zoo.transformers import silence  # torch, which a faulty recipe need not wait for

    silence()
