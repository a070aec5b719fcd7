"""Checkpoints without a delta: what the files do not hold is never made up."""

import contextlib
import copy
import json
import re

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub.errors import BudgetError, CheckpointError
from sosp_hub.plan import PruningPlan
from tests.checkpoint import cuts
from tests.compare import assert_close

WEIGHTS = "model.safetensors"


def uniform_llama():
    """A Llama cut to the same width everywhere, which a plain config describes."""
    cls, config, _ = cuts.FAMILIES["llama"]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).eval()
    for layer in model.model.layers:
        cuts.mlp(
            layer.mlp,
            ["gate_proj", "up_proj"],
            "down_proj",
            share=0.5,
            attribute="intermediate_size",
        )
    return model


MAKERS = {
    "llama": uniform_llama,
    "bert": lambda: cuts.FAMILIES["bert"][0](copy.deepcopy(cuts.FAMILIES["bert"][1])),
    "timm": lambda: timm.create_model("test_vit", num_classes=7),
}
GONE = {
    "llama": "model.layers.1.mlp.gate_proj.weight",
    "bert": "classifier.bias",
    "timm": "blocks.0.norm1.bias",
}
SAME_SHAPE = {
    "llama": "model.norm.weight",
    "bert": "bert.pooler.dense.bias",
    "timm": "norm.weight",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    for name, make in MAKERS.items():
        config = json.loads(
            (sosp_hub.save_pretrained(make(), root / name) / "config.json").read_text()
        )
        assert "sosp_hub" not in json.dumps(config)
    return root


def changed(folder, tmp_path, change):
    """A copy of a folder whose tensors went through a function."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_tensor_is_refused(name, folders, tmp_path):
    folder = changed(folders / name, tmp_path, lambda tensors: tensors.pop(GONE[name]))
    with pytest.raises(CheckpointError, match=re.escape(GONE[name])):
        sosp_hub.from_pretrained(folder)


@pytest.mark.parametrize("name", MAKERS)
def test_a_tensor_left_over_is_refused(name, folders, tmp_path):
    folder = changed(folders / name, tmp_path, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="extra"):
        sosp_hub.from_pretrained(folder)


@pytest.mark.parametrize("name", MAKERS)
def test_a_tensor_of_another_shape_is_refused(name, folders, tmp_path):
    other = SAME_SHAPE[name]
    folder = changed(
        folders / name, tmp_path, lambda tensors: tensors.update({other: torch.zeros(3)})
    )
    with pytest.raises(CheckpointError, match=re.escape(other)):
        sosp_hub.from_pretrained(folder)


def test_layers_that_the_config_does_not_count_are_refused(folders, tmp_path):
    folder = changed(folders / "llama", tmp_path, lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    for options in ({}, {"model_class": transformers.LlamaForCausalLM}):
        with pytest.raises(CheckpointError, match=r"unexpected tensors: model\.layers\.2"):
            sosp_hub.from_pretrained(folder, **options)


def test_a_head_may_be_new_where_it_is_asked_for(folders, tmp_path):
    """Another class may add its head and leave the old one out, never a tensor of the body."""
    body = load_file(folders / "bert" / WEIGHTS)
    other = sosp_hub.from_pretrained(
        folders / "bert", model_class=transformers.BertForQuestionAnswering
    )
    assert other.qa_outputs.weight.shape == (3, 32)
    for name, tensor in other.bert.state_dict().items():
        assert_close(tensor, body[f"bert.{name}"], relative=0, what=name)
    missing = changed(
        folders / "bert", tmp_path, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias")
    )
    with pytest.raises(CheckpointError, match=r"missing tensors: bert\.embeddings\.LayerNorm"):
        sosp_hub.from_pretrained(missing, model_class=transformers.BertForQuestionAnswering)


def test_the_refusal_says_how_to_ask_for_a_head(folders, tmp_path):
    def without_head(tensors):
        del tensors["classifier.weight"], tensors["classifier.bias"]

    folder = changed(folders / "bert", tmp_path, without_head)
    with pytest.raises(CheckpointError, match="model_class="):
        sosp_hub.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="missing tensors: classifier"):  # no other class
        sosp_hub.from_pretrained(folder, model_class=transformers.BertForSequenceClassification)


def test_a_part_that_the_class_lacks_is_left_out_only_if_asked(folders, tmp_path):
    folder = changed(folders / "bert", tmp_path, lambda _: None)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"architectures": ["BertModel"]}))
    with pytest.raises(CheckpointError, match="model_class=BertModel leaves these parts out"):
        sosp_hub.from_pretrained(folder)
    model = sosp_hub.from_pretrained(folder, model_class=transformers.BertModel)
    assert_close(
        model.pooler.dense.weight,
        load_file(folder / WEIGHTS)["bert.pooler.dense.weight"],
        relative=0,
    )


def test_timm_files_are_compared_with_their_config_whatever_else_is_asked(folders, tmp_path):
    """An argument that leaves the head alone must not let a made-up head pass."""
    folder = changed(folders / "timm", tmp_path, lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["num_classes"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    for options in ({}, {"drop_rate": 0.1}):
        with pytest.raises(CheckpointError, match=r"head\.(weight|bias)"):
            sosp_hub.from_pretrained(folder, **options)
    asked = sosp_hub.from_pretrained(folders / "timm", num_classes=3)
    assert asked.num_classes == 3


# --------------------------------------------------------------------------------------- uniform


def cut_uniformly(cls, config, kept_heads):
    """A model of which every attention keeps so many of its heads, as ``uniform=True`` does."""
    torch.manual_seed(0)
    model = cls(config).eval()
    graph = sosp_hub.trace(model, {"input_ids": TOKENS, "use_cache": False})
    names = [name for name, group in graph.groups.items() if group.kind == "head"]
    assert len(names) == 3
    kept = {name: tuple(range(kept_heads)) for name in names}
    sizes = {name: graph.groups[name].size for name in names}
    plan = PruningPlan(kept, sizes, provenance={"uniform": True})
    return sosp_hub.apply(model, graph, plan), plan


TOKENS = torch.arange(3, 13).reshape(2, 5)
FIVE = {**cuts.GQA, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "is_plain"), [(4, True), (3, False), (2, True)])
def test_a_uniform_cut_that_needs_a_delta_is_said(kept, is_plain, tmp_path, caplog):
    """Llama's config wants heads that divide the hidden size."""
    config = transformers.LlamaConfig(**FIVE)
    model, plan = cut_uniformly(transformers.LlamaForCausalLM, config, kept)
    said_by_apply = caplog.text
    caplog.clear()
    report = {"plan": json.loads(plan.to_json())}
    folder = sosp_hub.save_pretrained(model, tmp_path / "small", report=report)
    assert ("sosp_hub" not in json.loads((folder / "config.json").read_text())) == is_plain
    for said in (said_by_apply, caplog.text):
        if is_plain:
            assert "uniform" not in said
        else:
            assert "LlamaConfig refuses num_attention_heads=3" in said
            assert "it takes 1, 2, 4, 5." in said
    caplog.clear()
    sosp_hub.save_pretrained(model, tmp_path / "small")  # nobody asked
    assert "uniform" not in caplog.text


HEADS = ("head", "kv_group")
PLAIN = {
    "heads that divide the width": (HEADS, FIVE),
    "queries of shared heads": (HEADS, {"num_attention_heads": 12, "num_key_value_heads": 2}),
    "more shared heads": (
        (*HEADS, "residual"), {"num_attention_heads": 12, "num_key_value_heads": 6},
    ),
    "an explicit width of heads": ((*HEADS, "residual"), {**FIVE, "head_dim": 6}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_a_uniform_cut_keeps_numbers_that_a_plain_config_can_say(name, tmp_path, caplog):
    kinds, changes = PLAIN[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**cuts.GQA, **changes, "hidden_size": changes.get("hidden_size", 48)}
    )
    model = transformers.LlamaForCausalLM(config).eval()
    graph = sosp_hub.trace(model, {"input_ids": TOKENS, "use_cache": False}, "logits")
    saliency = sosp_hub.score(model, graph, [], criterion="random")
    how = {"kinds": kinds, "uniform": True}
    plans = []
    for share in (0.8, 0.5):
        with contextlib.suppress(BudgetError):  # heads alone are not half of the model
            plans.append(sosp_hub.allocate(graph, saliency, params=share, **how))
    for number, plan in enumerate(plans):
        pruned = sosp_hub.apply(model, graph, plan, "fast")
        folder = sosp_hub.save_pretrained(pruned, tmp_path / str(number))
        assert "sosp_hub" not in json.loads((folder / "config.json").read_text())
    assert plans
    assert "uniform" not in caplog.text


@pytest.mark.slow
def test_configs_inside_a_config_are_asked_too(caplog):
    """Of a vision-language model: the text model's heads divide its hidden size."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "intermediate_size": 32}
    text = {**FIVE, **layers, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    vision = {"hidden_size": 24, "num_attention_heads": 3, "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, **layers),
        text_config=transformers.LlamaConfig(**text), image_token_id=3, vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tokens = {"input_ids": torch.tensor([[3] * 4 + [5, 6]]), "use_cache": False}
    graph = sosp_hub.trace(model, {**tokens, "pixel_values": torch.randn(1, 3, 16, 16)})
    names = [name for name, group in graph.groups.items() if group.kind == "head"]
    text_heads = [name for name in names if "language_model" in name]
    assert len(names) == 2 * len(text_heads) == 4
    scores = {name: torch.rand(graph.groups[name].size) for name in text_heads}
    counts = []
    for share in (0.9, 0.84, 0.7, 0.5, 0.2):
        plan = sosp_hub.allocate(graph, scores, structures=share, uniform=True, kinds=("head",))
        counts += {plan.num_kept().get(name, 6) for name in text_heads}
    assert counts == [4, 4, 4, 3, 1]
    sosp_hub.apply(model, graph, plan)
    assert "does not run on inputs that its config tells" in caplog.text


@pytest.mark.slow
def test_a_uniform_cut_of_heads_that_no_config_can_say_is_said(caplog):
    cls, config, _ = cuts.FAMILIES["bert"]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).eval()
    graph = sosp_hub.trace(model, {"input_ids": TOKENS})
    heads = [name for name, group in graph.groups.items() if group.kind == "head"]
    plan = PruningPlan(
        dict.fromkeys(heads, (0, 1)), dict.fromkeys(heads, 4), provenance={"uniform": True}
    )
    sosp_hub.apply(model, graph, plan)
    assert "uniform=True was asked, but no plain config describes the model" in caplog.text


def test_a_plain_config_that_builds_another_function_is_none(tmp_path):
    """Its shapes are right; what it computes is not what the model does."""
    model = uniform_llama()
    folder = sosp_hub.save_pretrained(model, tmp_path / "plain")
    assert "sosp_hub" not in json.loads((folder / "config.json").read_text())
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(CheckpointError, match="computes something else"):
        sosp_hub.save_pretrained(model, tmp_path / "other")


def test_a_config_that_a_model_refuses_by_an_assertion_is_no_native_one(tmp_path):
    """SqueezeBERT asserts that two numbers agree; a width that is only one of them was tried."""
    config = transformers.SqueezeBertConfig(
        vocab_size=32,
        hidden_size=32,
        embedding_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = transformers.SqueezeBertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.arange(8)[None]}
    graph = sosp_hub.trace(model, inputs)
    saliency = sosp_hub.score(model, graph, [], "magnitude", kinds=["neuron"])
    pruned = sosp_hub.apply(model, graph, sosp_hub.allocate(graph, saliency, params=0.97))
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(pruned, tmp_path / "small"))
    assert_close(loaded(**inputs).logits, pruned(**inputs).logits, relative=1e-6)
