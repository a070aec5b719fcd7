"""Every family: cut by hand, saved, loaded by each loader; same output, no other bytes."""

import json

import pytest
import timm
import torch
import transformers

import sosp_hub
from sosp_hub.checkpoint.format.headers import read_tensors
from sosp_hub.checkpoint.inputs import made_up_inputs
from tests.checkpoint import cuts
from tests.compare import assert_close

pytestmark = pytest.mark.slow

AUTO = {
    "ForCausalLM": transformers.AutoModelForCausalLM,
    "LMHeadModel": transformers.AutoModelForCausalLM,
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForImageClassification": transformers.AutoModelForImageClassification,
    "T5ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
    "WhisperForConditionalGeneration": transformers.AutoModelForSpeechSeq2Seq,
    "CLIPModel": transformers.AutoModel,
}


def output(model, inputs):
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if isinstance(result, torch.Tensor):
        return result
    return next(
        result[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in result
    )


def assert_holds_only(folder, model):
    """The weight file is the model's live tensors and its header."""
    live = {id(p): p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())}
    file = folder / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert header < file.stat().st_size <= sum(live.values()) + header
    assert (
        sum(each.num_bytes for each in read_tensors(folder).values())
        == file.stat().st_size - header
    )


@pytest.mark.parametrize("family", cuts.FAMILIES)
def test_transformers_family_loads_everywhere(family, tmp_path):
    model = cuts.pruned(family)
    inputs = made_up_inputs(model)
    expected = output(model, inputs)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    assert "sosp_hub" in json.loads((folder / "config.json").read_text())
    assert_holds_only(folder, model)

    auto = next(auto for name, auto in AUTO.items() if type(model).__name__.endswith(name))
    for loaded in (
        sosp_hub.from_pretrained(folder),
        type(model).from_pretrained(folder),
        auto.from_pretrained(folder),
    ):
        assert type(loaded) is type(model)
        assert_close(output(loaded, inputs), expected, relative=1e-6)

    base = transformers.AutoModel.from_pretrained(folder)
    prefix = model.base_model_prefix
    for name, tensor in (getattr(model, prefix, model)).state_dict().items():
        if name in base.state_dict():
            assert_close(base.state_dict()[name], tensor, relative=0, what=name)

    built = auto.from_config(transformers.AutoConfig.from_pretrained(folder))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes


@pytest.mark.parametrize("name", cuts.TIMM)
def test_timm_family_loads_everywhere(name, tmp_path):
    model = cuts.pruned_timm(name)
    if name in cuts._SMALLER and not hasattr(model, "_model_args"):
        pytest.skip("this timm does not keep the arguments that a model was built with")
    inputs = made_up_inputs(model)
    expected = output(model, inputs)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "sosp_hub_pruned"
    assert "num_classes" not in config["model_args"]
    assert_holds_only(folder, model)
    for loaded in (
        sosp_hub.from_pretrained(folder),
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
    ):
        assert type(loaded) is type(model)
        assert_close(output(loaded, inputs), expected, relative=1e-6)


def test_every_family_differs_from_its_skeleton():
    """The hand-made cuts of this file do cut, and differently from layer to layer."""
    for family, (cls, config, _) in cuts.FAMILIES.items():
        dense = sum(p.numel() for p in cls(config).parameters())
        assert sum(p.numel() for p in cuts.pruned(family).parameters()) < dense, family
