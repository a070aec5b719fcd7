"""Data as people have it: refused with the row and what to do, or read right; never wrong."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.errors import DataError
from sosp_hub.recipe.schema import DataSection

TEXT, CAUSAL, IMAGES = "text-classification", "causal-lm", "image-classification"


def opened(path, task=TEXT):
    return open_data(DataSection(path=str(path), test=None), task)


def table(rows, head="text,label"):
    return "\n".join([head, *(rows * 20)]) + "\n"


BAD_TABLES = {
    "one class": (".csv", table(["x,a", "y,a"]), ["only the class a"]),
    "one class by number": (".csv", table(["x,5", "y,5"]), ["only the class 5"]),
    "one huge label": (".csv", table(["x,0", "y,3000000"]), ["3000000", "2 classes"]),
    "no label": (".csv", table(["x,", "y,a", "z,b"]), ["data.label", "row 0", "no label"]),
    "no label among numbers": (".csv", table(["x,1", "y,", "z,0"]), ["row 1", "no label"]),
    "empty texts": (".csv", table(['"",a', '"",b']), ["data.text", "row 0"]),
    "empty": (".csv", "", ["empty"]),
    "only a head": (".csv", "text,label\n", ["no rows"]),
    "semicolons": (".csv", table(["x;a", "y;b"], "text;label"), ["text;label", "commas"]),
    "tabs": (".csv", table(["x\ta", "y\tb"], "text\tlabel"), [".tsv"]),
    "a column twice": (".csv", table(["x,y,a", "z,w,b"], "text,text,label"), ["'text'", "twice"]),
    "labels twice": (".csv", table(["x,a,b", "z,b,a"], "text,label,label"), ["'label'", "twice"]),
    "another encoding": (".csv", table(["caf\xe9,a", "y,b"]).encode("latin1"), ["UTF-8"]),
    "too many cells": (".csv", table(["x,a,c", "y,b"]), ["Expected 2 columns"]),
    "an empty parquet": (".parquet", b"", ["empty"]),
    "no parquet": (".parquet", b"PAR1" + bytes(60) + b"PAR1", ["cannot read"]),
    "a key twice": (".jsonl", '{"text": "a", "text": "b"}\n' * 9, ["'text'", "twice"]),
    "deep": (".json", "[" * 100_000, ["nested"]),
    "texts and numbers": (
        ".jsonl", '{"text": "a"}\n{"text": 5}\n', ["'text' has 'a' in row 0 and 5 in row 1"],
    ),
    "two bytes for each letter": (".csv", table(["x,a", "y,b"]).encode("utf-16"), ["UTF-16"]),
    "two bytes, objects": (".jsonl", '{"text": "a"}\n'.encode("utf-16"), ["in UTF-16"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_refused_with_what_is_wrong(tmp_path, name):
    suffix, text, words = BAD_TABLES[name]
    path = tmp_path / f"data{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        opened(path)
    for word in words:
        assert word in str(caught.value)


def test_a_key_that_the_first_row_lacks_is_a_column(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "a"}, *ROWS]))
    with pytest.raises(DataError, match=r"row 0 of .* has no label"):
        opened(path)


ROWS = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(10)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    texts = {
        ".csv": "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".txt": "some words",
    }
    for folder, start in ((plain, ""), (marked, "\ufeff")):
        folder.mkdir()
        (folder / f"data{suffix}").write_text(start + texts[suffix], encoding="utf-8")
    task = CAUSAL if suffix == ".txt" else TEXT
    one, other = (opened(folder, task).train for folder in (plain, marked))
    assert list(one.texts) == list(other.texts)


@pytest.mark.parametrize("special", [False, True])
def test_texts_without_a_token_are_refused_or_padded(tmp_path, letters, special):
    rows = [*ROWS, {"text": "", "label": "a"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    data = opened(path)
    processing = letters(special)
    if special:
        split = load_split(data, "train", processing)
        assert split.__getitems__(range(len(split)))["input_ids"].shape[0] == len(split)
        return
    with pytest.raises(DataError, match="no token"):
        load_split(data, "train", processing)


def test_texts_longer_than_the_context_are_cut(tmp_path, letters):
    rows = [{"text": "abc" * 5000, "label": "ab"[i % 2]} for i in range(10)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = load_split(opened(path), "train", letters(True, max_positions=12))
    assert split.__getitems__(range(4))["input_ids"].shape == (4, 12)


def test_numbers_of_classes_that_no_sample_has_are_told(tmp_path, caplog):
    """Labels 3 and 7 make eight classes, six of them of nothing."""
    path = tmp_path / "data.csv"
    path.write_text(table(["x,3", "y,7"]))
    assert opened(path).info.num_labels == 8
    assert "8 classes, and no sample of 0, 1, 2, 4, 5, ..." in caplog.text
    caplog.clear()
    path.write_text(table(["x,0", "y,1"]))
    assert opened(path).info.num_labels == 2
    assert not caplog.text


# ------------------------------------------------------------------- what datasets left on disk
def saved(folder, **splits):
    from datasets import Dataset, DatasetDict

    tables = {name: Dataset.from_list(rows) for name, rows in splits.items()}
    (tables["all"] if list(tables) == ["all"] else DatasetDict(tables)).save_to_disk(folder)
    return folder


def test_what_save_to_disk_wrote_is_read(tmp_path):
    """Its json files were taken for rows."""
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 5
    both = open_data(
        DataSection(path=str(saved(tmp_path / "two", train=rows, test=rows[:2]))), TEXT
    )
    assert (len(both.train), len(both.test), both.info.class_names) == (10, 2, ("x", "y"))
    one = open_data(DataSection(path=str(saved(tmp_path / "one", all=rows))), TEXT)
    assert len(one.train) + len(one.test) == 10
    with pytest.raises(DataError, match="no split 'test'; it has train, valid"):
        open_data(DataSection(path=str(saved(tmp_path / "odd", train=rows, valid=rows))), TEXT)
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="save_to_disk wrote"):
        opened(tmp_path / "one")


def test_another_programs_state_beside_rows_is_no_saved_dataset(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(table(["a,x", "b,y"]))
    assert len(open_data(DataSection(path=str(tmp_path)), TEXT).train) == 40


# ------------------------------------------------------------------------------------- images
def folder_of(folder, save, number=12):
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(number):
            save(folder / label / f"{i}.png", i, label)
    return folder


def small(path, i=0, label="a"):
    Image.fromarray(np.full((8, 8, 3), 10 * i + (label == "b"), np.uint8)).save(path)


def png(width, height, pixels):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def damaged(path):
    raw = bytearray(path.read_bytes())
    raw[45] ^= 0xFF
    return bytes(raw)


DAMAGES = {
    "cut short": lambda path: path.read_bytes()[:40],
    "empty": lambda path: b"",
    "a text": lambda path: b"no image",
    "a flipped byte": damaged,
    "a bomb": lambda path: png(60_000, 60_000, bytes(100)),
    "too few pixels": lambda path: png(8, 8, bytes(10)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_corrupt_image_is_named(tmp_path, name):
    folder = folder_of(tmp_path / "images", small)
    for label in "ab":
        for i in (0, 5):
            path = folder / label / f"{i}.png"
            path.write_bytes(DAMAGES[name](path))
    with pytest.raises(DataError, match=r"\.png.*repair or remove it"):
        opened(folder, IMAGES)


def test_images_of_16_bits_are_scaled_to_8(tmp_path):
    def save(path, i, label):
        Image.fromarray(np.full((8, 8), 257 * (10 * i + (label == "b")), np.uint16)).save(path)

    found = opened(folder_of(tmp_path / "deep", save), IMAGES).train
    expected = opened(folder_of(tmp_path / "plain", small), IMAGES).train
    assert sorted(found.pixels[:, 0, 0, 0].tolist()) == sorted(expected.pixels[:, 0, 0, 0].tolist())
    assert torch.equal(found.pixels[:, 0], expected.pixels[:, 0])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5])
def test_images_of_floats_are_refused(tmp_path, value):
    def save(path, i, label):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(path.with_suffix(".tiff"))

    with pytest.raises(DataError, match="32 bits"):
        opened(folder_of(tmp_path / "images", save), IMAGES)


def test_images_of_one_class(tmp_path):
    (tmp_path / "a").mkdir()
    small(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match="only the class a"):
        opened(tmp_path, IMAGES)


def test_line_ends_within_texts_are_no_rows(tmp_path):
    """Also where the file is read in several blocks, of which one ends within a text."""
    from sosp_hub.data.tables import read_table

    text = "\n".join(["a line"] * 1000)
    (tmp_path / "rows.csv").write_text("text,label\n" + f'"{text}",x\n' * 400)
    assert read_table([tmp_path / "rows.csv"])["text"][:] == [text] * 400


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {},
            "^data.text, data.label: .* has no column 'text', 'label'; it has genre, sentence. "
            "Write data.text=NAME data.label=NAME, each one of these$",
        ),
        ({"text": "sentence"}, "^data.label: .*Write data.label=NAME, one of these$"),
        (
            {"text": "sentence", "label": "genre", "text_pair": "other"},
            "^data.text_pair: .*Write data.text_pair=NAME, one of these$",
        ),
    ],
)
def test_all_columns_that_are_missing_are_told_at_once(keys, words, tmp_path):
    (tmp_path / "rows.csv").write_text("genre,sentence\na,b\nc,d\n")
    section = DataSection(path=str(tmp_path / "rows.csv"), test=None, **keys)
    with pytest.raises(DataError, match=words):
        open_data(section, "text-classification")


def test_a_table_without_a_column_for_labels_is_not_asked_for_its_name(tmp_path):
    (tmp_path / "rows.csv").write_text("sentence\nb\nd\n")
    section = DataSection(path=str(tmp_path / "rows.csv"), test=None, text="sentence")
    with pytest.raises(DataError, match=r"it has sentence; all of them are named already\. Give"):
        open_data(section, "text-classification")
