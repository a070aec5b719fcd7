"""From an open data set to batches: splits, loaders, calibration."""

import logging
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, overload

import torch
from torch.utils.data import DataLoader

from sosp_hub.data.processing import Processing
from sosp_hub.data.rows import ImageRows, PixelRows
from sosp_hub.data.source import OpenData, SplitName
from sosp_hub.data.split import Split
from sosp_hub.errors import DataError
from sosp_hub.recipe.tasks import find_task

log = logging.getLogger(__name__)


def load_split(
    data: OpenData, split: SplitName, processor: Processing, *, augment: bool = False
) -> Split:
    """One split in the form the model takes; ``augment`` shifts and flips images at random.

    Raises:
        DataError: Samples of another kind than the model takes, or texts too short for one window.
    """
    return find_task(data.task).split(data, split, processor, augment=augment)


def wrong_kind(data: OpenData) -> DataError:
    """Samples that the model does not take."""
    kind = "images" if isinstance(data.train, PixelRows | ImageRows) else "text"
    return DataError(f"data: {data.name} holds {kind}, which the model does not take")


def make_loader(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """A DataLoader of finished batches, which ``Accelerator.prepare`` takes as it is."""
    return DataLoader(
        split,
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_finished,
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


class Batches(Sequence[Any]):
    """Batches of fixed samples, made each time they are asked for, so that they take no memory."""

    def __init__(self, chosen: Sequence[tuple[Split, Sequence[int]]]) -> None:
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> "Batches": ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Batches(self._chosen[index])
        split, samples = self._chosen[index]
        return split.__getitems__(samples)


def calibration_batches(
    splits: Split | Sequence[Split],
    num_samples: int,
    batch_size: int,
    *,
    start: int = 0,
    seed: int = 0,
    rank: int = 0,
    num_processes: int = 1,
) -> Batches:
    """Batches of a seeded subset of train splits (loaded without ``augment``), of all in turn.

    Each split gives equally many samples, and each batch holds samples of one.

    With several processes each gets its share of the same batches, none repeated, so that what is
    computed batch by batch (statistics of norms, squares of a batch's gradient) does not depend on
    how many there are; shares may differ by one batch. ``start`` leaves out so many samples at the
    subset's front.
    """
    splits = [splits] if isinstance(splits, Split) else splits
    most = most_calibration(splits)
    if num_samples > most:
        log.info("calibration: %d samples asked for, there are %d", num_samples, most)
    places = range(start, min(num_samples, most))
    shares = []
    for number, split in enumerate(splits):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).tolist()
        mine = [order[at // len(splits)] for at in places if at % len(splits) == number]
        parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        shares.append([(split, part) for part in parts])
    turns = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
    return Batches(turns[rank::num_processes])


def most_calibration(splits: Sequence[Split]) -> int:
    """Samples that splits can give in equal parts."""
    return len(splits) * min(len(split) for split in splits)


def _finished(batch: Any) -> Any:
    return batch
