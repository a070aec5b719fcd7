"""Data sets of a hub: the real client of `datasets` against a hub on this machine."""

import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import new

pytestmark = pytest.mark.slow  # `datasets` keeps the address of the hub from when it is imported

OPEN = """
import json, sys
from sosp_hub.data.source import open_data
from sosp_hub.errors import SospHubError
from sosp_hub.recipe.schema import DataSection

section, task, shown = json.loads(sys.argv[1])
try:
    data = open_data(DataSection(**section), task)
except SospHubError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps(eval(shown, {"data": data})))
"""
NUM_FILES = 24
SIZES = {
    **{f"train-{i:05}-of-{NUM_FILES:05}": 6000 // NUM_FILES for i in range(NUM_FILES)},
    "test-00000-of-00001": 20,
}


@pytest.fixture
def opened(hub, client_env):
    """What ``shown`` gives of the data that a process of its own opens from the hub."""

    def run(section, task, shown="None"):
        given = json.dumps([section, task, shown])
        done = subprocess.run(
            [sys.executable, "-c", OPEN, given], env=client_env, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    return run


def parquet(table):
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


def add_texts(hub):
    files, first = {}, 0
    for name, num in SIZES.items():
        texts = [f"row {i}" for i in range(first, first + num)]
        files[f"data/{name}.parquet"] = parquet(pa.table({"text": texts}))
        first += num
    hub.add_repo("me/texts", files=files)


def test_texts_are_downloaded_whole_or_streamed_in_part(hub, opened):
    add_texts(hub)
    shown = "[list(data.train.texts), len(data.test)]"
    whole = opened({"id": "me/texts"}, "text-generation", shown)
    assert whole == [[f"row {i}" for i in range(6000)], 20]
    section = {"id": "me/texts", "num_streamed": 40}
    texts, num_test = opened(section, "text-generation", shown)
    assert len(set(texts)) == 40
    assert set(texts) < set(whole[0])
    assert texts != whole[0][:40]
    assert num_test == 20
    assert opened(section, "text-generation", shown) == [texts, num_test]


def test_streaming_leaves_files_alone_that_it_does_not_read(hub, opened):
    add_texts(hub)

    def read(**more):
        hub.log.clear()
        opened({"id": "me/texts", **more}, "text-generation")
        return len({request for request, _ in hub.log if "GET" in request and "train-" in request})

    assert read(num_streamed=40) < NUM_FILES / 2
    assert read() == NUM_FILES


@pytest.mark.parametrize("num", [None, 9], ids=["whole", "streamed"])
def test_images_keep_their_classes_and_pixels(num, hub, opened):
    rows = {
        "image": [new("L", (8, 8), 10 * i) for i in range(12)],
        "label": [i % 3 for i in range(12)],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=["shirt", "boot", "bag"])})
    table = Dataset.from_dict(rows, features=features)
    files = {}
    for split in ("train", "test"):
        written = io.BytesIO()
        table.to_parquet(written)
        files[f"data/{split}.parquet"] = written.getvalue()
    hub.add_repo("me/clothes", files=files)
    names, pairs = opened(
        {"id": "me/clothes", "num_streamed": num},
        "image-classification",
        "[data.info.class_names, list(zip(data.train.pixels[:, 0, 3, 4].tolist(), "
        "data.train.labels))]",
    )
    assert names == ["shirt", "boot", "bag"]
    assert len(pairs) == (num or 12)
    assert all(label == pixel // 10 % 3 for pixel, label in pairs)


def test_files_that_do_not_tell_their_columns_are_streamed(hub, opened):
    lines = [f"row {i},{'ab'[i % 2]}" for i in range(300)]
    hub.add_repo("me/lines", files={"train.csv": "\n".join(["text,label", *lines]).encode()})
    section = {"id": "me/lines", "num_streamed": 30, "test": None}
    shown = "[data.info.class_names, len(data.train), len(data.test), list(data.train.texts)]"
    names, num_train, num_test, texts = opened(section, "text-classification", shown)
    assert (names, num_train, num_test) == (["a", "b"], 24, 6)
    assert len(set(texts)) == 24


@pytest.mark.parametrize("streamed", [{}, {"num_streamed": 5}], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"train": "learn"}, "data.train: me/texts has no split 'learn'; it has "),
        ({"id": "me/nothing"}, "data.id: the hub has no 'me/nothing'"),
        ({"text": "words"}, "data.text: me/texts has no column 'words'; it has text"),
    ],
    ids=["split", "id", "column"],
)
def test_what_the_hub_does_not_have_is_told(wrong, told, streamed, hub, opened):
    add_texts(hub)
    assert opened({"id": "me/texts", **wrong, **streamed}, "text-generation").startswith(told)


def test_what_is_on_this_machine_is_not_streamed(opened, tmp_path):
    (tmp_path / "texts.txt").write_text("a text")
    for section in ({"path": str(tmp_path)}, {"id": str(tmp_path)}, {"id": "sklearn/digits"}):
        task = "image-classification" if "sklearn" in str(section) else "text-generation"
        error = opened({**section, "num_streamed": 5}, task)
        assert error.startswith("data.num_streamed: ")
        assert "read whole" in error
