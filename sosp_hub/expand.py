"""``python -m sosp_hub.expand RECIPE.yaml [key.path=value ...]``: bottlenecks found and widened.

A recipe as for ``prune`` with one more section, ``expand``: how far, what counts as a bottleneck,
and seeds.
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
    """The command line of ``expand``."""
    return recipe_parser(
        "expand",
        "Cuts a model on paper, widens the layers that are cut least, trains, and prunes back to "
        "the base's budget, beside the base itself and one whose layers are all widened alike.",
    )


def expand(
    recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, overwrite: bool = False
) -> dict[str, Any]:
    """Widens what a cut spares, trains, and prunes back, as the section ``expand`` says.

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
        >>> results = sosp_hub.expand("studies/expand_resnet20_fashion_mnist")  # doctest: +SKIP
    """
    checked = as_recipe(recipe, overrides, "expand")
    from sosp_hub.pipeline.guest import as_guest  # torch, which a faulty recipe need not wait for

    with as_guest():  # importing the libraries draws random numbers too
        from sosp_hub.pipeline.expand import expand as work

        return work(checked, overwrite=overwrite, command="sosp_hub.expand(...)", show=None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    parser = command_parser()

    def run(options: argparse.Namespace, command: str) -> None:
        if not options.given:
            example = "recipes/studies/expand_resnet20_fashion_mnist.yaml"
            parser.error(f"give the path of a recipe, such as {example}")
        recipe = load_recipe(options.given[0], options.given[1:], "expand")
        log_to_terminal(quiet=options.quiet)
        from sosp_hub.pipeline import expand as pipeline  # torch, which a faulty recipe need not

        pipeline.expand(recipe, overwrite=options.overwrite, command=command, **shown_as(options))

    return run_command(parser, run, arguments)


make_callable(__name__, expand)

if __name__ == "__main__":
    sys.exit(main())
