"""Local text, jsonl, csv and parquet files as one table, read without a copy in a cache."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sosp_hub.data.rows import AUDIO_SUFFIXES
from sosp_hub.errors import DataError, shortened
from sosp_hub.types import TABLE_SUFFIXES
from sosp_hub.untrusted import parse_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

_ENCODING = "utf-8-sig"  # without the mark that some editors write at the start


def table_files(folder: Path) -> list[Path]:
    """Every table file below the folder, in order."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix in TABLE_SUFFIXES and path.is_file()
    )


def files_of_split(files: Sequence[Path], folder: Path, split: str) -> list[Path]:
    """The files of a split by name: ``train.csv``, ``train-0-of-2.parquet``, ``train/any.txt``."""
    return [file for file in files if _belongs(file.relative_to(folder), split)]


def read_table(files: Sequence[Path]) -> "Dataset":
    """All rows of the files; a plain text is one row with the column ``text``.

    Names of files are read as `datasets` reads them: ``file_name`` is the column ``image`` or
    ``audio``, ``mask_file_name`` the column ``mask``, relative to the folder of the table.

    Raises:
        DataError: A file that is not what its ending says, or files whose columns differ in type.
    """
    import pyarrow as pa
    from datasets import Dataset

    tables: list[pa.Table] = []
    for file in files:
        if not file.stat().st_size:
            raise DataError(f"data.path: {file} is empty; give a file with rows")
        try:
            tables.append(_read_one(file))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"data.path: cannot read {file} as {file.suffix} ({error})") from error
        tables[-1] = _with_files(tables[-1], file.parent)
        names = tables[-1].column_names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"data.path: {file} has the column {twice!r} twice; rename one of them")
    try:
        return Dataset(pa.concat_tables(tables, promote_options="default"))
    except pa.ArrowException as error:
        names = ", ".join(str(file) for file in files[:5])
        raise DataError(
            f"data.path: the columns of {names} do not fit each other ({error})"
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` left the folder by ``save_to_disk``."""
    table = folder / "state.json", folder / "dataset_info.json"
    return (folder / "dataset_dict.json").is_file() or all(file.is_file() for file in table)


def read_saved(folder: Path) -> "Dataset | DatasetDict":
    """A folder of ``save_to_disk``: one table, or one for each split.

    Raises:
        DataError: It is incomplete or damaged.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:  # a library meets damaged files with whatever error comes first
        raise DataError(
            f"data.path: cannot read {folder}, which save_to_disk wrote ({error}); save it again"
        ) from error


def has_metadata(folder: Path) -> bool:
    """Whether a table beside images or sounds tells of them, as `datasets` has it."""
    return any(path.suffix in TABLE_SUFFIXES for path in folder.rglob("metadata.*"))


def _with_files(table: "pa.Table", folder: Path) -> "pa.Table":
    """Columns of names of files that lie beside the table, as whole paths."""
    import pyarrow as pa

    for place, name in enumerate(table.column_names):
        if name != _FILE and not name.endswith(f"_{_FILE}"):
            continue
        files = table[name].to_pylist()
        first = next((file for file in files if isinstance(file, str)), None)
        if first is None or not (folder / first).is_file():
            continue
        kind = "audio" if Path(first).suffix.lower() in AUDIO_SUFFIXES else "image"
        new = kind if name == _FILE else name.removesuffix(f"_{_FILE}")
        if new in table.column_names:
            continue
        paths = [str(folder / file) if isinstance(file, str) else file for file in files]
        table = table.set_column(place, new, pa.array(paths))
    return table


_FILE = "file_name"


def _read_one(file: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    with file.open("rb") as opened:
        if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError("it is in UTF-16; save it as UTF-8")
    match file.suffix:
        case ".parquet":
            return pyarrow.parquet.read_table(file)
        case ".csv" | ".tsv":
            dialect = pyarrow.csv.ParseOptions(
                delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True
            )
            return pyarrow.csv.read_csv(file, parse_options=dialect)
        case ".json":
            return _table(_rows(_json(file.read_text(_ENCODING))))
        case ".jsonl" | ".ndjson":
            lines = file.read_text(_ENCODING).split(
                "\n"
            )  # other line ends may stand inside a string
            return _table(_rows([_json(line) for line in lines if line.strip()]))
        case _:
            return pa.table({"text": [file.read_text(_ENCODING)]})


def _table(rows: Sequence[dict[str, Any]]) -> "pa.Table":
    """Of every key that any row has; a row without it has none."""
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except pa.ArrowException as error:
            given = [(at, value) for at, value in enumerate(values) if value is not None]
            first = given[0][1]
            other = next((pair for pair in given if type(pair[1]) is not type(first)), None)
            if other is None:
                raise ValueError(f"column {name!r}: {error}") from error
            raise ValueError(
                f"column {name!r} has {shortened(repr(first))} in row {given[0][0]} and "
                f"{shortened(repr(other[1]))} in row {other[0]}; write all of them in one form"
            ) from error
    return pa.table(columns)


def _json(text: str) -> Any:
    return parse_json(text, object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {shortened(repr(twice))} twice")
    return record


def _rows(parsed: Any) -> list[dict[str, Any]]:
    if not isinstance(parsed, list) or not all(isinstance(row, dict) for row in parsed):
        raise ValueError('expected rows, each an object such as {"text": ...}; got other JSON')
    return parsed


def _belongs(file: Path, split: str) -> bool:
    stem = file.name.split(".")[0]
    named = stem == split or stem.startswith((f"{split}-", f"{split}_"))
    return str(file) == split or split in file.parts[:-1] or named
