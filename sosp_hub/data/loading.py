"""Splits as batches: `load_split` gives a data set, `make_loader` batches it, `calibration_batches` draws from train."""

from collections.abc import Sequence
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from sosp_hub.data.processing import Processing
from sosp_hub.data.source import OpenData


class Split(Dataset[Any]):
    """One split in the form a model takes. Indexed by a list it gives one finished batch.

    A DataLoader fetches whole batches through ``__getitems__``, so that ``collate_fn`` has nothing left to do; small
    images are one uint8 tensor and need no worker processes. Use `make_loader`.

    Attributes:
        num_labels: Classes; None for causal-lm.
        class_names: Their names.
    """

    num_labels: int | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Any:  # noqa: ANN401 - (inputs, labels) or a dict
        """The batch of these samples: ``(images, labels)``, or a dict as a transformers model takes it."""
        raise NotImplementedError


def load_split(
    data: OpenData, split: Literal["train", "test"], processor: Processing, *, augment: bool = False
) -> Split:
    """One split, tokenised or ready to be normalised; ``augment`` shifts and flips images at random (torch's RNG).

    Raises:
        DataError: Labels outside the head, or a text split too short for one window.
    """
    raise NotImplementedError


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
    raise NotImplementedError


def calibration_batches(
    train: Split, num_samples: int, batch_size: int, *, seed: int = 0, rank: int = 0, num_processes: int = 1
) -> list[Any]:
    """Batches of a seeded subset of ``train`` (give it without ``augment``), the last one smaller where needed.

    With several processes each gets its share of the same subset, none repeated; shares may differ by one sample.
    """
    raise NotImplementedError
