import shutil

import pytest
import torch
from PIL import Image

from sosp_hub.data.source import DataInfo
from sosp_hub.errors import DataError, HubError, ModelError
from sosp_hub.recipe.training import DenseTrainSection
from sosp_hub.zoo.load import example_inputs, load_model
from tests.compare import assert_close

CLASSES, CAUSAL, IMAGES = "text-classification", "causal-lm", "image-classification"
TRAIN = DenseTrainSection(epochs=1)
THREE = DataInfo(num_labels=3, class_names=("ant", "bee", "cat"))


@pytest.fixture
def load(section):
    def do(folder, task, data=None, **keys):
        return load_model(section("transformers", task, id=str(folder), **keys), data=data)

    return do


@pytest.mark.parametrize("with_own", [False, True])
def test_the_processor_that_is_saved_does_what_the_run_did(save, load, with_own):
    """Weights from random, trained with the data's statistics, come back with these."""
    folder, _ = save("ViTForImageClassification", num_labels=3)
    if with_own:
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    data = DataInfo(num_labels=3, image_shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    first = load(folder, IMAGES, data, pretrained=False)
    first.model.save_pretrained(folder)
    first.image_processor.save_pretrained(folder)
    second = load(folder, IMAGES, data)
    for name in ("shape", "mean", "std", "interpolation"):
        assert getattr(second.processor, name) == getattr(first.processor, name), name
    image = Image.new("RGB", (8, 8), (10, 100, 200))
    one, other = (loaded.processor.transform(False)(image) for loaded in (first, second))
    assert_close(other, one, relative=1e-6)


def test_language_model(save, load):
    folder, model = save("LlamaForCausalLM")
    loaded = load(folder, CAUSAL)
    inputs = example_inputs(loaded)
    assert inputs["input_ids"].shape == (2, 16)
    assert inputs["use_cache"] is False
    output = loaded.model(**inputs)
    assert output.past_key_values is None
    assert_close(output.logits, model(**inputs).logits, relative=0)
    assert (loaded.num_labels, loaded.new_head, loaded.base_model) == (None, False, None)
    assert loaded.tokenizer.encode("good") == [2, 4, 3]
    assert loaded.processor.max_positions == 40


def test_encoder_without_a_head_gets_one(save, load, caplog):
    folder, encoder = save("BertModel")
    with caplog.at_level("INFO", "sosp_hub"):
        loaded = load(folder, CLASSES, THREE, train=TRAIN)
    assert "new head with 3 outputs" in caplog.text
    assert (loaded.num_labels, loaded.new_head) == (3, True)
    assert loaded.model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    weight = encoder.encoder.layer[1].output.dense.weight
    assert_close(loaded.model.bert.encoder.layer[1].output.dense.weight, weight, relative=0)
    assert loaded.model(**example_inputs(loaded)).logits.shape == (2, 3)
    assert loaded.processor.max_positions == 24


@pytest.mark.parametrize(("names", "order"), [(None, None), (("bee", "cat", "ant"), (2, 0, 1))])
def test_head_that_fits(save, load, names, order):
    labels = {} if names is None else {"id2label": dict(enumerate(names))}
    folder, model = save("BertForSequenceClassification", num_labels=3, **labels)
    loaded = load(folder, CLASSES, THREE)
    assert (loaded.num_labels, loaded.new_head) == (3, False)
    assert loaded.processor.label_order == order
    named = dict(enumerate(names or THREE.class_names))  # LABEL_0 says nothing
    assert loaded.model.config.id2label == named
    assert_close(loaded.model.classifier.weight, model.classifier.weight, relative=0)


def test_numbers_are_no_names_for_outputs(save, load):
    folder, _ = save("BertForSequenceClassification", num_labels=3)
    loaded = load(folder, CLASSES, DataInfo(num_labels=3, class_names=("0", "1", "2")))
    assert loaded.model.config.id2label == {i: f"LABEL_{i}" for i in range(3)}


def test_head_that_does_not_fit(save, load):
    folder, model = save("BertForSequenceClassification", num_labels=4)
    with pytest.raises(DataError, match="has 4 outputs, but the data has 3 labels"):
        load(folder, CLASSES, THREE)
    loaded = load(folder, CLASSES, THREE, num_labels=3)
    assert loaded.model.classifier.weight.shape == (3, 16)
    assert loaded.new_head
    assert_close(loaded.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight, relative=0)


def test_decoder_that_classifies_can_pad(save, load):
    folder, _ = save("LlamaModel")
    loaded = load(folder, CLASSES, THREE, train=TRAIN)
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 0
    assert loaded.model(**example_inputs(loaded)).logits.shape == (2, 3)


def test_random_weights_and_config_keys(save, load):
    folder, _ = save("LlamaForCausalLM")
    (folder / "model.safetensors").unlink()
    loaded = load(folder, CAUSAL, pretrained=False, kwargs={"num_hidden_layers": 3})
    assert len(loaded.model.model.layers) == 3
    with pytest.raises(ModelError, match="no 'num_hiden_layers'; did you mean 'num_hidden_layers'"):
        load(folder, CAUSAL, pretrained=False, kwargs={"num_hiden_layers": 3})


def test_images_with_and_without_a_processor(save, load):
    from transformers import ViTImageProcessor

    folder, _ = save("ViTForImageClassification", num_labels=3)
    plain = load(folder, IMAGES, THREE)
    assert plain.processor.key == "pixel_values"
    assert plain.processor.shape == (3, 8, 8)
    assert plain.model(**example_inputs(plain)).logits.shape == (2, 3)
    own = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3])
    own.save_pretrained(folder)
    loaded = load(folder, IMAGES, THREE)
    assert loaded.processor.mean == (0.1, 0.2, 0.3)
    image = Image.new("RGB", (20, 30), (10, 200, 30))
    expected = own(images=image, return_tensors="pt")["pixel_values"][0]
    assert_close(loaded.processor.transform(False)(image), expected)
    assert loaded.processor.transform(True)(image).shape == (3, 8, 8)
    assert plain.processor.transform(False)(image).shape == (3, 8, 8)
    assert type(loaded.image_processor) is type(own)


