"""What every split is to those who batch it."""

from collections.abc import Callable, Sequence
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


class MadeSplit(Split):
    """Batches that a function makes of the rows when they are asked for.

    Args:
        num: Samples.
        make: From their positions to a finished batch; worker processes call it too.
        class_names: Names of the labels.
    """

    def __init__(
        self,
        num: int,
        make: Callable[[Sequence[int]], Any],
        class_names: tuple[str, ...] = (),
    ) -> None:
        self._num, self._make = num, make
        self.class_names, self.num_labels = class_names, len(class_names) or None

    def __len__(self) -> int:
        return self._num

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._make(indices)


class InputsAlone(Split):
    """The inputs of a split: a dict without labels, or ``(inputs, inputs)``."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.num_labels, self.class_names = None, ()

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        batch = self.split.__getitems__(indices)
        if isinstance(batch, dict):
            return {name: value for name, value in batch.items() if name != "labels"}
        return batch[0], batch[0]
