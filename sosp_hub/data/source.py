"""Opens a data set, wherever it lives: what it holds is known before any model is."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sosp_hub.data.columns import check_columns
from sosp_hub.data.idx import is_idx_folder, read_digits, read_idx_split
from sosp_hub.data.labels import (
    Problem,
    code_labels,
    listed_classes,
    number_values,
    several_classes,
)
from sosp_hub.data.reach import looks_like_path, nearest_existing, reaching_hub
from sosp_hub.data.rows import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    ImageRows,
    PixelRows,
    Rows,
    TableRows,
    files_of_classes,
    image_folder,
)
from sosp_hub.data.tables import (
    files_of_split,
    has_metadata,
    is_saved_dataset,
    read_saved,
    read_table,
    table_files,
)
from sosp_hub.errors import DataError
from sosp_hub.recipe.schema import DataSection
from sosp_hub.recipe.tasks import Inputs, Task, find_task, tasks
from sosp_hub.types import TABLE_SUFFIXES

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

DIGITS = "sklearn/digits"
SplitName = Literal["train", "test"]
_STATISTICS_OF = 10_000  # images; enough for a mean
_SHUFFLED = 1000  # streamed rows that are shuffled with each other, our choice


@dataclass(frozen=True)
class DataInfo:
    """What a model has to fit.

    Attributes:
        num_labels: Outputs of the head; None where labels fix none.
        class_names: Their names, in the order of the label numbers.
        image_shape: Channels, height and width where all images share one small size, else None.
        mean: Per channel of the train images, on a scale of 0 to 1; None where they are not in
            memory.
        std: As ``mean``.
        image_size: Pixels that the recipe asks for.
        problem: What a label is: one class, a list of classes, or a number.
        inputs: What a sample is, where the task does not say; None = as the task says.
        first_size: Height and width of the first image, of tasks whose images may have any.
    """

    num_labels: int | None = None
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    problem: Problem = "single_label"
    inputs: Inputs | None = None
    first_size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class OpenData:
    """Both splits, not yet in the form a model takes.

    Attributes:
        name: Hub id, or the name of the file or folder.
        task: What the samples are for.
        info: What a model has to fit.
        train: Samples with labels from 0.
        test: As ``train``; the same texts where the test split is still to be held out of them
            (language models).
        section: What was asked for.
        held_out: Share of train that is the test split; None where there is a test split, or it is
            already cut.
        seed: Draws subsets.
    """

    name: str
    task: str
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


def open_data(section: DataSection, task: str, *, seed: int = 0) -> OpenData:
    """Opens train and test of a data set; limits and held-out shares are drawn with ``seed``.

    Raises:
        DataError: A missing file, column or split, an empty set, an unreadable image.
        HubError: The hub cannot be reached.
    """
    kind = find_task(task)
    name, train, test = _find(section, kind)
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
        task=kind.name,
        info=DataInfo(image_size=section.image_size),
        train=train,
        test=train if test is None else test,
        section=section,
        held_out=section.validation_share if test is None else None,
        seed=seed,
    )
    return kind.prepare(data)


def classified(data: OpenData) -> OpenData:
    """Numbers for labels, then the subsets, then small images into memory."""
    names, train, test = code_labels(data.train, data.test, data.name)
    info = replace(data.info, num_labels=len(names), class_names=names)
    return in_memory(replace(data, info=info, train=train, test=test))


def with_listed_classes(data: OpenData, column: str, key: str, *, least: int = 2) -> OpenData:
    """Numbers for the names in a column of lists.

    Args:
        data: With rows of a table.
        column: Of these rows.
        key: Of ``data`` in a recipe, for errors.
        least: Classes that there must be.
    """
    train, test = data.train, data.test
    assert isinstance(train, TableRows) and isinstance(test, TableRows)  # noqa: PT018
    known = train.columns[column], train.class_names
    names, numbers = listed_classes(*known, data.name, key, least=least)

    def coded(rows: TableRows) -> TableRows:
        columns = {**rows.columns, column: numbers(rows.columns[column])}
        return replace(rows, columns=columns, class_names=names)

    first = coded(train)
    info = replace(data.info, num_labels=len(names), class_names=names)
    return replace(data, info=info, train=first, test=first if test is train else coded(test))


def in_memory(data: OpenData) -> OpenData:
    """The subsets, with images in memory where they are small, and then their statistics."""
    data = picked(data)
    train, test, info = data.train, data.test, data.info
    if isinstance(train, ImageRows) and isinstance(test, ImageRows):
        train, test = _in_memory(train, test)
    if isinstance(train, PixelRows):
        sample = train.pixels[:_STATISTICS_OF].double() / 255
        info = replace(
            info,
            image_shape=tuple(train.pixels.shape[1:]),
            mean=tuple(sample.mean((0, 2, 3)).tolist()),
            std=tuple(sample.std((0, 2, 3)).clamp(min=1e-3).tolist()),
        )
    return replace(data, info=info, train=train, test=test)


def with_several(data: OpenData) -> OpenData:
    """Lists of classes as a 0 or 1 for each class, then the subsets."""
    names, train, test = several_classes(data.train, data.test, data.name)
    info = replace(data.info, num_labels=len(names), class_names=names, problem="multi_label")
    return picked(replace(data, info=info, train=train, test=test))


def with_values(data: OpenData) -> OpenData:
    """A number for each sample, then the subsets."""
    train, test = number_values(data.train, data.test, data.name)
    info = replace(data.info, num_labels=1, class_names=("value",), problem="regression")
    return picked(replace(data, info=info, train=train, test=test))


def picked(data: OpenData) -> OpenData:
    """The subsets that the recipe asks for."""
    train = data.train.take(data.pick(len(data.train), "train"))
    test = data.test.take(data.pick(len(data.test), "test"))
    return replace(data, train=train, test=test, held_out=None)


def _in_memory(train: ImageRows, test: ImageRows) -> tuple[Rows, Rows]:
    """Both splits in memory or none: both have to go the same way to the model."""
    small = train.in_memory()
    other = test.in_memory() if small is not None else None
    if small is None or other is None or small.pixels.shape[1:] != other.pixels.shape[1:]:
        return train, test
    return small, other


def _find(section: DataSection, task: Task) -> tuple[str, Any, Any]:
    """Name, train and test; test is None where it has to be held out of train."""
    path = Path(section.path or section.id or "").expanduser()
    if section.num_streamed and (section.path or section.id == DIGITS or path.exists()):
        raise DataError(
            f"data.num_streamed: {path} is on this machine and read whole; leave the key out, and "
            "write num_train and num_test for a part of it"
        )
    if section.path is None and section.id == DIGITS:
        _need_pixels(task, DIGITS)
        for key, expected in (("train", ("train",)), ("test", ("test", None))):
            if getattr(section, key) not in expected:
                raise _no_split(section, key, DIGITS, "train and test")
        train, test = read_digits()
        return DIGITS, train, test if section.test is not None else None
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
    if is_saved_dataset(path):
        return _saved(path, section, task)
    if is_idx_folder(path):
        _need_pixels(task, str(path))
        test = None if section.test is None else read_idx_split(path, section.test)
        return read_idx_split(path, section.train), test
    if not has_metadata(path):
        loose = not _classed(task) and all(file.suffix == ".md" for file in table_files(path))
        if task.pixels and _holds(path, IMAGE_SUFFIXES, loose=loose):
            return _split_folders(path, section, partial(image_folder, loose=loose))
        if {"audio", "label"} <= {*task.columns} and _holds(path, AUDIO_SUFFIXES):
            return _split_folders(path, section, partial(_sounds, section=section, task=task))
    files = table_files(path)
    if not files:
        raise DataError(
            f"data.path: {path} holds no data for {task.name}; expected {_files_of(task)}"
        )
    train, test = (
        files_of_split(files, path, name or "") for name in (section.train, section.test)
    )
    if not train and not test:  # no splits by name: all of it is train
        return _columns(read_table(files), section, task, str(path)), None
    for key, rows in (("train", train), ("test", test)):
        if not rows and getattr(section, key) is not None:
            listed = ", ".join(str(file.relative_to(path)) for file in files[:8])
            raise _no_split(section, key, str(path), listed)
    read = partial(_columns, section=section, task=task, where=str(path))
    return read(read_table(train)), read(read_table(test)) if test else None


def _saved(path: Path, section: DataSection, task: Task) -> tuple[Rows, Rows | None]:
    """What ``save_to_disk`` of `datasets` left: one table, or one for each split."""
    tables = read_saved(path)
    if not isinstance(tables, dict):
        return _columns(tables, section, task, str(path)), None
    splits: list[Rows] = []
    for key in ("train", "test"):
        split = getattr(section, key)
        if split is None:
            continue
        if split not in tables:
            raise _no_split(section, key, str(path), ", ".join(map(str, tables)))
        splits.append(_columns(tables[split], section, task, str(path)))
    return splits[0], splits[1] if len(splits) > 1 else None


def _classed(task: Task) -> bool:
    """Whether the name of a folder says what is in it."""
    return "label" in task.columns


def _files_of(task: Task) -> str:
    """What a folder may hold for a task."""
    tables = f"files of {', '.join(sorted(TABLE_SUFFIXES))}"
    keys = (*task.columns, *task.more_columns)
    kind = next((key for key in ("image", "audio") if key in keys), None)
    others = [key for key in task.columns if key != kind]
    if kind is None or not others:
        return f"{kind} files, or {tables}" if kind else tables
    folders = " in one subfolder per class, or" if _classed(task) else ""
    columns = ", ".join(("file_name", *others))
    return f"{kind} files{folders} with a metadata.jsonl beside them ({columns}), or {tables}"


def _sounds(folder: Path, section: DataSection, task: Task) -> Rows:
    """Recordings in one subfolder per class."""
    from datasets import Dataset

    files, labels = files_of_classes(folder, AUDIO_SUFFIXES)
    table = Dataset.from_dict({section.audio: list(map(str, files)), section.label: labels})
    return _columns(table, section, task, str(folder))


def _split_folders(
    path: Path, section: DataSection, read: Callable[[Path], Rows]
) -> tuple[Rows, Rows | None]:
    train = (path / section.train).is_dir()
    test = section.test is not None and (path / section.test).is_dir()
    if train and section.test is None:
        return read(path / section.train), None
    if train != test:  # one of them is misspelt, or the folders are classes: not to be guessed
        listed = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise _no_split(section, "test" if train else "train", str(path), listed)
    if not train:
        return read(path), None
    return read(path / section.train), read(path / str(section.test))


def _holds(path: Path, suffixes: Collection[str], *, loose: bool = False) -> bool:
    return bool(files_of_classes(path, suffixes, loose=loose)[0])


def _from_hub(section: DataSection, task: Task) -> tuple[Rows, Rows | None]:
    from datasets import get_dataset_split_names, load_dataset

    name = str(section.id)
    where = {"path": name, "name": section.name, "revision": section.revision}
    splits: list[Rows] = []
    with reaching_hub("data", name):
        for key in ("train", "test"):
            split = getattr(section, key)
            if split is None:
                continue
            try:
                table = load_dataset(**where, split=split, streaming=bool(section.num_streamed))
            except ValueError as error:  # the message may list the splits that there are
                try:
                    known = get_dataset_split_names(name, section.name)
                except ValueError:
                    known = [split]
                if split in known:
                    raise DataError(f"data.name: {name} cannot be opened: {error}") from error
                raise _no_split(section, key, name, ", ".join(known)) from error
            if section.num_streamed:
                table = _first_rows(table, section.num_streamed)
            splits.append(_columns(table, section, task, name))
    return splits[0], splits[1] if len(splits) > 1 else None


def _first_rows(stream: "IterableDataset", num: int) -> "Dataset":
    """So many rows, in the same order each time; images and recordings as their bytes."""
    from datasets import Dataset

    undecoded = stream if stream.features is None else stream.decode(False)
    shuffled = undecoded.shuffle(seed=0, buffer_size=min(num, _SHUFFLED))
    return Dataset.from_list(list(shuffled.take(num)), features=stream.features)


def _columns(table: "Dataset", section: DataSection, task: Task, where: str) -> Rows:
    """The columns that the task needs; ``a.b`` names a part of a column."""
    named = (str(getattr(section, key)) for key in task.columns)
    if any("." in name and name not in table.column_names for name in named):
        table = table.flatten()
    check_columns(table, section, task.columns, where)
    return task.rows(table, section, where)


def _need_pixels(task: Task, where: str) -> None:
    if not task.pixels:
        able = " or ".join(name for name, other in tasks().items() if other.pixels)
        raise DataError(f"data: {where} is for {able}, but model.task is {task.name}")


def _no_split(section: DataSection, key: str, where: str, listed: str) -> DataError:
    advice = ", or data.test: null to hold out a share of " + ("train" if key == "test" else "all")
    return DataError(
        f"data.{key}: {where} has no split {getattr(section, key)!r}; it has {listed}. "
        f"Write one of these{advice}"
    )
