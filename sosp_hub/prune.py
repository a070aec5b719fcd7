"""``python -m sosp_hub.prune RECIPE.yaml [key.path=value ...]``: the whole job."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from sosp_hub.errors import SospHubError
from sosp_hub.recipe.load import load_recipe

_USAGE = "python -m sosp_hub.prune RECIPE.yaml [key.path=value ...] [--overwrite]"


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
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="what to do; see below")
    parser.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        help="goes before the recipe, such as budget.macs=0.3",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that holds a finished run"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        from sosp_hub.recipe.describe import describe_recipe

        parser.epilog = f"A recipe is YAML with these sections and keys:\n\n{describe_recipe()}"
    options = parser.parse_intermixed_args(given)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        _log_to_terminal()
        from sosp_hub.pipeline.run import run  # torch, which a faulty recipe need not wait for

        command = shlex.join(["python", "-m", "sosp_hub.prune", *given])
        run(recipe, overwrite=options.overwrite, command=command)
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
