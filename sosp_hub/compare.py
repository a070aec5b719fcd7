"""``python -m sosp_hub.compare RECIPE.yaml [key.path=value ...]``: which criterion serves a model.

A recipe as for ``prune`` with one more section, ``compare``: criteria, budgets and seeds.
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
    return run_as_guest("compare", recipe, overrides, overwrite=overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a comparison; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    return run_recipe("compare", command_parser(), arguments, "studies/resnet20_fashion_mnist")


make_callable(__name__, compare)

if __name__ == "__main__":
    sys.exit(main())