@pytest.mark.parametrize(
    ("kind", "side"),
    [("Dinov2ForImageClassification", 16), ("ViTForImageClassification", 8)],
)
def test_images_have_the_size_that_the_processor_makes_where_the_model_takes_it(
    tmp_path, load, kind, side
):
    """DINOv2's config says what its positions were trained with, not what it is used at."""
    import transformers

    cls = getattr(transformers, kind)
    config = cls.config_class(
        image_size=8 if side == 8 else 32,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    cls(config).save_pretrained(tmp_path)
    own = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    own.save_pretrained(tmp_path)
    loaded = load(tmp_path, IMAGES, THREE)
    assert loaded.processor.shape == (3, side, side)
    assert loaded.model(**example_inputs(loaded)).logits.shape == (2, 3)
    image = Image.new("RGB", (20, 30), (10, 200, 30))
    saved = loaded.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert_close(loaded.processor.transform(False)(image), saved)


def test_random_image_model_takes_the_channels_of_the_data(save, load):
    folder, _ = save("ViTForImageClassification")
    data = DataInfo(3, ("a", "b", "c"), (1, 8, 8), (0.3,), (0.2,))
    loaded = load(folder, IMAGES, data, pretrained=False)
    assert (loaded.processor.shape, loaded.processor.mean) == ((1, 8, 8), (0.3,))
    assert loaded.model(**example_inputs(loaded)).logits.shape == (2, 3)


def test_weights_that_are_damaged(save, load):
    folder, _ = save("LlamaForCausalLM")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot load"):
        load(folder, CAUSAL)


def test_weights_that_lack_a_part_are_named(save, load, caplog):
    from safetensors.torch import load_file, save_file

    folder, _ = save("BertForSequenceClassification", num_labels=3)
    weights = load_file(folder / "model.safetensors")
    del weights["bert.pooler.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, CLASSES, THREE)
    assert "lack 1 tensors, which stay random: bert.pooler.dense.weight" in caplog.text


@pytest.mark.parametrize(("kind", "silent"), [("LlamaModel", False), ("LlamaForCausalLM", True)])
def test_a_language_model_without_its_head_is_told(save, load, caplog, kind, silent):
    folder, _ = save(kind)
    load(folder, CAUSAL)
    assert ("which stay random: lm_head.weight" in caplog.text) is not silent


def test_bad_models(tmp_path, save, load):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path, CAUSAL)
    with pytest.raises(ModelError, match="nearest folder that does is"):
        load(tmp_path / "no/where", CAUSAL)
    folder, _ = save("ViTForImageClassification")
    with pytest.raises(ModelError, match="has no vit for text-generation"):
        load(folder, CAUSAL)
    folder, _ = save("BertForMaskedLM", "encoder")
    with pytest.raises(ModelError, match=r"bert looks at later tokens.*text-classification"):
        load(folder, CAUSAL)
    folder, _ = save("BertLMHeadModel", "decoder", is_decoder=True)
    assert load(folder, CAUSAL).model.config.is_decoder
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ModelError, match="library: timm"):
        load(tmp_path, IMAGES)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path, CAUSAL)


