"""The place of an output: checked before anything is done, taken only by what is whole."""

import os
from pathlib import Path

from sosp_hub.atomic import put_in_place, writing
from sosp_hub.errors import OutputExistsError


def check_place(output: Path, report: str, overwrite: bool) -> None:
    """Refuses an output folder that is not ours to write.

    Args:
        output: The folder.
        report: Name of a file that a finished run leaves in it.
        overwrite: Whether a finished run may be replaced.

    Raises:
        OutputExistsError: Says what is there.
    """
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output.dir: {output} is a file; write the name of a new folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / report).is_file():
            raise OutputExistsError(
                f"output.dir: {output} holds files that are no result of this command, and is left"
                " alone; write the name of a new folder"
            )
        if not overwrite:
            raise OutputExistsError(
                f"output.dir: {output} holds a finished run; write another output.dir=FOLDER, or"
                " add --overwrite to replace it"
            )
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OutputExistsError(f"output.dir: {there} is a file; write the name of a new folder")
    if not os.access(there, os.W_OK):
        raise OutputExistsError(
            f"output.dir: {there} cannot be written to; write output.dir=FOLDER of your own"
        )


def put(draft: Path, output: Path) -> None:
    """Puts the whole folder in its place; what was there goes only when the new one has come."""
    with writing(output):
        put_in_place(draft, output)
