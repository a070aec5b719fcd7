import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from sosp_hub.data.processing import ImageProcessing, TextProcessing
from sosp_hub.recipe.schema import DataSection


def section(**keys):
    return DataSection(**keys)


@pytest.fixture
def processing():
    """How a made-up model wants images; the transform stands for a model's own."""

    def make(shape=(1, 8, 8), mean=(0.5,), std=(0.25,), key=None, label_order=None):
        def transform(augment):
            return lambda image: torch.full(shape, float(np.asarray(image).mean()))

        return ImageProcessing(shape, mean, std, "bilinear", key, transform, label_order)

    return make


@pytest.fixture
def write_idx():
    def write(file, array, header=None):
        array = np.asarray(array, np.uint8)
        header = header or bytes([0, 0, 8, array.ndim])
        raw = header + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()
        file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)

    return write


@pytest.fixture
def idx_folder(tmp_path, write_idx):
    """Twelve train and five test images of 8x8, one file compressed and one not; 3 classes."""
    folder = tmp_path / "idx"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for stem, num in (("train", 12), ("t10k", 5)):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", chance.integers(0, 256, (num, 8, 8)))
        write_idx(folder / f"{stem}-labels-idx1-ubyte", np.arange(num) % 3)
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Writes images whose grey level tells class and number apart."""

    def write(root=tmp_path / "images", classes=("cat", "dog"), num=4, size=(10, 8), mode="RGB"):
        for level, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            for i in range(num):
                colour = 20 * level + i if mode == "L" else (20 * level + i, 0, 0)
                Image.new(mode, size, colour).save(root / name / f"{i}.png")
        return root

    return write


class Letters:
    """A tokenizer with one token per letter; with ``bos`` it starts each text with 1. 0 pads."""

    pad_token_id, pad_token_type_id, padding_side = 0, 0, "right"
    model_input_names = ("input_ids", "attention_mask")
    model_max_length = 10**30

    def __init__(self, bos=False):
        self.bos_token_id = 1 if bos else None

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None, **_):
        if isinstance(texts, str):
            return {"input_ids": self._one(texts, add_special_tokens)}
        ids = [self._one(text, add_special_tokens)[:max_length] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def _one(self, text, special):
        start = [1] if special and self.bos_token_id else []
        return start + [ord(letter) for letter in text]


@pytest.fixture
def letters():
    def make(bos=False, max_positions=None, label_order=None, side="right"):
        tokenizer = Letters(bos)
        tokenizer.padding_side = side
        return TextProcessing(tokenizer, max_positions, label_order)

    return make
