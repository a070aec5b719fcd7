"""Image sets that are arrays already: idx files (the MNIST family), scikit-learn's digits."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sosp_hub.data.rows import PixelRows
from sosp_hub.errors import DataError

_STEMS = {"test": "t10k"}  # the family's own name for it
_UINT8 = 8  # third byte of an idx file
_DIGITS_TEST_SHARE = 0.2


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds images in idx files, compressed or not."""
    return any(folder.glob("*-images-idx3-ubyte*"))


def read_idx_split(folder: Path, split: str) -> PixelRows:
    """Images and labels of one split: ``train``, ``test``, or the start of the file names.

    Raises:
        DataError: A file that is missing or damaged, or as many images as labels do not exist.
    """
    stem = _STEMS.get(split, split)
    pixels = _read_idx(_find(folder, stem, "images-idx3-ubyte"), num_dims=3)
    labels = _read_idx(_find(folder, stem, "labels-idx1-ubyte"), num_dims=1)
    if len(pixels) != len(labels):
        raise DataError(
            f"data.path: {folder} has {len(pixels)} images but {len(labels)} labels for {split!r}; "
            "give the pair of files that belong together"
        )
    return PixelRows(pixels.unsqueeze(1), labels.tolist())


def read_digits() -> tuple[PixelRows, PixelRows]:
    """scikit-learn's 1,797 digits of 8x8 pixels, always split into the same train and test."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    rows = PixelRows(pixels, bunch.target.tolist())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    num_test = int(_DIGITS_TEST_SHARE * len(rows))
    return rows.take(sorted(order[num_test:])), rows.take(sorted(order[:num_test]))


def _find(folder: Path, stem: str, ending: str) -> Path:
    for suffix in ("", ".gz"):
        file = folder / f"{stem}-{ending}{suffix}"
        if file.is_file():
            return file
    present = sorted(path.name for path in folder.glob("*ubyte*"))
    raise DataError(
        f"data.path: {folder} has no {stem}-{ending}[.gz]; its idx files are {', '.join(present)}"
    )


def _read_idx(file: Path, num_dims: int) -> Tensor:
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.path: cannot read {file} ({error}); fetch the file again") from error
    header = 4 + 4 * num_dims
    if len(raw) < header or raw[:4] != bytes([0, 0, _UINT8, num_dims]):
        raise DataError(
            f"data.path: {file} starts with the bytes {raw[:4].hex(' ')}, expected "
            f"00 00 08 {num_dims:02x} (an idx file of bytes in {num_dims} dimensions)"
        )
    shape = np.frombuffer(raw, ">u4", count=num_dims, offset=4).astype(int).tolist()
    values = np.frombuffer(raw, np.uint8, offset=header)
    if values.size != np.prod(shape):
        raise DataError(
            f"data.path: {file} holds {values.size} values, its header says {shape}; fetch it again"
        )
    return torch.from_numpy(values.reshape(shape).copy())
