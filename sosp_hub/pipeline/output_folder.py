"""The place of an output: checked before anything is done, taken only by what is whole."""

import errno
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from sosp_hub.atomic import put_in_place, writing
from sosp_hub.distributed import is_main
from sosp_hub.errors import OutputError, OutputExistsError
from sosp_hub.modes import in_own_modes
from sosp_hub.recipe.schema import Recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Options = ParamSpec("Options")
Result = TypeVar("Result")


def check_place(output: Path, report: str, overwrite: bool) -> None:
    """Refuses an output folder that is not ours to write.

    Args:
        output: The folder.
        report: Name of a file that a finished run leaves in it.
        overwrite: Whether a finished run may be replaced.

    Raises:
        OutputExistsError: Says what is there.
    """
    check_usable(output)
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


def check_usable(output: Path) -> None:
    """Refuses the place of an output folder that is a file, or where none can be made."""
    if output.exists() and not output.is_dir():
        raise OutputExistsError(f"output.dir: {output} is a file; write the name of a new folder")
    nearest = next(
        path for path in (output.absolute(), *output.absolute().parents) if path.exists()
    )
    if not nearest.is_dir():
        raise OutputExistsError(f"output.dir: {nearest} is a file; write the name of a new folder")
    if not os.access(nearest, os.W_OK):
        raise OutputExistsError(
            f"output.dir: {nearest} cannot be written to; write output.dir=FOLDER of your own"
        )


def put(draft: Path, output: Path) -> None:
    """Puts the whole folder in its place; what was there goes only when the new one has come."""
    with writing(output):
        put_in_place(draft, output)


@contextmanager
def drafted(folder: Path, output: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of the output; ``folder`` goes."""
    draft = folder / "result" / output.name
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    put(draft, output)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other processes of this machine from writing the same output at the same time.

    The lock ends with the process, whatever ends it. It is not beside the output, so that a run
    that is refused leaves nothing there.

    Raises:
        OutputExistsError: Another run holds it.
    """
    if fcntl is None:
        yield
        return
    place = os.path.realpath(output)
    name = f"sosp_hub-{os.getuid()}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.lock"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    file = os.open(Path(tempfile.gettempdir()) / name, flags, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputExistsError(
                f"output.dir: another run writes {output} now; wait for it, or write another "
                "output.dir=FOLDER"
            ) from None
        yield
    finally:
        os.close(file)


@contextmanager
def _disk_told(output: Path) -> Iterator[None]:
    """Says that a disk is full, whichever library wrote to it."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise OutputError(
            f"output.dir: {output} cannot be written, its disk or that of temporary files is full "
            f"({error}); make room, and the same command goes on, or write another "
            "output.dir=FOLDER"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Of Python, of safetensors (a text), or of torch (an error of its stream of a file)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in ("(os error 28)", "iostream error")):
            return True
        error = error.__cause__ or error.__context__
    return False


def alone(run: Callable[Concatenate[Recipe, Options], Result]) -> Callable[..., Result]:
    """A run that the main process does while no other process writes the same output."""

    @in_own_modes
    @functools.wraps(run)
    def guarded(recipe: Recipe, *arguments: Options.args, **options: Options.kwargs) -> Result:
        place = Path(str(recipe.output.dir)).expanduser()
        with locked(place) if is_main() else nullcontext(), _disk_told(place):
            return run(recipe, *arguments, **options)

    return guarded
