"""What rows become for a model: labels at the outputs of their names, distances in their unit."""

import json
import shutil

import pytest
import torch

from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.recipe.schema import DataSection, ModelSection
from sosp_hub.recipe.tasks import find_task
from sosp_hub.tasks.loss import batch_loss
from sosp_hub.zoo.load import load_model
from tests.compare import assert_close
from tests.tasks.made import CASES, make
from tests.tasks.test_other_families import siglip


def opened(folder, key, model="model", **keys):
    """The model, and its train split."""
    task = CASES[key].task
    data = open_data(DataSection(path=str(folder / "data"), max_length=32, **keys), task)
    section = ModelSection(library="transformers", id=str(folder / model), task=task)
    loaded = load_model(section, data=data.info)
    return loaded.model, load_split(data, "train", loaded.processor)


def classes_of(batch, names):
    """The names of the outputs that the labels of a batch stand for."""
    labels = batch["labels"]
    if isinstance(labels, list):
        labels = torch.cat([each["class_labels"] for each in labels])
    return [names[label] for label in labels.flatten().tolist() if label >= 0]


@pytest.mark.parametrize(
    "key", ["token-classification", "object-detection", "audio-classification"]
)
def test_labels_are_at_the_outputs_of_their_names(folders, tmp_path, key):
    """A model that has its classes in another order is trained and measured all the same."""
    folder = folders(key)
    data = open_data(DataSection(path=str(folder / "data"), max_length=32), CASES[key].task)
    found = []
    for turn, name in ((1, "as in the data"), (-1, "turned around")):
        shutil.copytree(folder / "model", tmp_path / name)
        shutil.copytree(folder / "data", tmp_path / "data", dirs_exist_ok=True)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        others = [f"other {i}" for i in range(len(config["id2label"]))]
        names = [*data.info.class_names, *others][: len(others)][::turn]
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {each: i for i, each in enumerate(names)}
        path.write_text(json.dumps(config))
        _, split = opened(tmp_path, key, name)
        found.append(classes_of(split.__getitems__(range(6)), names))
    assert len(set(found[0])) > 1
    assert found[0] == found[1]


def test_distances_are_in_the_unit_that_the_scale_makes_of_them(folders):
    folder = folders("depth-estimation")
    metres, thousandth = (
        opened(folder, "depth-estimation", depth_scale=scale)[1].__getitems__([0])["labels"]
        for scale in (1.0, 0.001)
    )
    assert_close(thousandth, metres / 1000, relative=1e-6)


def test_texts_of_siglip_are_as_long_as_it_was_trained_with(tmp_path):
    key = "zero-shot-image-classification"
    folder = make(CASES[key], tmp_path)
    torch.manual_seed(0)
    model, own = siglip()
    model.save_pretrained(folder / "siglip")
    own.save_pretrained(folder / "siglip")
    _, split = opened(folder, key, "siglip")
    assert split.__getitems__([0, 1])["input_ids"].shape == (2, own.tokenizer.model_max_length)


def test_the_loss_of_ctc_is_one_of_each_recording(folders):
    """Its usual sum would train four recordings with four times the rate."""
    model, split = opened(folders("automatic-speech-recognition"), "automatic-speech-recognition")
    loss_fn = find_task("automatic-speech-recognition").loss_fn(model)
    one, four = (batch_loss(model, split.__getitems__([0] * n), loss_fn).value for n in (1, 4))
    assert_close(four, one, relative=1e-5)
