"""Writes a folder as a whole: into a temporary one beside it, which then takes its place."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sosp_hub.errors import CheckpointError

_WEIGHTS = re.compile(
    r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?|"
    r"(tf_model\.h5|flax_model\.msgpack|.*\.index\.json)"
)


def is_weight_file(name: str) -> bool:
    """Whether a loader could take the file for the model's weights."""
    return _WEIGHTS.fullmatch(name) is not None


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder; on success it takes the place of ``folder``, else nothing changes.

    Files of an older save stay if nothing new has their name, except weights: an old single file
    beside new shards is what loaders would read.

    Raises:
        CheckpointError: ``folder`` is a file.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows a link to its target
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder to save into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
    try:
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        for path in fresh.rglob("*"):  # safetensors writes files that only their owner can read
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        old = fresh.with_suffix(".old")
        if folder.is_dir():
            _carry_over(folder, fresh)
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
