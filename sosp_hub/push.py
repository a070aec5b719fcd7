"""``python -m sosp_hub.push FOLDER REPO_ID``: publishes a saved model as one commit."""

import argparse
import logging
import sys
from collections.abc import Sequence

from sosp_hub.command_name import command_name
from sosp_hub.errors import SospHubError
from sosp_hub.hub.push import PushResult, push_to_hub


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (2 = the input cannot be used)."""
    options = command_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sosp_hub").setLevel(logging.INFO)
    try:
        result = push_to_hub(
            options.folder,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            commit_message=options.message,
            dry_run=options.dry_run,
        )
    except SospHubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summary(result))
    return 0


def command_parser() -> argparse.ArgumentParser:
    """The command line of ``push``."""
    parser = argparse.ArgumentParser(
        prog=command_name("push"),
        description="Publish a saved model as one commit. The token is the one of `hf auth login` "
        "or of HF_TOKEN.",
    )
    parser.add_argument("folder", help="output folder of a run")
    parser.add_argument("repo_id", help="NAMESPACE/NAME; made if it does not exist")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of a repository that is made (default: as the namespace's default is)",
    )
    parser.add_argument("--revision", help="branch, made if it does not exist (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and list only; nothing is written"
    )
    return parser


def _summary(result: PushResult) -> str:
    lines = [f"  + {name}" for name in result.added] + [f"  - {name}" for name in result.deleted]
    if result.unchanged:
        lines.append(f"  = {len(result.unchanged)} files that the hub has already")
    size = f"{len(result.added)} files, {result.num_bytes / 1e6:,.1f} MB"
    if result.commit is None:
        head = f"Would push {size} to {result.url}; nothing was written"
        if not result.compared:
            lines.append("  (the repository could not be asked what it has already)")
    elif not result.added and not result.deleted:
        head = f"{result.url} holds exactly this folder already; nothing to push"
    else:
        head = f"Pushed {size}: {result.url}"
    return "\n".join([head, *lines])


if __name__ == "__main__":
    sys.exit(main())
