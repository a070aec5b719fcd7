"""Models cut by the structure engine: non-uniform, uniform, and through the residual stream."""

import copy
import json

import pytest
import timm
import torch
import transformers

import sosp_hub
from sosp_hub.allocation import allocate
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.checkpoint import cuts
from tests.checkpoint.test_families import output
from tests.compare import assert_close

pytestmark = pytest.mark.slow


def cut(name, *, residual=False, **budget):
    """A model and its inputs, cut by random saliency to 70 % of its parameters."""
    torch.manual_seed(0)
    if name in cuts.FAMILIES:
        cls, config, _ = cuts.FAMILIES[name]
        model = cls(copy.deepcopy(config)).eval()
    else:
        model = timm.create_model(name, num_classes=7).eval()
    inputs = made_up_inputs(model)
    if model.__class__.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        inputs["use_cache"] = False
    graph = trace(model, inputs)
    saliency = {
        key: torch.rand(group.size)
        for key, group in graph.groups.items()
        if (group.kind == "residual") == residual
    }
    if residual:
        budget["kinds"] = ("residual",)
    return apply(model, graph, allocate(graph, saliency, params=0.7, **budget)), inputs


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "bert", "t5", "vit", "mamba", "test_resnet", "test_vit", "cifar_resnet20"],
)
def test_cut_model_loads_again(name, tmp_path):
    model, inputs = cut(name)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "test_vit"])
def test_cut_of_the_residual_stream_loads_again(name, tmp_path):
    model, inputs = cut(name, residual=True)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "t5"])
def test_uniform_cut_needs_no_delta(name, tmp_path):
    model, inputs = cut(name, uniform=True)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    assert "sosp_hub" not in json.loads((folder / "config.json").read_text())
    sosp_hub.disable()
    try:
        loaded = type(model).from_pretrained(folder)
    finally:
        sosp_hub.enable()
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-6)


def test_config_whose_numbers_are_values_keeps_its_delta(tmp_path):
    """Gemma scales its embeddings by a root of the width it had; a plain config changes that."""
    model, inputs = cut("gemma", residual=True, uniform=True)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    assert "sosp_hub" in json.loads((folder / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-6)


def test_pruned_twice_with_a_save_between(tmp_path):
    model, inputs = cut("llama")
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(model, tmp_path / "once"))
    graph = trace(loaded, inputs)
    saliency = {
        key: torch.rand(group.size) for key, group in graph.groups.items() if group.kind == "neuron"
    }
    smaller = apply(loaded, graph, allocate(graph, saliency, params=0.8))
    again = sosp_hub.from_pretrained(sosp_hub.save_pretrained(smaller, tmp_path / "twice"))
    assert_close(output(again, inputs), output(smaller, inputs), relative=1e-6)
