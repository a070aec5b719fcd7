"""Folders of images and sounds as `datasets` lays them out: by class, or with a table beside."""

import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from sosp_hub.data.source import open_data
from sosp_hub.errors import DataError
from sosp_hub.recipe.schema import DataSection
from tests.compare import assert_close

RATE = 16_000


def opened(path, task, **keys):
    return open_data(DataSection(path=str(path), **{"test": None, **keys}), task)


def write_image(path, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path)


def write_sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(bytes(2 * RATE))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_boxes_of_images_by_a_table_beside_them(tmp_path):
    rows = []
    for i in range(5):
        write_image(tmp_path / "images" / f"{i}.png")
        objects = {"bbox": [[1, 2, 3, 4]], "category": ["cat"]}
        rows.append({"file_name": f"images/{i}.png", "objects": objects})
    write_rows(tmp_path / "metadata.jsonl", rows)
    data = opened(tmp_path, "object-detection")
    assert data.info.class_names == ("cat",)
    assert data.train.columns["image"].open(0).size == (12, 10)
    assert len(data.train) + len(data.test) == 5


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_of_sounds_in_splits(tmp_path, suffix):
    for split, num in (("train", 3), ("test", 2)):
        rows = []
        for i in range(num):
            write_sound(tmp_path / split / f"{i}.wav")
            rows.append({"file_name": f"{i}.wav", "text": f"word {i}"})
        write_rows(tmp_path / split / f"metadata.{suffix}", rows)
    data = opened(tmp_path, "automatic-speech-recognition", test="test")
    assert (len(data.train), len(data.test)) == (3, 2)
    assert data.test.columns["text"] == ["word 0", "word 1"]
    assert len(data.test.columns["audio"].read(1, RATE)) == RATE


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_recording_is_heard_as_it_was_made(tmp_path, width, channels):
    """Of several channels the mean, and silence is 0 however many bits there are."""
    values = np.array([[0.0, 0.5], [-0.5, 0.25], [0.0, 0.0]])[:, :channels]
    kind, middle = {1: (np.uint8, 128), 2: ("<i2", 0), 4: ("<i4", 0)}[width]
    for i in range(2):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(width)
            file.setframerate(RATE)
            file.writeframes((values * 2 ** (8 * width - 1) + middle).astype(kind).tobytes())
    write_rows(
        tmp_path / "metadata.jsonl", [{"file_name": f"{i}.wav", "text": "a"} for i in range(2)]
    )
    data = opened(tmp_path, "automatic-speech-recognition")
    heard = data.train.columns["audio"].read(0, RATE)
    assert_close(torch.from_numpy(heard), torch.from_numpy(values.mean(1)), relative=1e-7)


def test_masks_have_files_of_their_own(tmp_path):
    rows = []
    for i in range(4):
        write_image(tmp_path / f"{i}.png")
        Image.new("L", (12, 10), i % 2).save(tmp_path / f"{i}-mask.png")
        rows.append({"file_name": f"{i}.png", "annotation_file_name": f"{i}-mask.png"})
    write_rows(tmp_path / "metadata.jsonl", rows)
    assert len(opened(tmp_path, "image-segmentation").train) == 3


def test_classes_by_a_table_go_before_those_by_folders(tmp_path):
    rows = []
    for i in range(6):
        write_image(tmp_path / "all" / f"{i}.png")
        rows.append({"file_name": f"all/{i}.png", "label": ["cat", "dog"][i % 2]})
    write_rows(tmp_path / "metadata.csv", rows)
    assert opened(tmp_path, "image-classification").info.class_names == ("cat", "dog")


def test_sounds_in_one_folder_per_class(tmp_path):
    for kind in ("sine", "saw"):
        for i in range(3):
            write_sound(tmp_path / kind / f"{i}.wav")
    data = opened(tmp_path, "audio-classification")
    assert data.info.class_names == ("saw", "sine")
    assert len(data.train.columns["audio"].read(0, RATE)) == RATE


def test_images_without_classes_need_no_folders(tmp_path):
    for i in range(5):
        write_image(tmp_path / f"{i}.png")
    (tmp_path / "README.md").write_text("about them")
    assert len(opened(tmp_path, "self").train) == 4
    with pytest.raises(DataError, match=r"no column 'image', 'label'; it has text"):
        opened(tmp_path, "image-classification")


def test_names_of_files_that_are_not_there_stay_names(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    write_rows(tmp_path / "texts.csv", rows)
    with pytest.raises(DataError, match="has no column 'image'; it has file_name, text, label"):
        opened(tmp_path, "image-classification")


def test_a_file_that_is_missing_is_named(tmp_path):
    write_image(tmp_path / "0.png")
    rows = [{"file_name": f"{i}.png", "label": i} for i in range(4)]
    write_rows(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(DataError, match="row 1 of"):
        opened(tmp_path, "image-classification")


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("object-detection", r"image files with a metadata.jsonl beside them \(file_name, objects"),
        ("audio-classification", r"audio files in one subfolder per class, or with a metadata"),
        ("self", r"image files, or files of"),
        ("text-classification", r"expected files of .csv"),
    ],
)
def test_an_empty_folder_is_told_what_it_may_hold(tmp_path, task, expected):
    with pytest.raises(DataError, match=expected):
        opened(tmp_path, task)


def test_a_column_of_another_name_is_told_how_to_name_it(tmp_path):
    rows = [{"translation": {"en": "a", "de": "b"}} for _ in range(4)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"it has translation\.\w\w, translation\.\w\w\. Write data\.source=NAME data",
    ):
        opened(tmp_path / "pairs.jsonl", "translation")
    keys = {"source": "translation.en", "target": "translation.de"}
    assert len(opened(tmp_path / "pairs.jsonl", "translation", **keys).train) == 3
