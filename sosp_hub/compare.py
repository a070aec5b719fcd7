"""``python -m sosp_hub.compare RECIPE.yaml [key.path=value ...]``: which criterion serves a model.

A recipe as for ``prune`` with one more section, ``compare``: criteria, budgets and seeds.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sosp_hub.callable_module import make_callable
from sosp_hub.pipeline.command import log_to_terminal, recipe_parser, run_command, shown_as
from sosp_hub.recipe.load import as_recipe, load_recipe
from sosp_hub.recipe.schema import Recipe


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``compare``."""
    return recipe_parser(
        "compare",
        "Compares criteria on one model and one protocol, every criterion at every budget with "
        "every seed, and writes tables, plots and a page.",
    )


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, overwrite: bool = False
) -> dict[str, Any]:
    """Runs criteria, budgets and seeds side by side, as the section ``compare`` of a recipe says.

    Args:
        recipe: Path or name of a recipe, its sections as dictionaries, or a recipe.
        *overrides: ``key.path=value`` each, as on the command line.
        overwrite: Replace an output folder that holds a finished run.

    Returns:
        What is in ``results.json``.

    Raises:
        RecipeError: What is not valid in the recipe, all faults at once.
        SospHubError: Anything else that the user has to change.

    Example:
        >>> results = sosp_hub.compare("studies/resnet20_steps")  # doctest: +SKIP
    """
    checked = as_recipe(recipe, overrides, "compare")
    from sosp_hub.pipeline.guest import as_guest  # torch, which a faulty recipe need not wait for

    with as_guest():  # importing the libraries draws random numbers too
        from sosp_hub.pipeline.compare import compare as work

        return work(checked, overwrite=overwrite, command="sosp_hub.compare(...)", show=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a comparison; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    parser = command_parser()

    def run(options: argparse.Namespace, command: str) -> None:
        if not options.given:
            parser.error("give the path of a recipe: recipes/studies/resnet20_fashion_mnist.yaml")
        recipe = load_recipe(options.given[0], options.given[1:], "compare")
        log_to_terminal(quiet=options.quiet)
        from sosp_hub.pipeline import compare as pipeline  # torch, which a faulty recipe need not

        pipeline.compare(recipe, overwrite=options.overwrite, command=command, **shown_as(options))

    return run_command(parser, run, arguments)


make_callable(__name__, compare)

if __name__ == "__main__":
    sys.exit(main())
