"""Columns of a table, with the row named that holds something else."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sosp_hub.errors import DataError, shortened

if TYPE_CHECKING:
    from datasets import Dataset

    from sosp_hub.recipe.schema import DataSection


def check_columns(
    table: "Dataset", section: "DataSection", keys: tuple[str, ...], where: str
) -> None:
    """Sees that a table has rows, and the columns that these keys of ``data`` name.

    Raises:
        DataError: It has not.
    """
    if not len(table):
        raise DataError(f"data: {where} has no rows; give a data set with samples")
    named = {key: getattr(section, key) for key in keys}
    missing = {key: name for key, name in named.items() if name not in table.column_names}
    if not missing:
        return
    columns = _with_parts(table)
    names = shortened(", ".join(columns), 300)
    keys_of_data = ", ".join(f"data.{key}" for key in missing)
    lacks = f"no column {', '.join(map(repr, missing.values()))}"
    write = " ".join(f"data.{key}=NAME" for key in missing)
    advice = f". Write {write}, {'one' if len(missing) == 1 else 'each one'} of these"
    if not {*columns} - {*named.values()}:
        advice = "; all of them are named already. Give a data set that has one more"
    advice = _separator(table.column_names) or advice
    raise DataError(f"{keys_of_data}: {where} has {lacks}; it has {names}{advice}")


def texts_of(table: "Dataset", section: "DataSection", key: str, where: str) -> list[str]:
    """A column of texts.

    Raises:
        DataError: A row that has none.
    """
    return [str(text) for text in values_of(table, section, key, where, str, "text")]


def values_of(
    table: "Dataset", section: "DataSection", key: str, where: str, kind: type, expected: str
) -> list[Any]:
    """A column whose values are all of one type.

    Raises:
        DataError: A row with another; names it.
    """
    column = getattr(section, key)
    values = table[column][:]
    odd = next((i for i, value in enumerate(values) if not isinstance(value, kind)), None)
    if odd is not None and isinstance(values[odd], bytes):
        raise DataError(f"data.{key}: row {odd} of {where} is not in UTF-8; save the file as UTF-8")
    if odd is not None:
        raise DataError(
            f"data.{key}: row {odd} of {where} has {shortened(repr(values[odd]))} in column "
            f"{column!r}, expected {expected}"
        )
    return values


def _with_parts(table: "Dataset") -> list[str]:
    """Columns as a recipe names them: ``a.b`` for part b of column a."""
    return [
        part
        for name, feature in table.features.items()
        for part in ([f"{name}.{key}" for key in feature] if isinstance(feature, dict) else [name])
    ]


def _separator(columns: Sequence[str]) -> str:
    """What to do where a table was read as one column."""
    if len(columns) == 1 and ";" in columns[0]:
        return ". The file separates its columns with semicolons; write it with commas"
    if len(columns) == 1 and "\t" in columns[0]:
        return ". The file separates its columns with tabs; name it .tsv"
    return ""


def labels_of(table: "Dataset", column: str) -> tuple[list[Any], tuple[str, ...]]:
    """Labels as they are written, and the names of the classes where the table lists them."""
    from datasets import ClassLabel

    feature = table.features[column]
    while hasattr(feature, "feature"):  # of lists
        feature = feature.feature
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    return table[column][:], names


def image_column(table: "Dataset", column: str) -> Callable[[int], Any]:
    """Gives the image of a row."""
    from datasets import Image

    if not isinstance(table.features[column], Image):
        table = table.cast_column(column, Image())
    return partial(_cell, table.select_columns([column]), column)


def _cell(table: "Dataset", column: str, row: int) -> Any:
    return table[row][column]
