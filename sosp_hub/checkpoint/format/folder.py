"""Writes a checkpoint folder as a whole, and carries over what a person has put beside it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sosp_hub.atomic import draft_folder
from sosp_hub.checkpoint.format.weight_files import is_weight_file


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder; on success it takes the place of ``folder``, else nothing changes.

    Files of an older save stay if nothing new has their name, except weights: an old single file
    beside new shards is what loaders would read.

    Raises:
        OutputError: ``folder`` is a file, or cannot be written.
    """
    with draft_folder(folder) as fresh:
        yield fresh
        if folder.is_dir():
            _carry_over(folder, fresh)


def _carry_over(old: Path, new: Path) -> None:
    for path in old.iterdir():
        target = new / path.name
        if is_weight_file(path.name) or target.exists():
            continue
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_link, symlinks=True)
        else:
            _link(path, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
