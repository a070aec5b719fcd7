"""What people do with a loaded model: devices, half precision, generation, training, pruning."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.checkpoint.transformers.save import attach
from sosp_hub.errors import CheckpointError
from tests.checkpoint import cuts
from tests.checkpoint.test_families import output
from tests.compare import assert_close
from tests.structure.oracles import half

pytestmark = pytest.mark.slow

TOKENS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A pruned model and its folder."""
    model = cuts.pruned("llama")
    return model, sosp_hub.save_pretrained(model, tmp_path_factory.mktemp("checkpoint") / "llama")


def test_shards(tmp_path):
    model = cuts.pruned("llama")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for loaded in (
        sosp_hub.from_pretrained(folder),
        transformers.AutoModelForCausalLM.from_pretrained(folder),
    ):
        assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)


def test_shards_timm(tmp_path):
    model = cuts.pruned_timm("test_vit")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()
    x = torch.randn(2, 3, 160, 160)
    for loaded in (
        sosp_hub.from_pretrained(folder),
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        transformers.AutoModelForImageClassification.from_pretrained(folder).timm_model,
    ):
        assert_close(output(loaded, (x,)), output(model, (x,)), relative=1e-6)
    next(iter(folder.glob("model-00002*"))).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_native_timm_checkpoint_is_one_file(tmp_path):
    """Timm itself reads no shards, and is who reads this one."""
    model = timm.create_model("test_vit", num_classes=7)
    folder = sosp_hub.save_pretrained(model, tmp_path / "dense", max_shard_size="100KB")
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_half_precision(tmp_path):
    model = cuts.pruned("llama").to(torch.bfloat16)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert_close(
        output(loaded, TOKENS), output(model, TOKENS), relative=1e-2
    )  # rope tables stay float32
    full = sosp_hub.from_pretrained(folder, dtype=torch.float32)
    assert full.dtype == torch.float32


