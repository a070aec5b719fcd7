"""A folder that is cut into a folder is what `apply` and `save_pretrained` make of the model."""

import dataclasses
import json

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.checkpoint import cut_files as module
from sosp_hub.checkpoint.inputs import inputs_without_weights
from sosp_hub.cut import main
from sosp_hub.errors import CheckpointError, OutputError, PlanError
from sosp_hub.plan import PruningPlan
from tests.checkpoint.cuts import GQA, TEXT

MIXTRAL = {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}
TRANSFORMERS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**GQA)),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**TEXT, num_labels=3)),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**{**GQA, "tie_word_embeddings": True})),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**MIXTRAL)),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96, n_positions=64),
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            image_size=32, patch_size=8, num_labels=5,
        ),
    ),
}  # fmt: skip
WINDOWS = {
    "img_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 24, "num_heads": (2, 4),
    "depths": (2, 2),
}  # fmt: skip
TIMM = {
    "test_resnet": {},
    "test_vit": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "swin_tiny_patch4_window7_224": WINDOWS,  # masks of shifted windows, in no file
}


def dense_folder(name, tmp_path, **how):
    torch.manual_seed(0)
    if name in TIMM:
        model = timm.create_model(name, num_classes=5, **TIMM[name]).eval()
        sosp_hub.save_pretrained(model, tmp_path / "dense")
    else:
        cls, config = TRANSFORMERS[name]
        cls(config).eval().save_pretrained(tmp_path / "dense", **how)
    return tmp_path / "dense"


def some_plan(graph, *, uniform=False, layers=False):
    """Of each group another share, of those that the model lets go."""
    kept = {}
    for number, (name, group) in enumerate(graph.groups.items()):
        if group.kind in ("residual", "head_dim") or (group.kind == "layer" and not layers):
            continue
        tied = next((tie for tie in graph.ties if name in tie), ())
        known = [kept[other] for other in tied if other in kept]
        share = 0.5 if uniform or group.kind == "layer" else 0.9 - 0.1 * (number % 5)
        count = len(known[0]) if known else max(1, int(group.size * share))
        step = group.multiple
        count = max(step, count // step * step)
        if group.kind == "expert":
            count = max(count, 2)
        start = 0 if uniform else number % (group.size - count + 1)
        kept[name] = tuple(range(start, start + count))
    sizes = {name: graph.groups[name].size for name in kept}
    return PruningPlan(kept, sizes)


def both(name, tmp_path, *, plan=None, how=None, **options):
    """The folder that was cut in memory, and the one that was cut on disk."""
    folder = dense_folder(name, tmp_path, **(how or {}))
    model = sosp_hub.from_pretrained(folder)
    inputs = inputs_without_weights(model)
    graph = sosp_hub.trace(model, inputs)
    plan = plan(graph) if callable(plan) else some_plan(graph, **options)
    sosp_hub.save_pretrained(sosp_hub.apply(model, graph, plan, strict=True), tmp_path / "memory")
    (tmp_path / "plan.json").write_text(plan.to_json())
    size = (how or {}).get("max_shard_size", "5GB")
    out = sosp_hub.apply_plan_file(
        tmp_path / "plan.json", folder, out=tmp_path / "disk", max_shard_size=size
    )
    return tmp_path / "memory", out


def tensors(folder):
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
    return state


def assert_same(one, two):
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert json.loads((one / "config.json").read_text()) == json.loads(
        (two / "config.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRANSFORMERS, *TIMM])
def test_the_same_files_as_in_memory(name, tmp_path):
    memory, disk = both(name, tmp_path)
    assert_same(memory, disk)
    assert "sosp_hub" in (disk / "config.json").read_text()  # there is a delta to compare
    sosp_hub.from_pretrained(disk)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_uniform_cut_needs_no_delta_on_disk_either(name, tmp_path):
    memory, disk = both(name, tmp_path, uniform=True)
    assert_same(memory, disk)
    assert "sosp_hub" not in json.loads((disk / "config.json").read_text())


@pytest.mark.slow
def test_layers_that_go_move_the_others_up(tmp_path):
    memory, disk = both("llama", tmp_path, layers=True)
    assert_same(memory, disk)
    assert not any("layers.2." in name for name in tensors(disk))


@pytest.mark.slow
def test_experts_that_go_and_are_stored_one_by_one(tmp_path):
    def plan(graph):
        made = some_plan(graph)
        names = [name for name in made.kept if graph.groups[name].kind == "expert"]
        assert names
        return dataclasses.replace(made, kept={**made.kept, names[0]: (0, 1, 3)})

    memory, disk = both("mixtral", tmp_path, plan=plan)
    assert_same(memory, disk)
    assert any(".experts.2." in name for name in tensors(tmp_path / "dense"))


@pytest.mark.slow
def test_shards_are_read_and_written(tmp_path):
    memory, disk = both("llama", tmp_path, how={"max_shard_size": "30KB"})
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) >= 3
    assert len(list(disk.glob("*.safetensors"))) >= 3
    assert_same(memory, disk)
    assert (disk / "model.safetensors.index.json").is_file()


@pytest.mark.slow
def test_blocks_of_rows_make_the_same_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 300)
    assert_same(*both("llama", tmp_path))


@pytest.mark.slow
def test_gates_and_shifts_are_folded_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 100)

    def plan(graph):
        made = some_plan(graph)
        name = next(name for name in made.kept if graph.groups[name].kind == "neuron")
        gates = tuple(1 + 0.01 * i for i in range(len(made.kept[name])))
        bias = next(n for n in graph.tensors if n.endswith("output.dense.bias"))
        shift = tuple(0.1 * i for i in range(32))
        return dataclasses.replace(made, gates={name: gates}, shifts={bias: shift})

    assert_same(*both("bert", tmp_path, plan=plan))


