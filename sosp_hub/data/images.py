"""Image splits: small images from memory at tensor speed, larger ones opened one by one."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from sosp_hub.data.processing import ImageProcessing
from sosp_hub.data.rows import ImageRows, PixelRows
from sosp_hub.data.split import Split

Images = Float[Tensor, "batch channels height width"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grey
_SHIFT_SHARE = 8  # random shifts of up to 1/8 of the side: 4 pixels of 32, the literature's value


class PixelSplit(Split):
    """Small images, one uint8 tensor in memory; a batch is an index, a cast, a multiply-add."""

    def __init__(
        self,
        rows: PixelRows,
        processing: ImageProcessing,
        class_names: tuple[str, ...],
        augment: bool,
    ) -> None:
        self.class_names, self.num_labels = class_names, len(class_names)
        self._pixels, self._labels = rows.pixels, _coded(rows.labels, processing)
        self._processing, self._augment = processing, augment
        std = torch.tensor(processing.std).view(-1, 1, 1)
        self._scale = 1 / (255 * std)
        self._offset = -torch.tensor(processing.mean).view(-1, 1, 1) / std

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        pixels = self._pixels[chosen]
        if self._augment:
            pixels = shift_and_flip(pixels)
        images = _with_channels(pixels.float(), self._processing.shape[0])
        images = _resized(images, self._processing) * self._scale + self._offset
        return _batch(images, self._labels[chosen], self._processing)


class FileSplit(Split):
    """Images that are opened, transformed and stacked when asked for; worker processes help."""

    def __init__(
        self,
        rows: ImageRows,
        processing: ImageProcessing,
        class_names: tuple[str, ...],
        augment: bool,
    ) -> None:
        self.class_names, self.num_labels = class_names, len(class_names)
        self._rows, self._labels = rows, _coded(rows.labels, processing)
        self._processing, self._transform = processing, processing.transform(augment)
        self._mode = "L" if processing.shape[0] == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        images = torch.stack([self._transform(self._rows.open(i, self._mode)) for i in indices])
        return _batch(images, self._labels[torch.as_tensor(indices)], self._processing)


def shift_and_flip(
    pixels: UInt8[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch channels height width"]:
    """Each image shifted by up to 1/8 of its side (zeros move in), mirrored half of the time."""
    num, channels, height, width = pixels.shape
    pad_y, pad_x = height // _SHIFT_SHARE, width // _SHIFT_SHARE
    padded = F.pad(pixels, (pad_x, pad_x, pad_y, pad_y))
    rows = torch.arange(height) + torch.randint(2 * pad_y + 1, (num, 1))
    columns = torch.arange(width).expand(num, width)
    columns = torch.where(torch.rand(num, 1) < 0.5, columns.flip(1), columns)
    columns = columns + torch.randint(2 * pad_x + 1, (num, 1))
    sample = torch.arange(num).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(1, -1, 1, 1)
    return padded[sample, channel, rows.view(num, 1, height, 1), columns.view(num, 1, 1, width)]


def _with_channels(images: Images, num_channels: int) -> Images:
    if images.shape[1] == num_channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, num_channels, -1, -1)
    grey = (images * torch.tensor(_LUMA).view(-1, 1, 1)).sum(1, keepdim=True)
    return grey.expand(-1, num_channels, -1, -1)


def _resized(images: Images, processing: ImageProcessing) -> Images:
    size, mode = processing.shape[1:], processing.interpolation
    if tuple(images.shape[2:]) == size:
        return images
    smooth = {} if mode == "nearest" else {"align_corners": False, "antialias": True}
    return F.interpolate(images, size, mode=mode, **smooth).clamp(0, 255)


def _coded(labels: Sequence[Any], processing: ImageProcessing) -> Int64[Tensor, " samples"]:
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    return (
        numbers if processing.label_order is None else torch.tensor(processing.label_order)[numbers]
    )


def _batch(images: Images, labels: Int64[Tensor, " batch"], processing: ImageProcessing) -> Any:
    return (
        (images, labels) if processing.key is None else {processing.key: images, "labels": labels}
    )