def test_half_precision_timm(tmp_path):
    model = cuts.pruned_timm("test_resnet").to(torch.bfloat16)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_tied_weights_are_stored_once(tmp_path):
    model = cuts.pruned("qwen2")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = sosp_hub.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    "devices",
    [
        {"": "cpu"},
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
    ],
)
def test_device_map(llama, devices, tmp_path):
    model, folder = llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_generation(llama, cache):
    model, folder = llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    options = {
        "none": {"use_cache": False},
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    ask = {**TOKENS, "attention_mask": torch.ones_like(TOKENS["input_ids"])}
    answers = [
        each.generate(
            **ask,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options[cache],
        )
        for each in (model, loaded)
    ]
    plain = loaded.generate(
        **ask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert answers[0].tolist() == answers[1].tolist() == plain.tolist()


def test_pipeline(tmp_path):
    model = cuts.pruned_timm("test_resnet")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    from PIL import Image

    classify = transformers.pipeline("image-classification", model=str(folder))
    answer = classify(Image.new("RGB", (64, 64), "red"))
    assert len(answer) == 5
    assert type(classify.model.timm_model) is type(model)
    for name, tensor in model.state_dict().items():
        assert_close(classify.model.timm_model.state_dict()[name], tensor, relative=0, what=name)


def test_transformers_knows_the_classes_of_a_timm_model(tmp_path):
    model = cuts.pruned_timm("test_vit")
    names = [f"class {number}" for number in range(model.num_classes)]
    labels = {"label_names": names, "num_classes": model.num_classes}
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | labels
    sosp_hub.save_pretrained(model, tmp_path)
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert wrapper.config.id2label[3] == "class 3"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.pretrained_cfg["label_names"] == names


def test_timm_wrapper_saves_what_loads(tmp_path):
    model = cuts.pruned_timm("test_vit")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    x = torch.randn(2, 3, 160, 160)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert_close(output(wrapped, {"pixel_values": x}), output(model, (x,)), relative=1e-6)
    wrapped.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert_close(output(again, {"pixel_values": x}), output(model, (x,)), relative=1e-6)


def test_shared_weights_of_timm_are_there_under_every_name(tmp_path):
    """timm reads them so."""
    model = cuts.pruned_timm("test_vit")
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    expected = output(model, (torch.ones(1, 3, 160, 160),))
    for loaded in (
        sosp_hub.from_pretrained(folder),
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
    ):
        assert_close(output(loaded, (torch.ones(1, 3, 160, 160),)), expected, relative=1e-6)


def test_what_a_report_says_of_its_base_stays(tmp_path):
    base = {"model": "mine/dense", "revision": None, "license": "mit"}
    folder = sosp_hub.save_pretrained(
        cuts.pruned_timm("test_resnet"), tmp_path / "small", report={"base": base, "task": "a"},
        base_model="other/dense", base_revision="12ab",
    )  # fmt: skip
    record = json.loads((folder / "sosp_report.json").read_text())
    assert record == {"base": {**base, "revision": "12ab"}, "task": "a"}


def test_timm_draws_only_numbers_that_stay(tmp_path):
    """What is read from the file needs none; a head of another size does, and gets them."""
    model = cuts.pruned_timm("test_resnet")
    name = f"local-dir:{sosp_hub.save_pretrained(model, tmp_path / 'small')}"
    before = torch.get_rng_state()
    timm.create_model(name, pretrained=True)
    assert_close(torch.get_rng_state(), before, relative=0)
    torch.manual_seed(1)
    expected = torch.nn.Linear(model.num_features, 400).weight.std()
    head = timm.create_model(name, pretrained=True, num_classes=400).fc.weight
    assert_close(head.std(), expected, relative=0.05)


def test_timm_arguments(tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned_timm("test_resnet"), tmp_path / "small")
    name = f"local-dir:{folder}"
    assert timm.create_model(name, pretrained=True, num_classes=4)(
        torch.zeros(1, 3, 64, 64)
    ).shape == (1, 4)
    assert timm.create_model(name, pretrained=True, in_chans=1)(
        torch.zeros(1, 1, 64, 64)
    ).shape == (1, 7)
    features = timm.create_model(name, pretrained=True, features_only=True)(
        torch.zeros(1, 3, 64, 64)
    )
    assert len(features) == 5
    folder = sosp_hub.save_pretrained(cuts.pruned_timm("test_vit"), tmp_path / "vit")
    larger = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=192)
    assert larger(torch.zeros(1, 3, 192, 192)).shape == (1, 7)


def test_timm_leaves_a_head_out_of_the_features_that_was_cut(tmp_path):
    """As that of an EfficientNet, which is no module of the class that timm builds for features."""
    model, images = timm.create_model("mobilenetv3_small_050").eval(), torch.randn(2, 3, 64, 64)
    graph = sosp_hub.trace(model, (images,))
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    pruned = sosp_hub.apply(model, graph, sosp_hub.allocate(graph, scores, structures=0.7), "fast")
    assert pruned.conv_head.weight.shape != model.conv_head.weight.shape
    folder = sosp_hub.save_pretrained(pruned, tmp_path / "small")
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    expected = pruned.forward_intermediates(images, intermediates_only=True)
    assert_close(features(images), expected, relative=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_models_of_any_number_of_channels(name, tmp_path):
    """1 to 12: saved, loaded by this package and by timm, equal."""
    for channels in range(1, 13):
        model = timm.create_model(name, num_classes=7, in_chans=channels).eval()
        size = model.pretrained_cfg["input_size"][-1]
        x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(channels))
        graph = sosp_hub.trace(model, (x,))
        saliency = sosp_hub.score(model, graph, [], criterion="magnitude")
        plan = sosp_hub.allocate(graph, saliency, structures=0.6)
        pruned = sosp_hub.apply(model, graph, plan, "fast").eval()
        folder = sosp_hub.save_pretrained(pruned, tmp_path / str(channels))
        for loaded in (
            sosp_hub.from_pretrained(folder),
            timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        ):
            assert_close(output(loaded, (x,)), output(pruned, (x,)), relative=1e-6)


def test_timm_announces_the_channels_that_are_left(tmp_path):
    model = timm.create_model("resnet10t").eval()
    kept = torch.arange(100)
    for block in model.layer4:  # the last stage's residual stream
        cuts.keep(block.conv2, out=kept)
        cuts.keep_norm(block.bn2, kept)
        cuts.keep(block.downsample[1], out=kept)
        cuts.keep_norm(block.downsample[2], kept)
    cuts.keep(model.fc, inp=kept)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert loaded.num_features == 100
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    maps = features(torch.zeros(1, 3, 64, 64))
    assert features.feature_info.channels() == [each.shape[1] for each in maps]
    assert features.feature_info.channels()[-1] == 100


def test_other_head_takes_the_same_body(llama):
    model, folder = llama
    other = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert (
        other.model.layers[2].mlp.gate_proj.out_features
        == model.model.layers[2].mlp.gate_proj.out_features
    )
    assert_close(
        other.model.layers[2].mlp.up_proj.weight,
        model.model.layers[2].mlp.up_proj.weight,
        relative=0,
    )


def test_encoder_of_an_encoder_decoder(tmp_path):
    model = cuts.pruned("t5")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    encoder = transformers.T5EncoderModel.from_pretrained(folder)
    expected = model.encoder(**TOKENS).last_hidden_state
    assert_close(encoder(**TOKENS).last_hidden_state, expected, relative=1e-6)


def test_deepcopy(llama):
    model, folder = llama
    loaded = copy.deepcopy(sosp_hub.from_pretrained(folder))
    assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=0)


