"""What every split is to those who batch it."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset


class Split(Dataset[Any]):
    """One split in the form a model takes. Asked for a list of indices it gives one finished batch.

    A DataLoader fetches whole batches through ``__getitems__``, so that ``collate_fn`` has nothing
    left to do; small images are one uint8 tensor and need no worker processes. Use `make_loader`.

    Attributes:
        num_labels: Classes; None where labels fix none.
        class_names: Their names.
    """

    num_labels: int | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The batch of these samples: ``(images, labels)``, or a dict for transformers."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        """A batch of one sample."""
        return self.__getitems__([index])


class Part(Split):
    """Some samples of a split, in the given order."""

    def __init__(self, split: Split, indices: Sequence[int]) -> None:
        self.split, self.indices = split, indices
        self.num_labels, self.class_names = split.num_labels, split.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """The batch of these samples."""
        return self.split.__getitems__([self.indices[i] for i in indices])
