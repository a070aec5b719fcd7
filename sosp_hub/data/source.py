"""Opens a data set, wherever it lives: what it holds is known before any model is."""

from dataclasses import dataclass
from typing import Any

from sosp_hub.recipe.schema import DataSection
from sosp_hub.types import Task


@dataclass(frozen=True)
class DataInfo:
    """What a model has to fit.

    Attributes:
        num_labels: Classes; None for causal-lm.
        class_names: Their names, in the order of the label numbers.
        image_shape: Channels, height and width where all images share one small size, else None.
        mean: Per channel of the train images, on a scale of 0 to 1; None where they are not in memory.
        std: As ``mean``.
        image_size: Pixels that the recipe asks for.
    """

    num_labels: int | None = None
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class OpenData:
    """Both splits, not yet in the form a model takes."""

    name: str
    task: Task
    info: DataInfo
    train: Any
    test: Any
    max_length: int


def open_data(section: DataSection, task: Task, *, seed: int = 0) -> OpenData:
    """Opens train and test of a data set; limits and held-out shares are drawn with ``seed``.

    Raises:
        DataError: A missing file, column or split, an empty set, an unreadable image.
        HubError: The hub cannot be reached.
    """
    raise NotImplementedError