def test_attention_implementation_reaches_every_layer(llama):
    """Layers with their own copy of the config follow the model, else they misread its masks."""
    _, folder = llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert loaded.model.layers[1].self_attn.config is not loaded.config
    expected = output(loaded, TOKENS)
    loaded.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in loaded.model.layers} == {
        "eager"
    }
    assert_close(output(loaded, TOKENS), expected, relative=1e-5)


def test_second_prune_composes(llama, tmp_path):
    _, folder = llama
    loaded = sosp_hub.from_pretrained(folder)
    for layer in loaded.model.layers:
        cuts.mlp(
            layer.mlp,
            ["gate_proj", "up_proj"],
            "down_proj",
            share=0.5,
            attribute="intermediate_size",
        )
    again = sosp_hub.save_pretrained(loaded, tmp_path / "smaller")
    record = json.loads((again / "config.json").read_text())["sosp_hub"]
    assert record["base"]["modules"]["layers.0.mlp"] == {"intermediate_size": 19}
    assert_close(
        output(sosp_hub.from_pretrained(again), TOKENS), output(loaded, TOKENS), relative=1e-6
    )


def test_second_prune_composes_timm(tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned_timm("test_resnet"), tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    cuts.timm_resnet(loaded)
    x = torch.randn(2, 3, 64, 64)
    again = sosp_hub.from_pretrained(sosp_hub.save_pretrained(loaded, tmp_path / "smaller"))
    assert_close(output(again, (x,)), output(loaded, (x,)), relative=1e-6)


def _trainer(model, folder, steps):
    data = [
        {"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(8)
    ]
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data)


@pytest.mark.filterwarnings("ignore")  # the trainer's own deprecations
def test_trainer_saves_and_resumes(llama, tmp_path):
    _, folder = llama
    straight = sosp_hub.from_pretrained(folder)
    _trainer(straight, tmp_path / "straight", 4).train()
    _trainer(sosp_hub.from_pretrained(folder), tmp_path / "twice", 2).train()
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "twice" / "checkpoint-2"
    )
    assert (
        checkpoint.model.layers[2].mlp.intermediate_size
        == straight.model.layers[2].mlp.intermediate_size
    )
    resumed = sosp_hub.from_pretrained(folder)
    _trainer(resumed, tmp_path / "twice", 4).train(
        resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-2")
    )
    assert_close(output(resumed.eval(), TOKENS), output(straight.eval(), TOKENS), relative=1e-5)


