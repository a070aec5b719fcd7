"""What every verb that runs a recipe does with its command line."""

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sosp_hub.command_name import command_name
from sosp_hub.errors import SospHubError
from sosp_hub.progress import TerminalHandler, show_at_once
from sosp_hub.recipe.schema import Verb


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


def shown_as(options: argparse.Namespace) -> Mapping[str, Any]:
    """How a run prints its result, as an argument ``show`` of it, where it is not as usual."""
    if options.quiet:
        return {"show": None}
    return {"show": lambda report, _: print(json.dumps(report))} if options.json else {}


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
        The exit code: what was given, 0 done, 2 something for the user to change, 130 stopped.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if asked := {"-h", "--help"} & set(given):
        parser.epilog = _help(parser.prog, given[given.index(asked.pop()) + 1 :])
    options = parser.parse_intermixed_args(given)
    try:
        code = run(options, shlex.join([*parser.prog.split(), *given])) or 0
    except SospHubError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        _tell_launcher(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    _repeat_warnings()
    return code


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
