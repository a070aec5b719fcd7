"""Rows that cannot be right are named, with what to write instead; so are missing processors."""

import io
import json
import shutil
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from recipes import make_data
from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.errors import DataError, ModelError, SospHubError
from sosp_hub.recipe.schema import DataSection, ModelSection
from sosp_hub.recipe.tasks import find_task
from sosp_hub.zoo.load import load_model


def sound(rate=16_000, values=4000, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(bytes(values * width))
    return {"bytes": file.getvalue(), "path": None}


def played(values, rate=16_000):
    return {"array": values, "sampling_rate": rate}


def picture(width=56, height=56):
    return make_data.png(np.zeros((height, width, 3), np.uint8))


def mask(width=56, height=56, label=1):
    return make_data.png(np.full((height, width), label, np.uint8))


def things(*boxes, classes=None):
    names = ["bag"] * len(boxes) if classes is None else classes
    return {"bbox": [list(map(float, box)) for box in boxes], "category": names}


# task, rows, keys of data, what is said
BAD = {
    "outside": (
        "object-detection",
        [
            {"image": picture(), "objects": things((2, 2, 9, 9))},
            {"image": picture(), "objects": things((40, 2, 30, 9))},
        ],
        {},
        r"row 1 of .* has the box \[40.* in an image of 56 x 56 .*write data.boxes: xyxy",
    ),
    "empty box": (
        "object-detection",
        [{"image": picture(), "objects": things((20, 20, 10, 10))}],
        {"boxes": "xyxy"},
        "row 0 of .* is empty read as xyxy; write data.boxes: xywh",
    ),
    "fewer classes": (
        "object-detection",
        [{"image": picture(), "objects": things((2, 2, 9, 9), classes=["bag", "boot"])}],
        {},
        r"data.objects: row 0 .*other lengths; expected \{\"bbox\"",
    ),
    "no objects": (
        "object-detection",
        [{"image": picture(), "boxes": [1]}],
        {},
        "data.objects: .* has no column 'objects'",
    ),
    "mask of another size": (
        "image-segmentation",
        [{"image": picture(), "annotation": mask(40, 56)}],
        {},
        "row 0 of .* a mask of 40 x 56 pixels for an image of 56 x 56",
    ),
    "mask of colours": (
        "image-segmentation",
        [{"image": picture(), "annotation": picture()}],
        {},
        r"data.mask: .*row 0 .*colours \(mode RGB\).*one channel",
    ),
    "class outside": (
        "image-segmentation",
        [{"image": picture(), "annotation": mask(label=200)}],
        {},
        "row 0 of .* has the class 200 for a model with 11 outputs; write model.num_labels: 201",
    ),
    "depth of another size": (
        "depth-estimation",
        [{"image": picture(), "depth_map": [[1.0, 2.0]]}],
        {},
        r"data.depth: row 0 .* shape \[1, 2\] for an image of 56 x 56",
    ),
    "no depth": (
        "depth-estimation",
        [{"image": picture(), "depth_map": np.zeros((56, 56)).tolist()}],
        {},
        "data.depth: row 0 .*write 0 where nothing is known",
    ),
    "rate": (
        "automatic-speech-recognition",
        [{"audio": sound(), "text": "red"}, {"audio": sound(22_050), "text": "blue"}],
        {},
        r"data.audio: row 1 .* 22050 values a second.*takes 16000.*sampling_rate=16000",
    ),
    "no sound": (
        "audio-classification",
        [
            {"audio": sound(values=0), "label": "sine"},
            {"audio": sound(), "label": "saw"},
        ],
        {},
        "data.audio: row 0 .* is empty",
    ),
    "no audio": (
        "audio-classification",
        [
            {"audio": {"bytes": b"RIFF", "path": None}, "label": "sine"},
            {"audio": sound(), "label": "saw"},
        ],
        {},
        "data.audio: row 0 .* cannot be read .*expected a WAV file.*soundfile",
    ),
    "letters": (
        "automatic-speech-recognition",
        [{"audio": sound(), "text": "RED"}],
        {},
        "data.text: row 0 .*'RED', of which the tokenizer knows no character",
    ),
    "no answer": (
        "image-text-to-text",
        [{"image": picture(), "source": "what is left", "target": ""}],
        {},
        "data.target: row 0 .* is empty",
    ),
    "no target": (
        "text2text-generation",
        [{"source": "a bag", "target": ""}],
        {},
        "data.target: sample 0 .* is empty",
    ),
    "gap": (
        "time-series-forecasting",
        [{"target": [1.0] * 80}, {"target": [1.0, None, 2.0]}],
        {},
        "data.series: row 1 .* no list of finite numbers.*fill gaps",
    ),
    "short": (
        "time-series-forecasting",
        [{"target": [1.0] * 30}],
        {},
        r"no series .* the 60 times of one window \(48 before and 12 after\)",
    ),
    "channels": (
        "time-series-forecasting",
        [{"target": [[1.0] * 80, [2.0] * 80]}],
        {},
        "row 0 .* has 2 channels, and the model takes 1",
    ),
    "score": (
        "sentence-similarity",
        [{"sentence1": "a", "sentence2": "bag", "score": None}],
        {},
        "data.score: row 0 .* None, expected a finite number",
    ),
    "two channels": (
        "automatic-speech-recognition",
        [{"audio": played([[0.0, 0.0], [0.5, 0.5]]), "text": "red"}],
        {},
        r"data.audio: row 0 .* shape \[2, 2\]; write one channel",
    ),
    "whole numbers": (
        "automatic-speech-recognition",
        [{"audio": played([0, -300, 32767]), "text": "red"}],
        {},
        "data.audio: row 0 .* whole numbers; divide those of 16 bits by 32768",
    ),
    "no class": (
        "zero-shot-image-classification",
        [{"image": picture(), "label": 0}, {"image": picture(), "label": -1}],
        {},
        "data.label: .* has the label -1; expected names, or whole numbers from 0",
    ),
    "no class of those that are listed": (
        "zero-shot-image-classification",
        [{"image": picture(), "label": 1}, {"image": picture(), "label": -1}],
        {},
        "data.label: row 1 of .* has the label -1, which is none of the 2 classes",
    ),
    "neither captions nor classes": (
        "zero-shot-image-classification",
        [{"image": picture(), "words": "a bag"}],
        {},
        "data.label: .* has no column 'label'; it has image, words",
    ),
}


def go_through(section, model):
    data = open_data(section, model.task)
    split = load_split(data, "train", load_model(model, data=data.info).processor)
    for index in range(len(split)):
        split.__getitems__([index])


@pytest.mark.parametrize("key", BAD)
def test_rows_that_cannot_be_right_are_named(folders, tmp_path, key):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    task, rows, keys, said = BAD[key]
    folder = folders(task)
    blob = {"bytes": Value("binary"), "path": Value("string")}
    kinds = {"image": Image(), "annotation": Image()}
    kinds |= {"audio": blob} if "bytes" in rows[0].get("audio", ()) else {}
    kinds |= {"label": ClassLabel(names=["cat", "dog"])} if key.endswith("are listed") else {}
    table = Dataset.from_list(rows)
    features = {name: kinds.get(name, kind) for name, kind in table.features.items()}
    table = Dataset.from_list(rows, features=Features(features))
    table.to_parquet(str(tmp_path / "train.parquet"))
    table.to_parquet(str(tmp_path / "test.parquet"))
    section = DataSection(path=str(tmp_path), max_length=32, **keys)
    outputs = {"object-detection": 10, "audio-classification": 4}.get(task)
    model = ModelSection(
        library="transformers", id=str(folder / "model"), task=task, num_labels=outputs
    )
    with pytest.raises(DataError, match=said):
        go_through(section, model)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("object-detection", "no preprocessor_config.json.*AutoImageProcessor.from_pretrained"),
        ("audio-classification", "no preprocessor_config.json.*AutoFeatureExtractor"),
        ("automatic-speech-recognition", "no processor_config.json.*AutoProcessor"),
        ("zero-shot-image-classification", "inputs of zero-shot-image-classification are made"),
        ("text2text-generation", "has no tokenizer, so every text"),
    ],
)
def test_a_processor_that_lacks_is_named_with_the_remedy(folders, tmp_path, key, said):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders(key) / "model" / name, folder)
    section = ModelSection(library="transformers", id=str(folder), task=key)
    with pytest.raises(ModelError, match=said):
        load_model(section)


