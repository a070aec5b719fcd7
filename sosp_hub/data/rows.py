"""Samples as they come from their source, before any model has a say."""

import struct
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from sosp_hub.errors import DataError

Label = int | str
SMALL_SIDE = 64  # pixels; such images are kept in memory as one tensor, our choice
_SMALL_BYTES = 4 * 2**30


@dataclass(frozen=True, eq=False)
class PixelRows:
    """Images of one small size, in memory.

    Attributes:
        pixels: 0 to 255.
        labels: As the source writes them, or numbers from 0 once they are coded.
        class_names: Where the source lists them; the labels are then positions in this list.
    """

    pixels: UInt8[Tensor, "samples channels height width"]
    labels: Sequence[Label]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Sequence[int]) -> Self:
        """These samples, in this order."""
        pixels = self.pixels[torch.as_tensor(indices, dtype=torch.int64)]
        return replace(self, pixels=pixels, labels=[self.labels[i] for i in indices])


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Images that are opened when they are needed.

    Attributes:
        sources: A path, or the position in a table, of each image.
        fetch: Gives what ``Image.open`` takes, or an opened image, for a source.
        labels: As in `PixelRows`.
        where: How to name a source in an error, with a place for it.
        class_names: As in `PixelRows`.
    """

    sources: Sequence[Any]
    fetch: Callable[[Any], Any]
    labels: Sequence[Label]
    where: str = "{}"
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, indices: Sequence[int]) -> Self:
        """These samples, in this order."""
        sources, labels = [self.sources[i] for i in indices], [self.labels[i] for i in indices]
        return replace(self, sources=sources, labels=labels)

    def open(self, index: int, mode: str | None = None) -> Image.Image:
        """One decoded image, as ``L`` or ``RGB``; ``mode`` None keeps grey images grey.

        Raises:
            DataError: A file that is no image, or a damaged one.
        """
        source = self.sources[index]
        try:
            image = self.fetch(source)
            if isinstance(image, dict):  # how a parquet file stores an image
                image = BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
            if isinstance(image, Image.Image):
                return _converted(image, mode)
            with Image.open(image) as opened:
                return _converted(opened, mode)
        except _UNREADABLE as error:
            raise DataError(
                f"data: cannot read the image {self.where.format(source)} ({error}); repair or "
                "remove it"
            ) from error

    def levels(self, index: int, key: str) -> np.ndarray:
        """The numbers of an image of one channel as they are stored: classes, or distances.

        Args:
            index: Of the sample.
            key: Of the recipe's section ``data``, for the message.

        Raises:
            DataError: A file that is no image, or one of colours.
        """
        source = self.sources[index]
        try:
            image = self.fetch(source)
            if isinstance(image, dict):
                image = BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
            opened = image if isinstance(image, Image.Image) else Image.open(image)
            if len(opened.getbands()) != 1:
                raise ValueError(f"it has colours (mode {opened.mode}), and no number a pixel")
            return np.array(opened)
        except _UNREADABLE as error:
            raise DataError(
                f"{key}: cannot read the map {self.where.format(source)} ({error}); write it as an "
                "image of one channel (modes L, P, I, I;16 or F)"
            ) from error

    def in_memory(self) -> PixelRows | None:
        """The same images as one tensor where all have one small size, else None."""
        first = self.open(0)
        if (
            max(first.size) > SMALL_SIDE
            or 3 * first.width * first.height * len(self) > _SMALL_BYTES
        ):
            return None
        opened = (self.open(i) for i in range(len(self)))
        tensors = []
        for image in opened:
            if image.size != first.size:
                return None
            tensors.append(_pixels(image))
        num_channels = max(tensor.shape[0] for tensor in tensors)
        pixels = torch.stack([tensor.expand(num_channels, -1, -1) for tensor in tensors])
        return PixelRows(pixels, self.labels, self.class_names)


_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(EOFError, struct.error, zlib.error, Image.DecompressionBombError),
)
_LARGEST_16_BIT = 65_535


def _converted(image: Image.Image, mode: str | None) -> Image.Image:
    return _of_8_bits(image).convert(mode or ("L" if _is_grey(image) else "RGB"))


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L") or image.mode.startswith("I;16")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Deeper images, which Pillow would cut at 255: those of 16 bits scaled, others refused."""
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(
            ((levels * 255 + _LARGEST_16_BIT // 2) // _LARGEST_16_BIT).astype("u1")
        )
    if image.mode in ("F", "I"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}); write them with 8 or 16")
    return image


@dataclass(frozen=True, eq=False)
class TextRows:
    """Texts; without labels for a language model. ``pairs`` are second texts, where there are."""

    texts: Sequence[str]
    labels: Sequence[Label] | None = None
    class_names: tuple[str, ...] = ()
    pairs: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Self:
        """These samples, in this order."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return replace(self, texts=[self.texts[i] for i in indices], labels=labels, pairs=pairs)


@dataclass(frozen=True, eq=False)
class TableRows:
    """Columns of any values, by the key of a recipe's section ``data``.

    Attributes:
        columns: Of equal length; lists, or what has a length and a ``take`` of its own.
        where: The source, for messages.
        labels: None; classes are in the columns.
        class_names: Where the source lists them, or once they are known.
    """

    columns: Mapping[str, Any]
    where: str = ""
    labels: None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Sequence[int]) -> Self:
        """These samples, in this order."""
        columns = {
            key: values.take(indices) if hasattr(values, "take") else [values[i] for i in indices]
            for key, values in self.columns.items()
        }
        return replace(self, columns=columns)


Rows = PixelRows | ImageRows | TextRows | TableRows


def image_folder(folder: Path, *, loose: bool = False) -> ImageRows:
    """Images in one subfolder per class, whose name it is, however deep the files lie.

    Args:
        folder: Where they are.
        loose: They have no classes, and those in ``folder`` itself count too.
    """
    files, labels = files_of_classes(folder, IMAGE_SUFFIXES, loose=loose)
    return ImageRows(files, fetch=_itself, labels=labels)


def files_of_classes(
    folder: Path, suffixes: Collection[str], *, loose: bool = False
) -> tuple[list[Path], list[str]]:
    """Files in one subfolder per class, and their classes; ``loose``, all files without one."""
    files = sorted(
        path
        for path in folder.glob("**/*" if loose else "*/**/*")
        if path.suffix.lower() in suffixes and path.is_file()
    )
    return files, ["" if loose else path.relative_to(folder).parts[0] for path in files]


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif"}


def _itself(path: Path) -> Path:
    return path


def _pixels(image: Image.Image) -> UInt8[Tensor, "channels height width"]:
    num_channels = len(image.getbands())
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, num_channels).permute(2, 0, 1)
