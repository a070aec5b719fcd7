"""Files and folders that are written beside their place and then renamed: whole, or not there."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sosp_hub.errors import OutputError, shortened

_ADVICE = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EACCES: "write to a folder of your own",
    errno.EPERM: "write to a folder of your own",
    errno.EROFS: "write to a folder of your own",
    errno.ENAMETOOLONG: "write a shorter name",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EEXIST: "a part of this path is a file",
}


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole.

    Raises:
        OutputError: It cannot be written; what was there stays.
    """
    draft = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``folder``; on success it takes its place.

    Raises:
        OutputError: It cannot be written; what was there stays.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows a link to its target
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(
                f"{shortened(str(folder))}: is a file, expected a folder to save into"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder_in(folder.parent, folder.name) as draft:
            yield draft
            as_others_are(draft)
            put_in_place(draft, folder)


@contextlib.contextmanager
def draft_folder_in(parent: Path, name: str) -> Iterator[Path]:
    """Gives an empty folder in ``parent``, gone afterwards; ``name`` is part of its name."""
    draft = Path(tempfile.mkdtemp(prefix=f".{name[:40]}.", suffix=".new", dir=parent))
    try:
        draft.chmod(0o777 & ~_umask())
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def as_others_are(folder: Path) -> None:
    """Gives all below a folder the permissions of new files; safetensors' are their owner's."""
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def put_in_place(draft: Path, folder: Path) -> None:
    """Renames a whole folder to its place; what was there goes only when the new one has come."""
    old = draft.with_name(f"{draft.name}.old")
    if folder.exists():  # else `old` may be what a kill has left of it
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what the system says against writing into an OutputError.

    Raises:
        OutputError: With what to do.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{shortened(str(place))}: cannot be written ({_words(error)})"
        ) from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise OutputError(f"{shortened(str(place))}: no name of a file ({error})") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its errors of the disk are texts
            raise
        raise OutputError(f"{shortened(str(place))}: cannot be written ({error})") from error


def _words(error: OSError) -> str:
    message = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    return f"{message}; {advice}" if advice else message


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
