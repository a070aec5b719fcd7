"""``python -m sosp_hub.prune RECIPE.yaml [key.path=value ...]``: the whole job."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from sosp_hub.errors import SospHubError
from sosp_hub.recipe.load import load_recipe

_USAGE = """python -m sosp_hub.prune RECIPE.yaml [key.path=value ...] [--overwrite]
       python -m sosp_hub.prune --from-scores FOLDER budget.macs=0.3 [--with-data] [--overwrite]"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe; the exit code: 0 done, 2 something for the user to change, 130 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m sosp_hub.prune",
        usage=_USAGE,
        allow_abbrev=False,
        description="Prunes a model as a recipe says: score, cut, fine-tune, measure, save. "
        "The same command goes on where a stopped run was.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "given",
        metavar="RECIPE.yaml key.path=value",
        nargs="*",
        help="what to do (see below), and what goes before it, such as budget.macs=0.3",
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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that holds a finished run"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        from sosp_hub.recipe.describe import describe_recipe

        parser.epilog = f"A recipe is YAML with these sections and keys:\n\n{describe_recipe()}"
    options = parser.parse_intermixed_args(given)
    if options.with_data and not options.from_scores:
        parser.error("--with-data belongs to --from-scores; a recipe always has its data")
    if not options.given and not options.from_scores:
        parser.error("the path of a recipe is missing, such as recipes/quickstart.yaml")
    try:
        scores = None
        if options.from_scores:
            from sosp_hub.pipeline.scores import read_scores

            scores = read_scores(options.from_scores, options.given)
        recipe = scores.recipe if scores else load_recipe(options.given[0], options.given[1:])
        _log_to_terminal()
        from sosp_hub.pipeline.run import run  # torch, which a faulty recipe need not wait for

        command = shlex.join(["python", "-m", "sosp_hub.prune", *given])
        run(
            recipe,
            overwrite=options.overwrite,
            command=command,
            scores=scores,
            with_data=scores is None or options.with_data,
        )
    except SospHubError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("sosp_hub")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    from transformers.utils import logging as transformers_logging  # its bars would cross ours

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
