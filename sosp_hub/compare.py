"""``python -m sosp_hub.compare RECIPE.yaml [key.path=value ...]``: which criterion serves a model.

A recipe as for ``prune`` with one more section, ``compare``: criteria, budgets and seeds.
"""

import argparse
import sys
from collections.abc import Sequence

from sosp_hub.pipeline.command import log_to_terminal, recipe_parser, run_command
from sosp_hub.recipe.load import load_recipe


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``compare``."""
    return recipe_parser(
        "compare",
        "Compares criteria on one model and one protocol, every criterion at every budget with "
        "every seed, and writes tables, plots and a page.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a comparison; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    parser = command_parser()

    def run(options: argparse.Namespace, command: str) -> None:
        if not options.given:
            parser.error("give the path of a recipe: recipes/studies/resnet20_fashion_mnist.yaml")
        recipe = load_recipe(options.given[0], options.given[1:], "compare")
        log_to_terminal()
        from sosp_hub.pipeline.compare import compare  # torch, which a faulty recipe need not

        compare(recipe, overwrite=options.overwrite, command=command)

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
