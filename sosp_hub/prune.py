"""``python -m sosp_hub.prune RECIPE [key.path=value ...]``: the whole job."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosp_hub.callable_module import make_callable
from sosp_hub.pipeline.command import (
    log_to_terminal,
    recipe_parser,
    run_as_guest,
    run_command,
    run_shown,
)
from sosp_hub.recipe.load import load_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.shipped import find_recipe

if TYPE_CHECKING:
    from sosp_hub.report.terminal import Report

_OF_A_MODEL = ("task", "data", "library", "macs", "params")


def prune(
    recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, overwrite: bool = False
) -> "Report":
    """Does everything that a recipe says: score, cut, rebuild, fine-tune, measure, save.

    Args:
        recipe: Path or name of a recipe, its sections as dictionaries, or a recipe.
        *overrides: ``key.path=value`` each, as on the command line.
        overwrite: Replace an output folder that holds a finished run.

    Returns:
        The report: costs and metrics before and after; ``print`` shows its tables.

    Raises:
        RecipeError: What is not valid in the recipe, all faults at once.
        SospHubError: Anything else that the user has to change.

    Example:
        >>> report = sosp_hub.prune("quickstart", "budget.macs=0.3")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    return run_as_guest("prune", recipe, overrides, overwrite=overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe; the exit code: 0 done, 2 something for the user to change, 130 stopped.

    With ``--plan-only`` 1 where the run would be refused or would not fit into memory.
    """
    parser = command_parser()

    def do(options: argparse.Namespace, command: str) -> int:
        if options.plan_only and (options.from_scores or options.overwrite):
            parser.error("--plan-only runs nothing; leave out --from-scores and --overwrite")
        if options.with_data and not options.from_scores:
            parser.error("--with-data belongs to --from-scores; a recipe always has its data")
        if not options.given and not options.from_scores:
            parser.error("the name or path of a recipe is missing, such as quickstart")
        made = _of_a_model(options)
        if made and (options.from_scores or find_recipe(options.given[0]).is_file()):
            keys = "budget.params=0.8, model.task=..., data.path=..."
            parser.error(f"--{made[0]} is for a model without a recipe; write keys, such as {keys}")
        scores = None
        if options.from_scores:
            from sosp_hub.pipeline.scores import read_scores

            scores = read_scores(options.from_scores, options.given, with_data=options.with_data)
        if scores:
            recipe = scores.recipe
        elif made:
            recipe = _made_recipe(options)
        else:
            recipe = load_recipe(options.given[0], options.given[1:], "prune")
        if options.plan_only:
            return _tell_forecast(recipe, options)
        log_to_terminal(quiet=options.quiet)
        from sosp_hub.pipeline.run import run  # torch, which a faulty recipe need not wait for

        run_shown(
            run,
            recipe,
            options,
            overwrite=options.overwrite,
            command=command,
            scores=scores,
            with_data=scores is None or options.with_data,
        )
        if made:
            _leave_recipe(recipe, options.overwrite)
        return 0

    return run_command(parser, do, arguments)


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``prune``."""
    parser = recipe_parser(
        "prune",
        "Prunes a model as a recipe says: score, cut, rebuild, fine-tune, measure, save.",
        "MODEL_ID --task TASK --data FILE [--params 0.8] [key.path=value ...]",
        "RECIPE [key.path=value ...] --plan-only",
        "--from-scores FOLDER budget.macs=0.3 [--with-data] [--overwrite]",
    )
    parser.add_argument(
        "--plan-only",
        action="store_true",
        help="run nothing: tell from the model's config what may go, which budgets can be reached, "
        "and what time and memory each stage takes here; opens neither weights nor data",
    )
    model = parser.add_argument_group("a model without a recipe (the recipe is written for you)")
    model.add_argument("--task", help="what the model does: the hub's pipeline tag")
    model.add_argument("--data", metavar="FILE", help="local file or folder, or a hub id")
    model.add_argument("--macs", type=_share, metavar="SHARE", help="multiply-accumulates to keep")
    model.add_argument("--params", type=_share, metavar="SHARE", help="parameters to keep")
    model.add_argument(
        "--library", choices=("timm", "transformers"), help="where the name does not tell"
    )
    again = parser.add_argument_group("another budget of a finished run")
    again.add_argument(
        "--from-scores",
        metavar="FOLDER",
        help="cut again from the scores in the output of a finished run; needs neither its data "
        "nor a GPU",
    )
    again.add_argument(
        "--with-data",
        action="store_true",
        help="with --from-scores: also measure, re-estimate norms and fine-tune",
    )
    return parser


def _share(given: str) -> float | str:
    """A number, or what was written instead, which the recipe then refuses with what to write."""
    try:
        return float(given)
    except ValueError:
        return given


def _tell_forecast(recipe: Recipe, options: argparse.Namespace) -> int:
    """Prints what a run would need; 1 where it would be refused or would not fit."""
    from sosp_hub.pipeline.forecast import forecast  # torch: a faulty recipe need not wait

    told = forecast(recipe)
    if options.json:
        print(json.dumps(told.as_json()))
    elif not options.quiet:
        print(told)
    return 0 if told.fits else 1


def _of_a_model(options: argparse.Namespace) -> list[str]:
    """The options for a model without a recipe that were given."""
    return [name for name in _OF_A_MODEL if getattr(options, name) is not None]


def _leave_recipe(recipe: Recipe, overwrite: bool) -> None:
    """Writes a recipe that was made, once its run is done: a command that failed leaves none."""
    from sosp_hub.distributed import is_main, logger
    from sosp_hub.recipe.quick import write_recipe

    if is_main():
        path = write_recipe(recipe, overwrite=overwrite)
        logger.info("the recipe of this run, to change and run again: %s", path)


def _made_recipe(options: argparse.Namespace) -> Recipe:
    """A recipe of the options for a model."""
    from sosp_hub.recipe.quick import place_of_recipe, quick_recipe
    from sosp_hub.zoo.library import library_of_id

    name, *overrides = options.given
    shares = {"macs": options.macs, "params": options.params}
    recipe = quick_recipe(
        name,
        library=options.library or library_of_id(name),
        task=options.task,
        data=options.data,
        budget={key: share for key, share in shares.items() if share is not None},
        overrides=overrides,
    )
    place_of_recipe(recipe, overwrite=options.overwrite)
    return recipe


make_callable(__name__, prune)

if __name__ == "__main__":
    sys.exit(main())
