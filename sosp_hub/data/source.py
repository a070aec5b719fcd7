"""Opens a data set, wherever it lives: what it holds is known before any model is."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sosp_hub.data.idx import is_idx_folder, read_digits, read_idx_split
from sosp_hub.data.labels import code_labels
from sosp_hub.data.reach import looks_like_path, nearest_existing, reaching_hub
from sosp_hub.data.rows import IMAGE_SUFFIXES, ImageRows, PixelRows, Rows, TextRows, image_folder
from sosp_hub.data.tables import TABLE_SUFFIXES, files_of_split, read_table, table_files
from sosp_hub.errors import DataError, shortened
from sosp_hub.recipe.schema import DataSection
from sosp_hub.types import Task

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

DIGITS = "sklearn/digits"
SplitName = Literal["train", "test"]
_STATISTICS_OF = 10_000  # images; enough for a mean


@dataclass(frozen=True)
class DataInfo:
    """What a model has to fit.

    Attributes:
        num_labels: Classes; None for causal-lm.
        class_names: Their names, in the order of the label numbers.
        image_shape: Channels, height and width where all images share one small size, else None.
        mean: Per channel of the train images, on a scale of 0 to 1; None where they are not in
            memory.
        std: As ``mean``.
        image_size: Pixels that the recipe asks for.
    """

    num_labels: int | None = None
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None


@dataclass(frozen=True, eq=False)
class OpenData:
    """Both splits, not yet in the form a model takes.

    Attributes:
        name: Hub id, or the name of the file or folder.
        task: What the samples are for.
        info: What a model has to fit.
        train: Samples with labels from 0.
        test: As ``train``; the same texts where the test split is still to be held out of them
            (causal-lm).
        section: What was asked for.
        held_out: Share of train that is the test split; None where there is a test split, or it is
            already cut.
        seed: Draws subsets.
    """

    name: str
    task: Task
    info: DataInfo
    train: Rows
    test: Rows
    section: DataSection
    held_out: float | None
    seed: int

    def pick(self, num_samples: int, split: SplitName) -> list[int]:
        """Sorted positions of the samples of a split, after holding out and limiting.

        Raises:
            DataError: Too few samples to hold any out.
        """
        limit = self.section.num_train if split == "train" else self.section.num_test
        order = torch.randperm(
            num_samples, generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        if self.held_out is not None:
            num_test = max(1, round(self.held_out * num_samples))
            if num_test >= num_samples:
                raise DataError(
                    f"data: {self.name} has {num_samples} training samples; holding out "
                    f"{self.held_out:.0%} of them for the test leaves none. Give more data or "
                    "name a test split"
                )
            order = order[:num_test] if split == "test" else order[num_test:]
        return sorted(order[:limit])


def open_data(section: DataSection, task: Task, *, seed: int = 0) -> OpenData:
    """Opens train and test of a data set; limits and held-out shares are drawn with ``seed``.

    Raises:
        DataError: A missing file, column or split, an empty set, an unreadable image.
        HubError: The hub cannot be reached.
    """
    name, train, test = _find(section, task)
    for split, rows in (("train", train), ("test", test)):
        if rows is not None and not len(rows):
            raise DataError(f"data: the {split} split of {name} is empty; give one with samples")
    if test is None and section.test is not None:
        log.info(
            "%s has no splits; %.0f %% of it are held out for the test",
            name,
            100 * section.validation_share,
        )
    data = OpenData(
        name=name,
        task=task,
        info=DataInfo(image_size=section.image_size),
        train=train,
        test=train if test is None else test,
        section=section,
        held_out=section.validation_share if test is None else None,
        seed=seed,
    )
    return data if task == "causal-lm" else _classified(data)


def _classified(data: OpenData) -> OpenData:
    """Numbers for labels, then the subsets, then small images into memory."""
    names, train, test = code_labels(data.train, data.test, data.name)
    train = train.take(data.pick(len(train), "train"))
    test = test.take(data.pick(len(test), "test"))
    if isinstance(train, ImageRows) and isinstance(test, ImageRows):
        train, test = _in_memory(train, test)
    info = replace(data.info, num_labels=len(names), class_names=names)
    if isinstance(train, PixelRows):
        sample = train.pixels[:_STATISTICS_OF].double() / 255
        info = replace(
            info,
            image_shape=tuple(train.pixels.shape[1:]),
            mean=tuple(sample.mean((0, 2, 3)).tolist()),
            std=tuple(sample.std((0, 2, 3)).clamp(min=1e-3).tolist()),
        )
    return replace(data, info=info, train=train, test=test, held_out=None)


def _in_memory(train: ImageRows, test: ImageRows) -> tuple[Rows, Rows]:
    """Both splits in memory or none: both have to go the same way to the model."""
    small = train.in_memory()
    other = test.in_memory() if small is not None else None
    if small is None or other is None or small.pixels.shape[1:] != other.pixels.shape[1:]:
        return train, test
    return small, other


def _find(section: DataSection, task: Task) -> tuple[str, Any, Any]:
    """Name, train and test; test is None where it has to be held out of train."""
    if section.path is None and section.id == DIGITS:
        _need(task, "image-classification", DIGITS)
        for key, expected in (("train", ("train",)), ("test", ("test", None))):
            if getattr(section, key) not in expected:
                raise _no_split(section, key, DIGITS, "train and test")
        train, test = read_digits()
        return DIGITS, train, test if section.test is not None else None
    path = Path(section.path or section.id or "").expanduser()
    if path.exists():
        name = section.id if section.path and section.id else path.name
        return (name, *_local(path, section, task))
    if section.path is not None or looks_like_path(str(section.id)):
        raise DataError(
            f"data.path: {path} does not exist; the nearest folder that does is "
            f"{nearest_existing(path)}"
        )
    return (str(section.id), *_from_hub(section, task))


def _local(path: Path, section: DataSection, task: Task) -> tuple[Rows, Rows | None]:
    if path.is_file():
        if path.suffix not in TABLE_SUFFIXES:
            raise DataError(
                f"data.path: {path} ends in {path.suffix!r}; files of "
                f"{', '.join(sorted(TABLE_SUFFIXES))} "
                "can be read, and folders"
            )
        return _columns(read_table([path]), section, task, str(path)), None
    if is_idx_folder(path):
        _need(task, "image-classification", str(path))
        test = None if section.test is None else read_idx_split(path, section.test)
        return read_idx_split(path, section.train), test
    if task == "image-classification" and _has_images(path):
        return _split_folders(path, section)
    files = table_files(path)
    if not files:
        kinds = "images in one subfolder per class, or " if task == "image-classification" else ""
        raise DataError(
            f"data.path: {path} holds no data for {task}; expected {kinds}files of "
            f"{', '.join(sorted(TABLE_SUFFIXES))}"
        )
    train, test = (
        files_of_split(files, path, name or "") for name in (section.train, section.test)
    )
    if not train and not test:  # no splits by name: all of it is train
        return _columns(read_table(files), section, task, str(path)), None
    for key, found in (("train", train), ("test", test)):
        if not found and getattr(section, key) is not None:
            listed = ", ".join(str(file.relative_to(path)) for file in files[:8])
            raise _no_split(section, key, str(path), listed)
    read = partial(_columns, section=section, task=task, where=str(path))
    return read(read_table(train)), read(read_table(test)) if test else None


def _split_folders(path: Path, section: DataSection) -> tuple[Rows, Rows | None]:
    train = (path / section.train).is_dir()
    test = section.test is not None and (path / section.test).is_dir()
    if train and section.test is None:
        return image_folder(path / section.train), None
    if train != test:  # one of them is misspelt, or the folders are classes: not to be guessed
        listed = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise _no_split(section, "test" if train else "train", str(path), listed)
    if not train:
        return image_folder(path), None
    return image_folder(path / section.train), image_folder(path / str(section.test))


def _has_images(path: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.glob("*/**/*"))


def _from_hub(section: DataSection, task: Task) -> tuple[Rows, Rows | None]:
    from datasets import get_dataset_split_names, load_dataset

    name = str(section.id)
    where = {"path": name, "name": section.name, "revision": section.revision}
    found: list[Rows] = []
    with reaching_hub("data", name):
        for key in ("train", "test"):
            split = getattr(section, key)
            if split is None:
                continue
            try:
                table = load_dataset(**where, split=split)
            except (
                ValueError
            ) as error:  # no such split or configuration; the message lists those there are
                try:
                    listed = ", ".join(get_dataset_split_names(name, section.name))
                except ValueError:
                    raise DataError(f"data.name: {name} cannot be opened: {error}") from error
                raise _no_split(section, key, name, listed) from error
            found.append(_columns(table, section, task, name))
    return found[0], found[1] if len(found) > 1 else None


def _columns(table: "Dataset", section: DataSection, task: Task, where: str) -> Rows:
    """The columns that the task needs."""
    if not len(table):
        raise DataError(f"data: {where} has no rows; give a data set with samples")
    needed = {
        "image-classification": ("image", "label"),
        "text-classification": ("text", "label"),
        "causal-lm": ("text",),
    }[task]
    for key in needed:
        column = getattr(section, key)
        if column not in table.column_names:
            raise DataError(
                f"data.{key}: {where} has no column {column!r}; it has "
                f"{shortened(', '.join(table.column_names), 300)}{_separator(table.column_names)}"
            )
    labels, names = _labels(table, section.label) if "label" in needed else (None, ())
    if labels is not None and task == "image-classification":
        images = _image_column(table, section.image)
        return ImageRows(range(len(table)), images, labels, f"in row {{}} of {where}", names)
    texts = table[section.text][:]
    odd = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if odd is not None and isinstance(texts[odd], bytes):
        raise DataError(f"data.text: row {odd} of {where} is not in UTF-8; save the file as UTF-8")
    if odd is not None:
        raise DataError(
            f"data.text: row {odd} of {where} has {shortened(repr(texts[odd]))} in column "
            f"{section.text!r}, expected text"
        )
    return TextRows(texts, labels, names)


def _separator(columns: Sequence[str]) -> str:
    """What to do where a table was read as one column."""
    if len(columns) == 1 and ";" in columns[0]:
        return ". The file separates its columns with semicolons; write it with commas"
    if len(columns) == 1 and "\t" in columns[0]:
        return ". The file separates its columns with tabs; name it .tsv"
    return ""


def _labels(table: "Dataset", column: str) -> tuple[list[Any], tuple[str, ...]]:
    from datasets import ClassLabel

    feature = table.features[column]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    return table[column][:], names


def _image_column(table: "Dataset", column: str) -> Callable[[int], Any]:
    from datasets import Image

    if not isinstance(table.features[column], Image):
        table = table.cast_column(column, Image())
    return partial(_cell, table.select_columns([column]), column)


def _cell(table: "Dataset", column: str, row: int) -> Any:
    return table[row][column]


def _need(task: Task, expected: Task, where: str) -> None:
    if task != expected:
        raise DataError(f"data: {where} is for {expected}, but model.task is {task}")


def _no_split(section: DataSection, key: str, where: str, listed: str) -> DataError:
    advice = ", or data.test: null to hold out a share of " + ("train" if key == "test" else "all")
    return DataError(
        f"data.{key}: {where} has no split {getattr(section, key)!r}; it has {listed}. "
        f"Write one of these{advice}"
    )
