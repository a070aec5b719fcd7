"""Forms besides the folder with weights: plans alone, the table of a checkpoint, exports."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub import inspect
from sosp_hub.checkpoint import weightless
from sosp_hub.checkpoint.format import schema
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.errors import CheckpointError
from sosp_hub.inspection.examine import examine
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.targets.writers import forms as export
from sosp_hub.targets.writers.padded import padded
from tests.bench.families import FAMILIES
from tests.checkpoint import cuts
from tests.checkpoint.mutations import RECORD
from tests.checkpoint.test_families import output
from tests.checkpoint.test_hostile import HOSTILE, put
from tests.compare import assert_close
from tests.structure.oracles import fill, half

pytestmark = pytest.mark.slow

SCHEMA = json.loads(
    (Path(sosp_hub.__file__).parent / "checkpoint" / "format" / "delta.schema.json").read_text()
)


# ------------------------------------------------------------------------------------------ schema


def test_the_published_schema_is_what_readers_accept():
    """`python -m sosp_hub.checkpoint.format.schema` writes it again."""
    assert schema.PUBLISHED.read_text() == schema.published_schema()


@pytest.mark.parametrize("family", cuts.FAMILIES)
def test_deltas_meet_the_published_schema(family, tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned(family), tmp_path / "small")
    record = json.loads((folder / "config.json").read_text())["sosp_hub"]
    jsonschema.validate(record, SCHEMA)
    assert parse_delta(record).to_json() == record
    assert len(json.dumps(record)) < 16 * 1024


def test_schema_refuses_what_the_reader_refuses_by_itself():
    """What can be refused without a model, the published schema refuses too, and nothing else."""
    more = {
        "unknown key of a stand-in": (("base", "replaced", "norm"), {"as": "mlp", "code": 1}, ""),
        "a name with a line break": (("base", "dropped"), ["layers.2\n."], ""),
        "a hidden part of a name": (("base", "dropped"), ["layers.__a"], ""),
        "the root's attributes": (("base", "modules", ""), {"width": 3}, ""),
        "the root as a tensor": (("base", "tensors", ""), [3], ""),
        "the root as an attribute": (("base", "modules", "norm"), {"": 3}, ""),
        "nine dimensions": (("base", "tensors", "norm.weight"), [1] * 9, ""),
        "a dimension that is no number": (("base", "tensors", "norm.weight"), ["a"], ""),
        "4097 numbers": (("base", "modules", "norm"), {"a": [1] * 4097}, ""),
        "no numbers": (("base", "modules", "norm"), {"a": []}, ""),
        "a long version": (("library_version",), "1" * 65, ""),
        "a head": (("head",), {"class": "Head"}, ""),
        "a head that is none": (("head",), 3, ""),
        "names that are none": (("base", "biases"), "norm", ""),
        "a share": (("base", "modules", "norm"), {"eps": 0.5}, ""),
        "no layer": (("base", "replaced", "norm"), {"as": "mlp", "layer_idx": None}, ""),
        "layer -1": (("base", "replaced", "norm"), {"as": "mlp", "layer_idx": -1}, ""),
    }
    for case, (path, value, _) in {**HOSTILE, **more}.items():
        record = put(RECORD, path, value)
        try:
            parse_delta(record)
            refused = False
        except CheckpointError:
            refused = True
        if case in ("NaN", "infinity", "10^5000"):
            continue  # no JSON, or none that other readers take
        errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(record))
        assert bool(errors) == refused, case


# -------------------------------------------------------------------------------------- weightless


def test_plan_alone_cuts_its_base_again(tmp_path):
    cls, config, _ = cuts.FAMILIES["llama"]
    dense = cls(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    inputs = {**made_up_inputs(dense), "use_cache": False}
    graph = trace(dense, inputs)
    neurons = [name for name, group in graph.groups.items() if group.kind == "neuron"]
    plan = PruningPlan(
        {name: tuple(range(i, 40)) for i, name in enumerate(neurons)}, dict.fromkeys(neurons, 48)
    )
    expected = output(apply(dense, graph, plan), inputs)
    with pytest.raises(CheckpointError, match="names no base model"):
        weightless.save_plan(plan, tmp_path / "plan")
    plan = dataclasses.replace(plan, base_model=str(tmp_path / "dense"))
    folder = weightless.save_plan(plan, tmp_path / "plan")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4096
    assert examine(folder).tier == "weightless"
    assert_close(output(sosp_hub.from_pretrained(folder), inputs), expected, relative=1e-6)
    assert_close(output(sosp_hub.apply_plan_file(folder, dense), inputs), expected, relative=1e-6)
    (folder / "sosp_plan.json").write_text(
        '{"schema_version": 1, "kept": {"a": [3, 1]}, "sizes": {"a": 4}}'
    )
    with pytest.raises(CheckpointError, match="sorted"):
        sosp_hub.from_pretrained(folder)


@pytest.mark.parametrize("given", [None, "mine"])
def test_a_plan_alone_cuts_the_revision_that_it_was_made_for(given, tmp_path, monkeypatch):
    asked = []

    def stops(path, **kwargs):
        asked.append((path, kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr("sosp_hub.checkpoint.io.from_pretrained", stops)
    plan = PruningPlan({"a": (0,)}, {"a": 2}, base_model="me/llama", base_revision="12ab")
    folder = weightless.save_plan(plan, tmp_path / "plan")
    with pytest.raises(KeyboardInterrupt):
        sosp_hub.apply_plan_file(folder, **({"revision": given} if given else {}))
    assert asked == [("me/llama", {"revision": given or "12ab"})]


# ----------------------------------------------------------------------------------------- inspect


def test_inspect_tells_what_the_model_holds(tmp_path, capsys):
    model = cuts.pruned("llama")
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    assert inspect.main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tier"] == "delta"
    assert found["totals"]["params"] == sum(p.numel() for p in model.parameters())
    assert found["totals"]["bytes"] == 4 * found["totals"]["params"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["model.layers.2.mlp.up_proj"]["shape"] == [19, 32]
    assert layers["model.layers.2.mlp.up_proj"]["dense_shape"] == [48, 32]
    tokens = model.config.max_position_embeddings - 2
    assert layers["model.layers.2.mlp.up_proj"]["macs"] == tokens * 19 * 32
    attention = sum(layer.self_attn.q_proj.out_features for layer in model.model.layers)
    in_layers = sum(layer["macs"] for layer in layers.values())
    assert found["totals"]["macs"] == in_layers + 2 * attention * tokens**2
    whole = sosp_hub.save_pretrained(type(model)(cuts.FAMILIES["llama"][1]), tmp_path / "whole")
    dense = examine(whole).totals
    assert found["totals"]["dense_macs"] == dense["macs"] > found["totals"]["macs"]
    assert inspect.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"({found['totals']['params'] / dense['params']:.0%})" in shown
    assert "19x32 of 48x32" in shown
    assert "config, delta and weights agree" in shown
    assert "vLLM: no" in shown


@pytest.mark.parametrize("family", ["vit", "mixtral", "t5", "qwen2", "clip"])
def test_inspect_finds_no_fault_in_a_sound_checkpoint(family, tmp_path):
    model = cuts.pruned(family)
    found = examine(sosp_hub.save_pretrained(model, tmp_path / "small"))
    assert found.faults == []
    assert found.totals["params"] == sum(p.numel() for p in model.parameters())
    assert found.totals["bytes"] == sum(layer.bytes for layer in found.layers)  # tied ones once


def test_macs_of_experts_count(tmp_path):
    model = cuts.pruned("mixtral")
    found = examine(sosp_hub.save_pretrained(model, tmp_path / "small"))
    tokens = model.config.max_position_embeddings - 2
    experts = {each.name: each for each in found.layers}["model.layers.0.mlp.experts"]
    assert experts.macs == tokens * 2 * 3 * 32 * 40  # experts a token, matrices, sizes


def test_inspect_finds_what_disagrees(tmp_path, capsys):
    folder = sosp_hub.save_pretrained(cuts.pruned_timm("test_resnet"), tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    tensors["layer2.0.conv1.weight"] = tensors["layer2.0.conv1.weight"][1:].clone()
    tensors["extra"] = tensors.pop("fc.bias")
    save_file(tensors, folder / "model.safetensors")
    assert inspect.main([str(folder)]) == 1
    shown = capsys.readouterr().out
    for name in ("layer2.0.conv1.weight", "extra", "fc.bias"):
        assert f"DISAGREES: tensor '{name}'" in shown


def test_inspect_of_nothing_exits_with_2(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit", "t5", "phi3"])
def test_padded_model_loads_without_the_package(family, tmp_path):
    model = cuts.pruned(family)
    inputs = made_up_inputs(model)
    wide = padded(model)
    wide.save_pretrained(tmp_path)
    sosp_hub.disable()
    try:
        loaded = type(model).from_pretrained(tmp_path)
    finally:
        sosp_hub.enable()
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-5)
    if family == "vit":
        widths = [layer for layer in loaded.state_dict().values() if 38 in layer.shape]
        assert widths, "padded to the widest layer that is left, not to the dense width"


def with_a_stream_that_no_config_has():
    """Channels between a projection and the normalisation behind it."""
    cls = transformers.ModernBertForSequenceClassification
    (family,) = [each for each in FAMILIES if each.name == "modernbert"]
    torch.manual_seed(0)
    model = cls(cls.config_class(**family.config)).eval()
    graph = trace(model, family.inputs())
    (name,) = [n for n in graph.groups if n == "head.dense:neuron"]
    plan = PruningPlan({name: tuple(range(0, 64, 2))}, {name: 64})
    return apply(model, graph, plan, "fast")


NARROW = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=96)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NARROW)
def test_narrower_heads_are_filled_up_each(family):
    """Four heads of four have the shapes of two heads of eight."""
    model, inputs = fill(NARROW[family]().eval()), {"input_ids": torch.arange(18).view(2, 9)}
    graph = sosp_hub.trace(model, inputs, outputs="logits")
    plan = half(graph, lambda group: group.kind == "head_dim")
    assert plan.kept
    pruned = sosp_hub.apply(model, graph, plan, strict=True)
    with torch.no_grad():
        assert_close(padded(pruned)(**inputs).logits, pruned(**inputs).logits)


def test_sizes_that_no_cut_gives_are_not_filled_up():
    model = NARROW["opt"]().eval()
    layer = model.model.decoder.layers[0]
    cuts.keep(layer.fc1, out=torch.arange(20))
    cuts.keep(layer.fc2, inp=torch.arange(21))
    with pytest.raises(CheckpointError, match=r"size 21 of .* is not that of a cut"):
        padded(model)


def test_padding_that_changes_the_function_is_refused():
    with pytest.raises(CheckpointError, match=r"zeros in head\.dense:neuron would .*normalisation"):
        padded(with_a_stream_that_no_config_has())


@pytest.mark.filterwarnings("ignore")
def test_archive_runs_in_torch_alone(tmp_path):
    model = cuts.pruned_timm("test_resnet")
    path = export.to_archive(model, tmp_path / "model.pt2")
    x = torch.randn(3, 3, 160, 160)
    torch_save = tmp_path / "x.safetensors"
    save_file({"x": x}, torch_save)
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file;"
        f"x = load_file({str(torch_save)!r})['x'];"
        f"y = torch.export.load({str(path)!r}).module()(x);"
        f"save_file({{'y': y.detach().contiguous()}}, {str(tmp_path / 'y.safetensors')!r});"
        "assert not any(name in sys.modules for name in ('timm', 'sosp_hub'))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert_close(load_file(tmp_path / "y.safetensors")["y"], output(model, (x,)), relative=1e-5)


def samples(inputs, num):
    if isinstance(inputs, dict):
        return {name: value[:num] for name, value in inputs.items()}
    return tuple(value[:num] for value in inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["test_resnet", "bert", "mixtral", "mamba"])
def test_onnx_runs_in_onnxruntime(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = cuts.pruned(name) if name in cuts.FAMILIES else cuts.pruned_timm(name)
    inputs = made_up_inputs(model)
    implementation = getattr(getattr(model, "config", None), "_experts_implementation", None)
    session = runtime.InferenceSession(export.to_onnx(model, tmp_path / "model.onnx"))
    if isinstance(inputs, dict):  # other tokens than those it was exported with: other experts
        inputs |= {"input_ids": (inputs["input_ids"] * 7 + 5) % 96}
    for num in (2, 1):
        few = samples(inputs, num)
        values = few.values() if isinstance(few, dict) else few
        names = [entry.name for entry in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        (answer, *_) = session.run(None, feed)
        assert_close(torch.from_numpy(answer), output(model, few), relative=1e-5)
    if name == "mixtral":
        assert model.config._experts_implementation == implementation, "left as it was"


class _Choosy(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@pytest.mark.filterwarnings("ignore")
def test_what_torch_cannot_export_says_what_can_be_done(tmp_path):
    with pytest.raises(CheckpointError, match=r"export _Choosy \(.*torch_export.*save_pretrained"):
        export.to_onnx(_Choosy(), tmp_path / "model.onnx", (torch.ones(2, 3),))
    with pytest.raises(CheckpointError, match=r"export _Choosy \(.*save_pretrained"):
        export.to_archive(_Choosy(), tmp_path / "model.pt2", (torch.ones(2, 3),))


def test_onnx_says_what_is_missing(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", missing)
    with pytest.raises(CheckpointError, match="pip install onnx onnxscript"):
        export.to_onnx(cuts.pruned_timm("test_resnet"), tmp_path / "model.onnx")


def test_exports_of_another_library_are_refused():
    with pytest.raises(sosp_hub.errors.ModelError, match="transformers"):
        padded(cuts.pruned_timm("test_resnet"))