@pytest.mark.slow
def test_a_tokenizer_and_how_to_generate_come_along(tmp_path):
    folder = dense_folder("llama", tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "sosp_report.json").write_text("{}")
    (folder / "README.md").write_text("the dense model")
    plan = some_plan(
        sosp_hub.trace(m := sosp_hub.from_pretrained(folder), inputs_without_weights(m))
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    out = sosp_hub.apply_plan_file(tmp_path / "plan.json", folder, out=tmp_path / "disk")
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer_config.json", "generation_config.json"} <= names
    assert not {"sosp_report.json", "README.md"} & names


@pytest.mark.slow
def test_what_is_written_wrongly_is_seen(tmp_path, monkeypatch):
    folder = dense_folder("llama", tmp_path)
    plan = some_plan(
        sosp_hub.trace(m := sosp_hub.from_pretrained(folder), inputs_without_weights(m))
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    cut = module._cut_block
    monkeypatch.setattr(module, "_cut_block", lambda *args: cut(*args).roll(1, 0))
    with pytest.raises(CheckpointError, match="was not written as it was cut"):
        sosp_hub.apply_plan_file(tmp_path / "plan.json", folder, out=tmp_path / "disk")
    assert not (tmp_path / "disk").exists()


@pytest.mark.slow
def test_refusals_are_typed_and_leave_nothing(tmp_path):
    folder = dense_folder("llama", tmp_path)
    model = sosp_hub.from_pretrained(folder)
    plan = some_plan(sosp_hub.trace(model, inputs_without_weights(model)))
    file, out = tmp_path / "plan.json", tmp_path / "disk"
    file.write_text(plan.to_json())
    with pytest.raises(CheckpointError, match="base=FOLDER"):
        sosp_hub.apply_plan_file(file, model, out=out)
    with pytest.raises(CheckpointError, match="is the base itself"):
        sosp_hub.apply_plan_file(file, folder, out=folder)
    with pytest.raises(CheckpointError, match="loads nothing"):
        sosp_hub.apply_plan_file(file, folder, out=out, device_map="auto")
    with pytest.raises(OutputError, match="is a file"):
        sosp_hub.apply_plan_file(file, folder, out=file)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapters beside its weights"):
        sosp_hub.apply_plan_file(file, folder, out=out)
    (folder / "adapter_config.json").unlink()
    config = (folder / "config.json").read_text()
    packed = json.loads(config) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(packed))
    with pytest.raises(CheckpointError, match="its weights are quantised; cut the model"):
        sosp_hub.apply_plan_file(file, folder, out=out)
    (folder / "config.json").write_text(config)
    other = {name.replace("layers.0", "layers.7"): kept for name, kept in plan.kept.items()}
    sizes = {name.replace("layers.0", "layers.7"): size for name, size in plan.sizes.items()}
    file.write_text(PruningPlan(other, sizes).to_json())
    with pytest.raises(PlanError):
        sosp_hub.apply_plan_file(file, folder, out=out)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        sosp_hub.apply_plan_file(file, folder, out=out)
    assert not out.exists()


@pytest.mark.slow
def test_on_the_command_line(tmp_path, capsys):
    folder = dense_folder("llama", tmp_path)
    model = sosp_hub.from_pretrained(folder)
    plan = some_plan(sosp_hub.trace(model, inputs_without_weights(model)))
    plan = dataclasses.replace(plan, base_model=str(folder))
    sosp_hub.save_plan(plan, tmp_path / "plan")
    assert main([str(tmp_path / "plan"), str(tmp_path / "disk")]) == 0
    assert "MB of weights, in 1 files" in capsys.readouterr().out
    assert sosp_hub.from_pretrained(tmp_path / "disk").num_parameters() < model.num_parameters()
    assert main([str(tmp_path / "none"), str(tmp_path / "disk")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