def test_hub_that_is_not_reached(load):
    with pytest.raises(HubError, match="path=FOLDER"):
        load("somebody/something", CAUSAL)


def test_hub_id_from_the_cache(save, load, in_cache, card):
    folder, model = save("LlamaForCausalLM")
    in_cache(folder, "me/llama", card)
    loaded = load("me/llama", CAUSAL)
    assert loaded.base_model == "me/llama"
    assert loaded.base_revision == "0123456789abcdef0123456789abcdef01234567"
    assert loaded.card == {"license": "mit", "language": "en", "pipeline_tag": "fill-mask"}
    assert_close(loaded.model.lm_head.weight, model.lm_head.weight, relative=0)


def test_a_trained_head_that_is_replaced_is_told_loudly(save, load, caplog):
    folder, _ = save("BertForSequenceClassification", num_labels=5)
    with caplog.at_level("WARNING", "sosp_hub"):
        load(folder, CLASSES, THREE, train=TRAIN)
    assert "new head with 3 outputs, in place of its trained one with 5" in caplog.text


def test_new_head_is_a_new_pipeline(save, load, card):
    folder, _ = save("BertModel")
    (folder / "README.md").write_text(card)
    loaded = load(folder, CLASSES, THREE, train=TRAIN)
    assert loaded.card == {"license": "mit", "language": "en", "pipeline_tag": CLASSES}


def test_half_precision(save, load):
    loaded = load(save("LlamaForCausalLM")[0], CAUSAL, dtype="bfloat16")
    assert next(loaded.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_weights_that_grow_when_they_are_read_are_told(stored, save, load, caplog):
    """A model in 16 bits became one in 32 without a word: cut to 70 %, its file was 1.4 times."""
    folder, model = save("LlamaForCausalLM")
    model.to(getattr(torch, stored)).save_pretrained(folder)
    load(folder, CAUSAL)
    told = (
        f"is stored in {stored}; it is read, measured and saved in float32, 2 times" in caplog.text
    )
    assert told == (stored != "float32")
    caplog.clear()
    load(folder, CAUSAL, dtype=stored)
    assert "is stored in" not in caplog.text


def test_a_local_copy_of_a_model_that_its_id_names(save, section):
    folder, model = save("LlamaForCausalLM")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    stated = section("transformers", CAUSAL, id="me/llama", path=str(folder), revision="v1")
    loaded = load_model(stated)
    assert (loaded.base_model, loaded.base_revision) == ("me/llama", "v1")
    assert loaded.card["license"] == "mit"
    inputs = example_inputs(loaded)
    assert_close(loaded.model(**inputs).logits, model(**inputs).logits, relative=0)


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere", r"model\.path: .*nowhere.*no such folder"), ("config.json", "no such folder")],
)
def test_a_path_that_is_no_folder(save, section, path, words):
    folder, _ = save("LlamaForCausalLM")
    with pytest.raises(ModelError, match=words):
        load_model(section("transformers", CAUSAL, id="me/llama", path=str(folder / path)))


def test_a_path_that_the_hubs_cache_knows_by_another_name(save, section, tmp_path):
    folder, _ = save("LlamaForCausalLM")
    snapshot = tmp_path / "models--them--other" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    with pytest.raises(ModelError, match=r"them/other.*model\.id: them/other"):
        load_model(section("transformers", CAUSAL, id="me/llama", path=str(snapshot)))
