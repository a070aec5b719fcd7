import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from sosp_hub.data.source import DataInfo
from sosp_hub.errors import DataError, HubError, ModelError
from sosp_hub.recipe.training import DenseTrainSection
from sosp_hub.zoo.load import example_inputs, load_model
from sosp_hub.zoo.origin import origin_on_hub
from tests.compare import assert_close

TINY = "test_resnet"
SMALL = DataInfo(
    num_labels=10,
    class_names=tuple("abcdefghij"),
    image_shape=(1, 28, 28),
    mean=(0.3,),
    std=(0.2,),
)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as timm writes it: 5 classes, its own normalisation."""
    torch.manual_seed(3)
    model = timm.create_model(TINY, num_classes=5).eval()
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    return tmp_path / "saved", model


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_random_model_fits_the_data(section, name):
    loaded = load_model(section(id=name, pretrained=False), data=SMALL)
    assert (loaded.num_labels, loaded.model.num_classes, loaded.new_head) == (10, 10, True)
    assert not loaded.model.training
    inputs = example_inputs(loaded)
    size = 28 if name == "test_efficientnet" else timm.get_pretrained_cfg(name).input_size[1]
    assert inputs[0].shape == (2, 1, size, size)
    assert loaded.model(*inputs).shape == (2, 10)
    assert (loaded.processor.mean, loaded.processor.std) == ((0.3,), (0.2,))
    assert loaded.base_model is None
    config = loaded.model.pretrained_cfg
    assert config["mean"] == (0.3,)
    assert config["input_size"] == (1, size, size)
    assert config["label_names"] == list("abcdefghij")
    assert not config.get("hf_hub_id")


def test_model_arguments_and_size(section):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 64}
    loaded = load_model(section(id="test_vit", pretrained=False, kwargs=kwargs), data=SMALL)
    assert loaded.model.patch_embed.num_patches == 16
    assert loaded.processor.shape == (1, 32, 32)
    asked = DataInfo(num_labels=3, class_names=("a", "b", "c"), image_size=64)
    loaded = load_model(section(id="test_vit", pretrained=False), data=asked)
    assert loaded.processor.shape == (3, 64, 64)
    assert loaded.model(*example_inputs(loaded)).shape == (2, 3)


def test_folder(folder, section):
    path, model = folder
    loaded = load_model(section(id=str(path)))
    images = example_inputs(loaded)[0]
    assert_close(loaded.model(images), model(images), relative=0)
    assert (loaded.num_labels, loaded.new_head, loaded.base_model) == (5, False, None)
    assert loaded.processor.mean == (0.1, 0.2, 0.3)
    assert loaded.library == "timm"


def test_half_precision(folder, section):
    loaded = load_model(section(id=str(folder[0]), dtype="bfloat16"))
    inputs = example_inputs(loaded)
    assert inputs[0].dtype == torch.bfloat16
    assert loaded.model(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weight_file(tmp_path, folder, section, suffix):
    file = tmp_path / f"weights{suffix}"
    weights = folder[1].state_dict()
    if suffix == ".pth":
        torch.save({"state_dict": weights}, file)  # noqa: TID251 - what others wrote
    else:
        save_file(weights, file)
    loaded = load_model(section(id=TINY, kwargs={"checkpoint_path": str(file)}))
    images = example_inputs(loaded)[0]
    assert_close(loaded.model(images), folder[1](images), relative=0)
    assert (loaded.num_labels, loaded.base_model) == (5, None)
    json.dumps({k: v for k, v in loaded.model.pretrained_cfg.items() if k != "mean"})


def test_weight_file_that_would_run_code(tmp_path, section):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {"fc.weight": Evil()}}, file)  # noqa: TID251 - the attack
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_model(section(id=TINY, kwargs={"checkpoint_path": str(file)}))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_model(tmp_path, section):
    file = tmp_path / "weights.safetensors"
    save_file({"some.weight": torch.zeros(3)}, file)
    with pytest.raises(ModelError, match=r"timm cannot build 'test_resnet'.*conv1\.0\.weight"):
        load_model(section(id=TINY, kwargs={"checkpoint_path": str(file)}))


TRAIN = DenseTrainSection(epochs=1)
FIVE = DataInfo(num_labels=5, class_names=tuple("vwxyz"))
TEN = DataInfo(num_labels=10, class_names=tuple("abcdefghij"))


@pytest.mark.parametrize(
    ("data", "keys", "num", "new"),
    [
        (FIVE, {}, 5, False),
        (None, {}, 5, False),
        (FIVE, {"num_labels": 5}, 5, False),
        (TEN, {"num_labels": 10}, 10, True),
        (TEN, {"train": TRAIN}, 10, True),
        (TEN, {"num_labels": 12, "train": TRAIN}, 12, True),
    ],
)
def test_head_of_a_checkpoint(folder, section, caplog, data, keys, num, new):
    path, model = folder
    with caplog.at_level("INFO", "sosp_hub"):
        loaded = load_model(section(id=str(path), **keys), data=data)
    assert (loaded.num_labels, loaded.model.num_classes, loaded.new_head) == (num, num, new)
    assert ("new head" in caplog.text) == new
    assert_close(loaded.model.conv1[0].weight, model.conv1[0].weight, relative=0)
    assert loaded.model.fc.weight.shape[0] == num


@pytest.mark.parametrize(
    ("keys", "numbers"), [({}, ("5 outputs", "10 labels")), ({"num_labels": 9}, ("9", "10"))]
)
def test_head_that_does_not_fit(folder, section, keys, numbers):
    with pytest.raises(DataError, match=r"model\.num_labels") as error:
        load_model(section(id=str(folder[0]), **keys), data=TEN)
    assert all(number in str(error.value) for number in numbers)


def test_classes_of_the_same_name_meet(tmp_path, section):
    model = timm.create_model(TINY, num_classes=3)
    names = {"label_names": ["cat", "ant", "bee"]}
    timm.models.save_for_hf(model, tmp_path, model_config=names, safe_serialization=True)
    data = DataInfo(num_labels=3, class_names=("ant", "bee", "cat"))
    loaded = load_model(section(id=str(tmp_path)), data=data)
    assert loaded.processor.label_order == (1, 2, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id": "test_rasnet"}, "no model 'test_rasnet'; did you mean test_resnet"),
        ({"id": "cifar_resnet20"}, "no pretrained weights for 'cifar_resnet20'.*pretrained: false"),
        ({"id": f"{TINY}.nonsense"}, "no weights 'test_resnet.nonsense'; for test_resnet it has"),
        ({"id": "/no/such/folder"}, "nearest folder that does is /$"),
        ({"id": TINY, "pretrained": False, "kwargs": {"depht": 3}}, "depht"),
        ({"id": TINY, "kwargs": {"checkpoint_path": "/no/file.pth"}}, "checkpoint_path.*not exist"),
        ({"id": TINY, "kwargs": {"num_classes": 3}}, "write model.num_labels instead"),
        ({"id": TINY, "task": "causal-lm"}, "model.task: timm models do image-classification"),
    ],
)
def test_bad_models(section, keys, message):
    with pytest.raises(ModelError, match=message):
        load_model(section(**keys))


def test_bad_folders(tmp_path, section):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(section(id=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="library: transformers"):
        load_model(section(id=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        load_model(section(id=str(tmp_path)))
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="checkpoint_path"):
        load_model(section(id=str(file)))


@pytest.mark.parametrize("name", [f"{TINY}.r160_in1k", "timm/some_model"])
def test_hub_that_is_not_reached(section, name):
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        load_model(section(id=name))


@pytest.mark.parametrize("name", ["hf-hub:me/tiny", "me/tiny"])
def test_hub_id_from_the_cache(folder, section, in_cache, card, name):
    in_cache(folder[0], "me/tiny", card)
    loaded = load_model(section(id=name))
    assert loaded.base_model == "me/tiny"
    assert loaded.base_revision == "0123456789abcdef0123456789abcdef01234567"
    assert loaded.card == {"license": "mit", "language": "en", "pipeline_tag": "fill-mask"}
    images = example_inputs(loaded)[0]
    assert_close(loaded.model(images), folder[1](images), relative=0)


def test_snapshot_in_the_cache_keeps_its_hub_id(folder, section, in_cache):
    loaded = load_model(section(id=str(in_cache(folder[0], "me/tiny"))))
    assert (loaded.base_model, loaded.base_revision[:4]) == ("me/tiny", "0123")
    assert loaded.card == {}


def test_unreadable_card_is_said(folder, in_cache, caplog):
    in_cache(folder[0], "me/tiny")
    assert origin_on_hub("me/tiny", None).card == {}
    assert "card of me/tiny is not readable" in caplog.text