@pytest.mark.parametrize(
    ("key", "task", "said"),
    [
        ("object-detection", "token-classification", "no yolos for token-.*write object-"),
        (
            "audio-classification",
            "question-answering",
            "write audio-classif.* or give another",
        ),
        ("time-series-forecasting", "object-detection", "no patchtst for object-detection"),
        ("text2text-generation", "time-series-forecasting", "no t5 for time-series-forecasting"),
    ],
)
def test_a_task_that_a_model_cannot_do_says_what_it_can(folders, key, task, said):
    section = ModelSection(library="transformers", id=str(folders(key) / "model"), task=task)
    with pytest.raises(ModelError, match=said):
        load_model(section)


def test_parts_of_columns_have_a_dot(tmp_path):
    rows = [{"translation": {"en": "a bag", "de": "ein Sack"}}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    where = {"path": str(tmp_path / "rows.jsonl"), "test": None}
    section = DataSection(**where, source="translation.en", target="translation.de")
    data = open_data(section, "translation")
    assert data.task == "text2text-generation"
    assert data.train.columns["target"][0] == "ein Sack"
    with pytest.raises(SospHubError, match=r"data.target: .*no column 'translation.fr'"):
        open_data(section.model_copy(update={"target": "translation.fr"}), "translation")


def test_classes_of_objects_have_the_names_that_the_table_lists(folders, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

    names = ["bag", "boot", "coat"]
    features = Features(
        {
            "image": Image(),
            "objects": {
                "bbox": Sequence(Sequence(Value("float32"))),
                "category": Sequence(ClassLabel(names=names)),
            },
        }
    )
    rows = [{"image": picture(), "objects": things((2, 2, 9, 9), classes=[1])}] * 4
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    section = DataSection(path=str(tmp_path / "rows.parquet"), test=None)
    data = open_data(section, "object-detection")
    assert data.info.class_names == tuple(names)
    task, rows = find_task("object-detection"), Dataset.from_list(rows, features=features)
    assert task.rows(rows, section, "rows").class_names == tuple(names)
    lists = [{"bbox": [2.0, 2.0, 9.0, 9.0], "category": "boot"}]
    as_lists = Dataset.from_list([{"image": picture(), "objects": lists}] * 4)
    listed = task.rows(as_lists, section, "rows")
    assert listed.columns["classes"] == [["boot"]] * 4
    assert listed.columns["boxes"][0] == [[2.0, 2.0, 9.0, 9.0]]


def test_a_model_of_neither_texts_nor_images_is_told():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**small, intermediate_size=16, image_size=32)
    model = transformers.ViTMAEModel(config)
    loaded = SimpleNamespace(
        model=model, processor=SimpleNamespace(max_positions=None, tokenizer=None)
    )
    with pytest.raises(ModelError, match=r"ViTMAEModel takes no texts.*preprocessor_config\.json"):
        find_task("self").example_inputs(loaded, 2, 8)
