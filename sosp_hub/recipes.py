"""``python -m sosp_hub.recipes``: the recipes that come with the package, listed or copied."""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from sosp_hub.atomic import writing
from sosp_hub.command_name import command_name
from sosp_hub.errors import OutputError
from sosp_hub.recipe.shipped import shipped_recipes

_WIDTH = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Lists or copies; the exit code: 0 done, 2 something for the user to change."""
    options = command_parser().parse_args(arguments)
    shipped = shipped_recipes()
    if options.action == "copy":
        return _copy(shipped, options.name, Path(options.to))
    _list(shipped)
    return 0


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``recipes``."""
    parser = argparse.ArgumentParser(
        prog=command_name("recipes"),
        description="Lists the recipes that come with the package. A name stands wherever the "
        "path of a recipe can.",
    )
    actions = parser.add_subparsers(dest="action", metavar="[copy NAME [TO]]")
    copy = actions.add_parser("copy", help="copy one, to change it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("to", metavar="TO", nargs="?", default=".", help="file or folder")
    return parser


def _copy(shipped: dict[str, Path], name: str, to: Path) -> int:
    source = shipped.get(name.removesuffix(".yaml"))
    if source is None:
        print(f"error: no recipe {name!r}; there are: {', '.join(shipped)}", file=sys.stderr)
        return 2
    target = to / source.name if to.is_dir() else to
    try:
        with writing(target):
            if target.exists():
                raise OutputError(f"{target}: is there already; give another place")
            shutil.copyfile(source, target)
    except OutputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


def _list(shipped: dict[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, path in shipped.items():
        table.add_row(name, _first_words(path.read_text()))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(table)


def _first_words(text: str) -> str:
    """What a recipe's header says before its first ``key: ...``."""
    lines = takewhile(lambda line: not re.match(r"# [a-z]+:|[^#]", line), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


if __name__ == "__main__":
    sys.exit(main())
