"""Reads ``config.json`` and the headers of weight files, without their data, and trusts neither."""

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sosp_hub.errors import CheckpointError, shortened

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_PATH = 4096
_LARGEST_JSON = 64 * 2**20


@dataclass(frozen=True)
class TensorHeader:
    """Dtype, shape and place of one tensor, from the header of its weight file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str


@contextlib.contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Turns an OSError while a file is read into a CheckpointError.

    Raises:
        CheckpointError: Says which file or folder.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{shortened(str(place))}: cannot be read ({error.strerror or error})"
        ) from error


def local_folder(name: str | Path) -> Path | None:
    """The folder of this name; None where it can only be a hub id.

    Raises:
        CheckpointError: It is a file, or cannot be looked at.
    """
    if is_folder(name):
        return Path(name)
    if len(os.fsencode(name)) <= _LONGEST_PATH and os.path.isfile(name):  # noqa: PTH113 - no raise
        raise CheckpointError(f"{name}: is a file; give the folder of a model or a hub id")
    return None


def is_folder(name: str | Path) -> bool:
    """Whether a name that may be a hub id is a folder here.

    Raises:
        CheckpointError: It may be one, but cannot be looked at.
    """
    if len(os.fsencode(name)) > _LONGEST_PATH:
        return False
    try:
        return Path(name).is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise CheckpointError(
            f"{shortened(str(name))}: cannot be read ({error.strerror or error})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: No such file, too large, no JSON, a key given twice, or no object.
    """
    with reading(path):
        if not path.is_file():
            raise CheckpointError(f"{shortened(str(path.parent))}: there is no {path.name}")
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{path.name}: {size} bytes, at most {_LARGEST_JSON} are read")
        content = path.read_bytes()
    try:
        record = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise CheckpointError(f"{path.name}: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path.name}: a {type(record).__name__}, expected a JSON object")
    return record


def read_tensors(folder: Path) -> dict[str, TensorHeader]:
    """Headers of all tensors of a checkpoint, checked against the sizes of its files.

    Raises:
        CheckpointError: Missing, truncated or damaged files, or an index that disagrees with them.
    """
    with reading(folder):
        return _read_tensors(folder)


def _read_tensors(folder: Path) -> dict[str, TensorHeader]:
    if (folder / WEIGHTS).is_file():
        return _read_file(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    placed = read_index(folder)
    tensors: dict[str, TensorHeader] = {}
    for name in sorted(set(placed.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{INDEX}: names {name}, which is missing from {folder}")
        tensors |= _read_file(folder / name)
    for tensor, file in placed.items():
        if tensor not in tensors or tensors[tensor].file != file:
            raise CheckpointError(
                f"{INDEX}: weight_map places {tensor!r} in {file}, which does not hold it"
            )
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index beside them.

    Raises:
        CheckpointError: A damaged index, or one that names files elsewhere.
    """
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{INDEX}: weight_map: expected an object that places every tensor")
    return {tensor: _file_name(name) for tensor, name in placed.items()}


def _file_name(name: object) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{INDEX}: weight_map: {ascii(name)[:80]} is not the name of a weight file beside it"
        )
    return name


def _read_file(path: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header, and the size of the file
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{path.name}: {error}; it is no safetensors file, or was cut short or damaged, so "
            f"fetch it again"
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except ValueError as error:
            raise CheckpointError(f"{path.name}: header: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: TensorHeader(
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
            path.name,
        )
        for name, entry in header.items()
    }


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {ascii(twice)[:80]} is given twice")
    return record
