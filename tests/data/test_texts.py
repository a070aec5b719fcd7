import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.data.texts import MaskedSplit
from sosp_hub.errors import DataError
from sosp_hub.recipe.schema import DataSection

CLASSES, MODEL = "text-classification", "causal-lm"
ROWS = [
    {"text": "a first, with a comma", "label": "good"},
    {"text": 'a "second"\nof two lines', "label": "bad"},
    {"text": "third \u2028 with a line separator", "label": "good"},
    {"text": "fourth", "label": "bad"},
    {"text": "fifth", "label": "ugly"},
]


def write(file, rows=ROWS):
    file.parent.mkdir(parents=True, exist_ok=True)
    match file.suffix:
        case ".jsonl":
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            file.write_text(text + "\n", "utf-8")
        case ".json":
            file.write_text(json.dumps(rows), "utf-8")
        case ".csv":
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"train{suffix}")
    write(tmp_path / f"test{suffix}", ROWS[:2])
    data = open_data(DataSection(path=str(tmp_path)), CLASSES)
    assert list(data.train.texts) == [row["text"] for row in ROWS]
    assert data.info.class_names == ("bad", "good", "ugly")
    assert list(data.train.labels) == [1, 0, 1, 0, 2]
    assert list(data.test.labels) == [1, 0]


def test_pairs_of_texts(tmp_path, letters):
    rows = [{"premise": "ab", "hypothesis": "c", "label": "x"},
            {"premise": "a", "hypothesis": "bcd", "label": "y"}] * 4  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    keys = {"path": str(file), "test": None, "text": "premise"}
    data = open_data(DataSection(**keys, text_pair="hypothesis"), CLASSES)
    processing = letters()
    split = load_split(data, "train", processing)
    batch = split.__getitems__(range(len(split)))
    for row, first, second in zip(
        batch["input_ids"], data.train.texts, data.train.pairs, strict=True
    ):
        ids = processing.tokenizer(first, second)["input_ids"]
        assert row[: len(ids)].tolist() == ids
    alone = load_split(open_data(DataSection(**keys), CLASSES), "train", processing)
    assert alone.__getitems__([0])["input_ids"].shape[1] < batch["input_ids"].shape[1]
    with pytest.raises(DataError, match=r"data.text_pair: .* no column 'second'"):
        open_data(DataSection(**keys, text_pair="second"), CLASSES)


@pytest.mark.parametrize(
    "name", ["train/a.jsonl", "data/train-00000-of-00002.jsonl", "train_b.jsonl"]
)
def test_splits_by_name(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "held/test.jsonl", ROWS[:1])
    write(tmp_path / "trainers.jsonl", ROWS[:2])  # of no split
    data = open_data(DataSection(path=str(tmp_path)), CLASSES)
    assert (len(data.train), len(data.test)) == (5, 1)


def test_split_that_is_a_file_name(tmp_path):
    write(tmp_path / "one.csv")
    write(tmp_path / "two.csv", ROWS[:1])
    section = DataSection(path=str(tmp_path), train="one.csv", test="two.csv")
    assert len(open_data(section, CLASSES).test) == 1


def test_one_file_holds_out_its_test(tmp_path):
    file = write(tmp_path / "all.jsonl", ROWS * 4)
    data = open_data(DataSection(path=str(file), test=None, validation_share=0.25), CLASSES)
    assert (len(data.train), len(data.test)) == (15, 5)
    assert sorted([*data.train.texts, *data.test.texts]) == sorted(row["text"] for row in ROWS * 4)


def test_the_log_says_how_much_is_held_out(tmp_path, caplog):
    file = write(tmp_path / "all.jsonl", ROWS * 4)
    with caplog.at_level("INFO", "sosp_hub"):
        open_data(DataSection(path=str(file), validation_share=0.25), CLASSES)
    assert "all.jsonl has no splits; 25 % of it are held out for the test" in caplog.text


