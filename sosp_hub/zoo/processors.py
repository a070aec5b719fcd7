"""How a transformers model wants its images or texts, from its config and its own processor."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL.Image import Transpose
from torchvision import transforms
from transformers import ViTImageProcessor

from sosp_hub.data.processing import ImageProcessing, TextProcessing, per_channel
from sosp_hub.data.source import DataInfo
from sosp_hub.recipe.schema import ModelSection

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_BILINEAR = 2
_INTERPOLATION = {0: "nearest", _BILINEAR: "bilinear", 3: "bicubic"}  # as PIL numbers them
_UNLIMITED = 10**9  # tokenizers without a limit say 10**30
_USUAL_SIZE = 224


def text_processing(
    config: Any, tokenizer: Any, order: tuple[int, ...] | None = None
) -> TextProcessing:
    """The tokenizer, if there is one, and how many tokens both it and the model take."""
    limits = [
        getattr(tokenizer, "model_max_length", None),
        getattr(config.get_text_config(), "max_position_embeddings", None),
    ]
    most = min((int(limit) for limit in limits if limit), default=_UNLIMITED)
    return TextProcessing(tokenizer, most if most < _UNLIMITED else None, order)


def image_processing(
    section: ModelSection,
    config: Any,
    own: Any,
    data: DataInfo | None,
    order: tuple[int, ...] | None = None,
    model: Any = None,
) -> ImageProcessing:
    """Size and normalisation: the recipe's, else the model's, else those of the data.

    A trained model's size is the one that its image processor makes, if the model takes it: that of
    a config may be the one that its positions were trained with (DINOv2: 518, used at 224).

    Args:
        section: Weights that start at random are normalised with the data's statistics.
        config: Of the model.
        own: The image processor that came with it; None where it has none.
        data: What is known about the images.
        order: Outputs of the data's classes.
        model: Tries a size that its config does not state; None = take the config's.
    """
    channels = getattr(config, "num_channels", 3)
    asked = data.image_size if data else None
    small = data.image_shape[1:] if data and data.image_shape else None
    stated, made = getattr(config, "image_size", None), _size(own)
    if stated and made and section.pretrained and made != _pair(stated):
        stated = made if _takes(model, (channels, *made)) else stated
    height, width = _pair(asked or stated or made or small or _USUAL_SIZE)
    mean, std = (0.5,), (0.5,)
    if own is not None:
        mean, std = (own.image_mean, own.image_std) if own.do_normalize else ((0.0,), (1.0,))
    if not section.pretrained and data and data.mean and data.std:
        mean, std = data.mean, data.std
    mean, std = per_channel(mean, channels), per_channel(std, channels)
    return ImageProcessing(
        shape=(channels, height, width),
        mean=mean,
        std=std,
        interpolation=_INTERPOLATION.get(getattr(own, "resample", 2), "bilinear"),
        key="pixel_values",
        transform=partial(_transform, own, (height, width), mean, std),
        label_order=order,
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _takes(model: Any, shape: tuple[int, ...]) -> bool:
    """Whether a model runs on an image of this size."""
    if model is None:
        return False
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model.eval()(pixel_values=torch.zeros(1, *shape, device=weight.device).to(weight.dtype))
        except Exception:  # noqa: BLE001 - whatever a model says of an image that it does not take
            return False
    return True


def as_trained(own: Any, processing: ImageProcessing) -> Any:
    """An image processor that does to images what the run does, to be saved beside the weights.

    Args:
        own: The one that came with the model; None where it has none.
        processing: Size and normalisation of the run.
    """
    height, width = processing.shape[1:]
    stated: dict[str, Any] = {
        "image_mean": list(processing.mean),
        "image_std": list(processing.std),
    }
    if own is None:
        return ViTImageProcessor(
            size={"height": height, "width": width}, resample=_BILINEAR, **stated
        )
    changes: dict[str, Any] = {}
    if _size(own) != (height, width):
        changes |= {"size": {"height": height, "width": width}, "do_center_crop": False}
    if own.do_normalize or processing.std != (1.0,) * len(processing.std):
        normal = (tuple(own.image_mean), tuple(own.image_std)) if own.do_normalize else None
        if normal != (processing.mean, processing.std):
            changes |= {"do_normalize": True, **stated}
    return type(own).from_dict({**own.to_dict(), **changes}) if changes else own


@dataclass(frozen=True)
class _Own:
    """The image processor that came with the model, after a mirror where training asks for one."""

    processor: Any
    mirrored: bool

    def __call__(self, image: "Image") -> "Tensor":
        if self.mirrored and torch.rand(()) < 0.5:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _transform(
    own: Any,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: bool,
) -> Callable[["Image"], "Tensor"]:
    """The model's own processor where it makes this size, else a plain change of size."""
    if own is not None and _size(own) == size and len(mean) == len(own.image_mean):
        return _Own(own, augment)
    steps = [transforms.RandomHorizontalFlip()] if augment else []
    steps += [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)


def _size(own: Any) -> tuple[int, int] | None:
    """Height and width of what the image processor gives."""
    crop = getattr(own, "crop_size", None) if getattr(own, "do_center_crop", False) else None
    size = crop or getattr(own, "size", None)
    if not size:
        return None
    get = cast("Any", size.get if hasattr(size, "get") else partial(getattr, size))
    side = get("shortest_edge", None)
    return (get("height", None) or side, get("width", None) or side)