def test_attached_delta_survives_the_librarys_own_save(tmp_path):
    model = cuts.pruned("llama")
    attach(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)


@pytest.mark.filterwarnings("ignore")  # peft asks deprecated properties
def test_lora_on_a_pruned_base(llama, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder = llama
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(sosp_hub.from_pretrained(folder), options).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        sosp_hub.from_pretrained(folder), tmp_path / "adapter"
    ).eval()
    assert_close(output(again, TOKENS), output(tuned, TOKENS), relative=1e-6)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(output(alone, TOKENS), output(tuned, TOKENS), relative=1e-6)
    beside = sosp_hub.from_pretrained(folder)
    beside.load_adapter(str(tmp_path / "adapter"))
    assert_close(output(beside.eval(), TOKENS), output(tuned, TOKENS), relative=1e-6)


CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "of_ones_own"
    vocab_size, width, inner = 20, 8, 16


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.up = nn.Linear(config.width, config.inner)
        self.down = nn.Linear(config.inner, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.down(torch.relu(self.up(self.embed(input_ids)))))
"""


def test_a_model_of_shipped_code_is_loaded_by_the_class_that_its_config_maps(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE)
    mapped = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel"}
    record = {
        "model_type": "of_ones_own",
        "architectures": ["OwnModel"],
        "auto_map": {auto: f"modeling_own.{name}" for auto, name in mapped.items()},
    }
    (folder / "config.json").write_text(json.dumps(record))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = transformers.AutoModelForCausalLM
    auto.from_config(config, trust_remote_code=True).save_pretrained(folder)
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = {"input_ids": torch.arange(10).reshape(2, 5)}
    graph = sosp_hub.trace(model, tokens)
    pruned = sosp_hub.apply(model, graph, half(graph))
    sosp_hub.save_pretrained(pruned, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"pass model_class=, or trust_remote_code=True"):
        sosp_hub.from_pretrained(tmp_path / "small")
    loaded = sosp_hub.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert_close(output(loaded, tokens), output(pruned, tokens), relative=1e-6)


def test_cifar_resnet_loads_by_name(tmp_path):
    model = timm.create_model("cifar_resnet20", num_classes=10).eval()
    folder = sosp_hub.save_pretrained(model, tmp_path / "dense")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "cifar_resnet20"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_close(output(loaded, (x,)), output(model, (x,)), relative=1e-6)


def test_shipped_code_loads_without_the_package(tmp_path):
    model = cuts.pruned("llama")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small", ship_code=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sosp_hub.LlamaForCausalLM"
    assert not any("pydantic" in path.read_text() for path in folder.glob("*.py"))
    code = f"""
import sys, torch, transformers
from safetensors.torch import save_file
for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
    model = auto.from_pretrained({str(folder)!r}, trust_remote_code=True)
    tokens = torch.arange(3, 13).reshape(2, 5)
    last = model(tokens)[0].detach().contiguous()
    save_file({{"last": last}}, {str(tmp_path)!r} + f"/{{auto.__name__}}.safetensors")
assert "sosp_hub" not in sys.modules
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
    logits = load_file(tmp_path / "AutoModelForCausalLM.safetensors")["last"]
    assert_close(logits, output(model, TOKENS), relative=1e-6)
    hidden = load_file(tmp_path / "AutoModel.safetensors")["last"]
    assert_close(hidden, model.model(**TOKENS).last_hidden_state, relative=1e-6)


def test_wrong_class_is_refused(llama):
    _, folder = llama
    with pytest.raises(CheckpointError, match="LlamaModel"):
        transformers.BertModel.from_pretrained(folder, config=_bert_with_delta(folder))


def _bert_with_delta(folder):
    record = json.loads((folder / "config.json").read_text())["sosp_hub"]
    return transformers.BertConfig(**cuts.TEXT, sosp_hub=record)
