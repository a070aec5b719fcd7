"""How a model wants its inputs: what the zoo says and the data room obeys."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class ImageProcessing:
    """How pixels become a batch.

    Attributes:
        shape: Channels, height and width of one input.
        mean: Per channel, on a scale of 0 to 1.
        std: Per channel, on a scale of 0 to 1.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``, for a change of size.
        key: Name under which a transformers model takes the images; None for ``(images, labels)``.
        transform: Given whether it is for training with augmentation, the map from an opened image
            to its input tensor. Used for images that do not all have one small size.
        label_order: Head output of each class of the data, where the model knows the same classes
            by name in another order; None = as they come.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    key: str | None
    transform: Callable[[bool], Callable[["Image"], "Tensor"]]
    label_order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TextProcessing:
    """How text becomes a batch.

    Attributes:
        tokenizer: A transformers tokenizer; None where the model has no weights either.
        max_positions: Tokens that the model can take at most; None = no limit known.
        label_order: As in `ImageProcessing`.
    """

    tokenizer: Any
    max_positions: int | None = None
    label_order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class OwnProcessing:
    """A model's own processor, which a task calls itself.

    Attributes:
        own: Of transformers: for images, audio, or several kinds at once; None where the model
            needs none.
        config: Of the model.
        label_order: As in `ImageProcessing`.
        image_size: Height and width of images as they are opened, of which examples are made.
    """

    own: Any
    config: Any
    label_order: tuple[int, ...] | None = None
    image_size: tuple[int, int] = (480, 640)


Processing = ImageProcessing | TextProcessing | OwnProcessing


def per_channel(values: Iterable[float], num_channels: int) -> tuple[float, ...]:
    """Statistics of another number of channels: their mean, for each channel."""
    values = tuple(values)
    return values if len(values) == num_channels else (sum(values) / len(values),) * num_channels
