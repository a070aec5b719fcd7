"""``python -m sosp_hub.expand RECIPE.yaml [key.path=value ...]``: bottlenecks found and widened.

A recipe as for ``prune`` with one more section, ``expand``: how far, what counts as a bottleneck,
and seeds.
"""

import argparse
import sys
from collections.abc import Sequence

from sosp_hub.pipeline.command import log_to_terminal, recipe_parser, run_command
from sosp_hub.recipe.load import load_recipe


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``expand``."""
    return recipe_parser(
        "expand",
        "Cuts a model on paper, widens the layers that are cut least, trains, and prunes back to "
        "the base's budget, beside the base itself and one whose layers are all widened alike.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    parser = command_parser()

    def run(options: argparse.Namespace, command: str) -> None:
        if not options.given:
            example = "recipes/studies/expand_resnet20_fashion_mnist.yaml"
            parser.error(f"give the path of a recipe, such as {example}")
        recipe = load_recipe(options.given[0], options.given[1:], "expand")
        log_to_terminal()
        from sosp_hub.pipeline.expand import (
            expand,  # torch, which a faulty recipe need not wait for
        )

        expand(recipe, overwrite=options.overwrite, command=command)

    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
