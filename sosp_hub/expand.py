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
from sosp_hub.pipeline.command import recipe_parser, run_as_guest, run_recipe
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
    return run_as_guest("expand", recipe, overrides, overwrite=overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    return run_recipe(
        "expand", command_parser(), arguments, "studies/expand_resnet20_fashion_mnist"
    )


make_callable(__name__, expand)

if __name__ == "__main__":
    sys.exit(main())
