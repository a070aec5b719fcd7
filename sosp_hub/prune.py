"""``python -m sosp_hub.prune RECIPE.yaml [key.path=value ...]``: the whole job."""

import argparse
import sys
from collections.abc import Sequence

from sosp_hub.pipeline.command import log_to_terminal, recipe_parser, run_command
from sosp_hub.recipe.load import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    parser = recipe_parser(
        "prune",
        "Prunes a model as a recipe says: score, cut, fine-tune, measure, save.",
        "--from-scores FOLDER budget.macs=0.3 [--with-data] [--overwrite]",
    )
    parser.add_argument(
        "--from-scores",
        metavar="FOLDER",
        help="cut again from the scores in the output of a finished run, to another budget; "
        "needs neither its data nor a GPU",
    )
    parser.add_argument(
        "--with-data",
        action="store_true",
        help="with --from-scores: also measure, re-estimate norms and fine-tune",
    )

    def prune(options: argparse.Namespace, command: str) -> None:
        if options.with_data and not options.from_scores:
            parser.error("--with-data belongs to --from-scores; a recipe always has its data")
        if not options.given and not options.from_scores:
            parser.error("the path of a recipe is missing, such as recipes/quickstart.yaml")
        scores = None
        if options.from_scores:
            from sosp_hub.pipeline.scores import read_scores

            scores = read_scores(options.from_scores, options.given)
        recipe = (
            scores.recipe if scores else load_recipe(options.given[0], options.given[1:], "prune")
        )
        log_to_terminal()
        from sosp_hub.pipeline.run import run  # torch, which a faulty recipe need not wait for

        run(
            recipe,
            overwrite=options.overwrite,
            command=command,
            scores=scores,
            with_data=scores is None or options.with_data,
        )

    return run_command(parser, prune, arguments)


if __name__ == "__main__":
    sys.exit(main())
