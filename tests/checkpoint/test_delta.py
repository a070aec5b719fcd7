"""Each part of a delta by itself: found, written, read, applied."""

import copy
import dataclasses
import pickle  # noqa: TID251 - models are handed to other processes this way

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import sosp_hub
from sosp_hub.checkpoint.format import schema
from sosp_hub.checkpoint.format.delta import apply_section, diff
from sosp_hub.checkpoint.format.record import Section
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.errors import CheckpointError
from sosp_hub.plan import PruningPlan
from tests.bench import tiny
from tests.checkpoint import cuts
from tests.checkpoint.mutations import RECORD
from tests.checkpoint.test_families import output
from tests.compare import assert_close

TOKENS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self, width=8):
        super().__init__()
        self.width, self.scale, self.window = width, 0.5, (4, 4)
        self.first = nn.Linear(4, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
        self.table = nn.Parameter(torch.randn(3, width))
        self.register_buffer("steps", torch.arange(float(width)), persistent=False)
        self.extra = nn.Linear(width, width)


def carried(model):
    """What a skeleton becomes by the delta of `model`, and the delta."""
    section = diff(Net(), model)
    skeleton = Net()
    apply_section(skeleton, section, "base")
    assert diff(skeleton, model).empty
    return skeleton, section


def test_nothing_to_say():
    assert diff(Net(), Net()) == Section("Net")


def test_shapes_that_follow_from_attributes_are_not_listed():
    model = Net()
    cuts.keep(model.first, out=torch.arange(5))
    assert carried(model)[1] == Section("Net", modules={"first": {"out_features": 5}})


def test_other_tensors_are_listed_with_the_sizes_that_differ():
    model = Net()
    model.table = nn.Parameter(torch.zeros(3, 6))
    section = carried(model)[1]
    assert section.tensors == {"table": (None, 6)}
    taller = Net()  # the same delta fits a skeleton with another number of rows
    taller.table = nn.Parameter(torch.zeros(5, 8))
    apply_section(taller, section, "base")
    assert taller.table.shape == (5, 6)


def test_sizes_grow_no_further_than_the_section_declares():
    model = Net()
    model.table = nn.Parameter(torch.zeros(5, 6))
    skeleton, section = carried(model)
    assert section == Section("Net", tensors={"table": (5, 6)}, growth=2)
    assert skeleton.table[3:].abs().max() == 0
    with pytest.raises(CheckpointError, match=r"base.tensors\['table'\].*\[5, 6\].*\[3, 8\]"):
        apply_section(Net(), dataclasses.replace(section, growth=1), "base")


def test_numbers_of_every_kind():
    model = Net()
    model.width, model.scale, model.window = 7, 0.25, (2, 4)
    skeleton, section = carried(model)
    assert section.modules == {"": {"width": 7, "scale": 0.25, "window": (2, 4)}}
    assert (skeleton.width, skeleton.scale, skeleton.window) == (7, 0.25, (2, 4))


def test_what_a_run_leaves_behind_is_no_difference():
    model = Net().train()
    model.dropout, model.cache = nn.Dropout(0.1), {"a": 1}
    skeleton = Net().eval()
    skeleton.dropout = nn.Dropout(0.5)
    assert diff(skeleton, model).empty


def test_a_bias_that_compensates():
    model = Net()
    model.first.bias = nn.Parameter(torch.ones(8))
    skeleton, section = carried(model)
    assert section == Section("Net", biases=("first",))
    assert skeleton.first.bias.shape == (8,)


def test_last_modules_of_a_list_and_optional_children_can_go():
    model = Net()
    del model.blocks[2]
    model.extra = None
    skeleton, section = carried(model)
    assert sorted(section.dropped) == ["blocks.2", "extra"]
    assert len(skeleton.blocks) == 2
    assert skeleton.extra is None


def test_a_module_in_the_middle_of_a_list_cannot_go():
    """Those behind it would move up, and their weights have other names."""
    model = Net()
    del model.blocks[2]
    _, section = carried(model)
    damaged = dataclasses.replace(section, dropped=("blocks.0",))
    with pytest.raises(CheckpointError, match="of 'blocks' only the last modules can go"):
        apply_section(Net(), damaged, "sosp_hub.base")


def test_leading_slices_stay():
    model, skeleton = Net(), Net()
    cuts.keep(model.first, out=torch.arange(2, 7))
    before = skeleton.first.weight.detach().clone()
    apply_section(skeleton, diff(Net(), model), "base")
    assert_close(skeleton.first.weight, before[:5], relative=0)


def test_shared_modules_and_parameters_stay_shared():
    def build():
        net = Net()
        net.again = net.first
        net.tied = nn.Linear(4, 8, bias=False)
        net.tied.weight = net.first.weight
        return net

    model = build()
    cuts.keep(model.first, out=torch.arange(5))
    model.tied.weight, model.tied.out_features = model.first.weight, 5
    skeleton = build()
    apply_section(skeleton, diff(build(), model), "base")
    assert skeleton.again is skeleton.first
    assert skeleton.tied.weight is skeleton.first.weight
    assert skeleton.first.weight.shape == (5, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "table", nn.Parameter(torch.zeros(3, 33))), "1 to 4 times"),
        (lambda m: setattr(m, "table", nn.Parameter(torch.zeros(24))), "1 to 4 times"),
        (lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(1))), "'more' is not in"),
        (lambda m: m.register_parameter("table", None), "'table' is missing"),
        (lambda m: m.add_module("more", nn.Linear(1, 1)), "'more' is not in"),
        (lambda m: setattr(m, "first", nn.Conv1d(4, 8, 1)), "'first' is a Conv1d"),
        (lambda m: setattr(m.first, "bias", nn.Parameter(torch.zeros(9))), r"first\.bias"),
    ],
)
def test_what_the_format_cannot_say_is_refused(change, words):
    model = Net()
    change(model)
    with pytest.raises(CheckpointError, match=words):
        diff(Net(), model)


