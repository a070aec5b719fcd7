"""Reads ``config.json`` and the headers of weight files, without their data, and trusts neither."""

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sosp_hub.errors import CheckpointError, shortened

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_PATH = 4096
_LARGEST_JSON = 64 * 2**20
_LARGEST_HEADER = 100 * 2**20  # the limit of safetensors itself
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """What a weight file says about one tensor."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    file: str


@contextlib.contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Turns what the system says against reading into a CheckpointError.

    Raises:
        CheckpointError: Says which file or folder.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{shortened(str(place))}: cannot be read ({error.strerror or error})"
        ) from error


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
    found: dict[str, TensorHeader] = {}
    for name in sorted(set(placed.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{INDEX}: names {name}, which is missing from {folder}")
        found |= _read_file(folder / name)
    for tensor, file in placed.items():
        if tensor not in found or found[tensor].file != file:
            raise CheckpointError(
                f"{INDEX}: weight_map places {tensor!r} in {file}, which does not hold it"
            )
    return found


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
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path.name}: no safetensors file, or cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path.name}: header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: header: expected a JSON object")
    header.pop("__metadata__", None)
    found = {name: _read_entry(name, entry, path.name) for name, entry in header.items()}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != size - 8 - length:
        raise CheckpointError(
            f"{path.name}: its tensors need {ends[-1]} bytes without gaps, it holds "
            f"{size - 8 - length}; it was cut short or damaged, so fetch it again"
        )
    return found


def _read_entry(name: str, entry: object, file: str) -> TensorHeader:
    where = f"{file}: tensor {ascii(name)[:120]}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: unknown dtype {ascii(dtype)[:40]}")
    for part, values in (("shape", shape), ("data_offsets", span)):
        if not isinstance(values, list) or not all(
            type(v) is int and 0 <= v < 2**63 for v in values
        ):
            raise CheckpointError(f"{where}: {part}: expected whole numbers from 0")
    if len(span) != 2 or (span[1] - span[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise CheckpointError(f"{where}: {len(shape)} sizes of {dtype} do not fill data_offsets")
    return TensorHeader(dtype, tuple(shape), span[1] - span[0], file)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {ascii(twice)[:80]} is given twice")
    return record
