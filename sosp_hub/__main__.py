"""``sosp COMMAND ...`` and ``python -m sosp_hub COMMAND ...``: every command under one name."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import sosp_hub

COMMANDS = {
    "prune": "score, cut, rebuild, fine-tune, measure and save a model",
    "recipes": "the recipes that come with the package; copy one",
    "inspect": "what a saved model holds, who can load it, whether its card is true",
    "cut": "cut the weight files of a model by a plan, without loading it",
    "export": "write a pruned model for llama.cpp, vLLM, ONNX and others",
    "push": "publish a saved model on the hub",
    "compare": "criteria, budgets and seeds side by side on one model",
    "expand": "widen the layers that a cut spares, train, and prune back",
    "doctor": "what is installed, what was tested, and whether it works",
    "completion": "a script that completes these commands in your shell",
}
"""Name of each command, also that of its module (without a module: here), and what it does."""

_START = """\
a first model (trains, cuts and saves a small network in about a minute, offline):
  sosp prune quickstart

your own model and data:
  sosp prune MODEL_ID --task text-classification --data train.csv --params 0.8

`sosp COMMAND --help` says more."""

_SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit code, or 2 where there is none of that name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else None
    if command == "completion":
        return _complete(given[1:])
    if command in COMMANDS:
        return importlib.import_module(f"sosp_hub.{command}").main(given[1:])
    parser = _parser()
    if not given:
        parser.print_help()
        return 2
    parser.parse_args(given)  # --help, --version, or an error that lists the commands
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sosp",
        usage="sosp COMMAND ...",
        description="Makes timm and transformers models smaller: whole channels, heads, neurons, "
        "experts and layers are cut, and the result loads like any other model.",
        epilog=_START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sosp_hub {sosp_hub.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _complete(given: Sequence[str]) -> int:
    """Prints the script that completes the commands and their options."""
    parser = argparse.ArgumentParser(
        prog="sosp completion",
        description="Prints a script that completes the commands and their options; for bash: "
        'eval "$(sosp completion bash)"',
    )
    parser.add_argument("shell", choices=_SHELLS)
    shell = parser.parse_args(given).shell
    import shtab

    whole = argparse.ArgumentParser(prog="sosp")
    commands = whole.add_subparsers()
    for name, summary in COMMANDS.items():
        if name == "completion":
            commands.add_parser(name, help=summary).add_argument("shell", choices=_SHELLS)
            continue
        own = importlib.import_module(f"sosp_hub.{name}").command_parser()
        commands.add_parser(name, help=summary, parents=[own], add_help=False)
    print(shtab.complete(whole, shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