@pytest.mark.slow
def test_a_backbone_with_a_config_of_its_own_kind_is_no_base_model(tmp_path):
    """Its class does not see the delta, which stands in the config of the whole model."""
    model, inputs, _ = tiny.built("Tipsv2DptForSemanticSegmentation")
    assert model.base_model_prefix == "backbone"
    graph = sosp_hub.trace(model, inputs, "logits")
    name = "backbone.encoder.layer.0.mlp.fc1:neuron"
    plan = PruningPlan({name: tuple(range(9))}, {name: graph.groups[name].size})
    pruned = sosp_hub.apply(model, graph, plan, verify="fast")
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(pruned, tmp_path / "cut"))
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, pruned(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1])
def test_a_cut_buffer_that_transformers_fills_by_the_config_is_stored(kept, tmp_path):
    """Swin V2's bias of positions with one of its two coordinates; its class makes both."""
    config = transformers.Swinv2Config(
        image_size=16, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=2
    )
    model, images = (
        transformers.Swinv2ForImageClassification(config).eval(),
        torch.rand(2, 3, 16, 16),
    )
    graph = sosp_hub.trace(model, {"pixel_values": images}, "logits")
    (name,) = (
        name
        for name, group in graph.groups.items()
        if any(member.tensor.endswith("coords_table") for member in group.members)
    )
    pruned = sosp_hub.apply(model, graph, PruningPlan({name: (kept,)}, {name: 2}))
    with torch.no_grad():
        expected = pruned(images).logits
        loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(pruned, tmp_path / "cut"))
        assert_close(loaded(images).logits, expected)


def test_buffers_that_cannot_be_recomputed_are_stored(tmp_path):
    model = cuts.pruned("llama")
    model.model.rotary_emb.inv_freq.mul_(0.5)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    assert "model.rotary_emb.inv_freq" in load_file(folder / "model.safetensors")
    for loaded in (
        sosp_hub.from_pretrained(folder),
        transformers.AutoModelForCausalLM.from_pretrained(folder),
    ):
        assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, relative=0)
        assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)


def test_biases_and_dropped_blocks_through_files(tmp_path):
    model = cuts.pruned("llama")
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.randn(32))
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(model, tmp_path / "llama"))
    assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)
    model = timm.create_model("cifar_resnet20").eval()
    del model.layer1[2]
    loaded = sosp_hub.from_pretrained(sosp_hub.save_pretrained(model, tmp_path / "resnet"))
    x = torch.randn(2, 3, 32, 32)
    assert_close(output(loaded, (x,)), output(model, (x,)), relative=1e-6)


def test_fewer_layers_are_a_plain_config(tmp_path):
    cls, config, _ = cuts.FAMILIES["llama"]
    for model, native in ((cls(config).eval(), True), (cuts.pruned("llama"), False)):
        del model.model.layers[2]
        folder = sosp_hub.save_pretrained(model, tmp_path / "llama")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert len(loaded.model.layers) == 2
        assert hasattr(loaded.config, "sosp_hub") != native
        assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)


def test_a_loaded_model_can_be_pickled(tmp_path):
    loaded = sosp_hub.from_pretrained(
        sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "m")
    )
    again = pickle.loads(pickle.dumps(loaded))
    assert_close(output(again, TOKENS), output(loaded, TOKENS), relative=0)


def test_older_records_are_migrated(monkeypatch):
    """As if there had been a version 0 that called modules `attributes`."""

    def rename(old):
        base = {
            ("modules" if key == "attributes" else key): value for key, value in old["base"].items()
        }
        return {**old, "schema_version": 2, "base": base}

    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(schema._MIGRATIONS, 1, rename)
    old = copy.deepcopy(RECORD)
    old["base"]["attributes"] = old["base"].pop("modules")
    assert parse_delta(old).base == parse_delta({**RECORD, "schema_version": 2}).base