def test_numbers_stay_what_they_are(tmp_path):
    rows = [{"text": "t", "label": label} for label in (0, 3, 1)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    data = open_data(DataSection(path=str(tmp_path)), CLASSES)
    assert data.info.num_labels == 4
    assert list(data.train.labels) == [0, 3, 1]


def test_class_names_of_a_parquet_file_of_datasets(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    made = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    made.to_parquet(tmp_path / "all.parquet")
    data = open_data(DataSection(path=str(tmp_path / "all.parquet"), num_test=1), CLASSES)
    assert data.info.class_names == ("z", "a")


BAD = {
    "missing": ("nothing/here.jsonl", {}, "does not exist; the nearest folder that does is"),
    "suffix": ("a.xlsx", {}, "ends in '.xlsx'"),
    "empty file": ("a.jsonl", {}, "is empty"),
    "no rows": ("a.json", {}, "has no rows"),
    "not json": ("b.jsonl", {}, "cannot read"),
    "an object": ("h.json", {}, "expected rows, each an object"),
    "no objects": ("i.jsonl", {}, "expected rows, each an object"),
    "column": ("c.jsonl", {"text": "words"}, "no column 'words'; it has text, label"),
    "number": ("d.jsonl", {}, "row 0 of .* has 5 in column 'text'"),
    "negative": ("e.jsonl", {}, "has the label -1"),
    "one class": ("f.jsonl", {}, "has only the class good"),
    "no labels": ("g.txt", {}, "no column 'label'; it has text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    name, keys, message = BAD[case]
    file = tmp_path / name
    first = {"text": "a", "label": "good"}
    content = {
        "suffix": "x",
        "empty file": "",
        "no rows": "[]",
        "not json": '{"text": 1',
        "an object": json.dumps(first),
        "no objects": "[1, 2]",
        "column": json.dumps(first),
        "number": json.dumps({"text": 5, "label": "good"}),
        "negative": json.dumps({"text": "a", "label": -1}),
        "one class": "\n".join([json.dumps(first)] * 9),
        "no labels": "some text",
    }
    if case in content:
        file.write_text(content[case])
    with pytest.raises(DataError, match=message):
        open_data(DataSection(path=str(file), **keys), CLASSES)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(DataError, match="holds no data for text-generation"):
        open_data(DataSection(path=str(tmp_path)), MODEL)


def test_test_split_that_is_not_there(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"no split 'test'; it has train\.jsonl.*data\.test: null"):
        open_data(DataSection(path=str(tmp_path)), CLASSES)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [4, 7])
def test_windows_are_the_texts_one_after_the_other(tmp_path, letters, bos, length):
    for name, text in (("a", "hello"), ("b", "wide world")):
        (tmp_path / f"{name}.txt").write_text(text)
    data = open_data(DataSection(path=str(tmp_path), max_length=length), MODEL)
    splits = [load_split(data, name, letters(bos)) for name in ("train", "test")]
    stream = [ord(letter) for letter in "hello\n\nwide world\n\n"]
    body = length - bos
    expected = [[1] * bos + stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
    found = []
    for split in splits:
        batch = split.__getitems__(list(range(len(split))))
        assert torch.equal(batch["labels"], batch["input_ids"])
        found += batch["input_ids"].tolist()
    assert sorted(found) == sorted(expected)
    assert len(splits[1]) == 1


def test_windows_are_limited_and_shortened(tmp_path, letters, caplog):
    (tmp_path / "a.txt").write_text("x" * 200)
    section = DataSection(path=str(tmp_path), max_length=50, num_train=3, num_test=2)
    data = open_data(section, MODEL)
    processing = letters(max_positions=10)
    assert len(load_split(data, "train", processing)) == 3
    assert load_split(data, "test", processing).__getitems__([0, 1])["input_ids"].shape == (2, 10)
    assert "50 is more than the model takes; using 10" in caplog.text


def test_too_little_text(tmp_path, letters):
    (tmp_path / "a.txt").write_text("short")
    data = open_data(DataSection(path=str(tmp_path)), MODEL)
    with pytest.raises(DataError, match="has 7 tokens, fewer than one window of 512"):
        load_split(data, "train", letters())


def test_lists_of_classes_go_to_the_outputs_of_the_same_names(tmp_path, letters):
    """Three classes of which none is at its own place."""
    rows = [{"text": "t", "label": labels} for labels in (["a"], ["b", "c"], ["c"])]
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", rows)
    data = open_data(DataSection(path=str(tmp_path)), CLASSES)
    split = load_split(data, "train", letters(label_order=(2, 0, 1)))  # b, c, a
    assert split.__getitems__([0, 1, 2])["labels"].tolist() == [[0, 0, 1], [1, 1, 0], [0, 1, 0]]


def test_masks_are_those_of_the_seed():
    windows = torch.arange(200).view(4, 50)
    first, again, other = (
        MaskedSplit(windows, 999, seed).__getitems__([0, 1, 2, 3])["input_ids"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_padded_to_the_longest_of_their_batch(tmp_path, letters, side):
    rows = [
        {"text": "abcdef", "label": "y"},
        {"text": "a", "label": "x"},
        {"text": "ab", "label": "x"},
    ]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    data = open_data(DataSection(path=str(tmp_path), max_length=4), CLASSES)
    split = load_split(data, "train", letters(side=side, label_order=(1, 0)))
    batch = split.__getitems__([2, 0])
    a, b, c, d = (ord(letter) for letter in "abcd")
    expected = [[a, b, 0, 0] if side == "right" else [0, 0, a, b], [a, b, c, d]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(i > 0) for i in row] for row in expected]
    assert batch["labels"].tolist() == [1, 0]
    assert split.__getitems__([1, 2])["input_ids"].shape == (2, 2)
