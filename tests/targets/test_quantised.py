"""Quantised after pruning, by torchao and bitsandbytes: in memory, and as a folder is loaded."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers

import sosp_hub
from sosp_hub.errors import CheckpointError, PlanError
from sosp_hub.inspect import main
from sosp_hub.inspection.examine import examine
from sosp_hub.plan import PruningPlan
from tests.compare import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of these libraries

TOKENS = torch.arange(3, 9)[None]
ASK = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def int8():
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()


def of_torchao():
    return transformers.TorchAoConfig(int8())


def of_bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


CONFIGS = {
    "torchao int8": (of_torchao, 0.02),
    "bitsandbytes int8": (partial(of_bitsandbytes, load_in_8bit=True), 0.02),
    "bitsandbytes nf4": (
        partial(of_bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        0.5,  # of 16 values: far from the model, and yet the same each time
    ),
}
"""How transformers is asked, and how near the quantised model is to the pruned one."""


def pruned():
    """Widths of each layer: multiples of 64, which bitsandbytes packs by on some CPUs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    graph = sosp_hub.trace(model, {"input_ids": TOKENS}, outputs="logits")
    groups = [name for name, group in graph.groups.items() if group.kind == "neuron"]
    kept = {name: tuple(range(64 * (i + 1))) for i, name in enumerate(groups)}
    return sosp_hub.apply(model, graph, PruningPlan(kept, dict.fromkeys(groups, 256)))


def stored(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_quantised_as_it_is_loaded_saved_and_loaded_again(name, tmp_path):
    ask, near = CONFIGS[name]
    model, config = pruned(), ask()
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    load = transformers.AutoModelForCausalLM.from_pretrained
    packed = load(folder, quantization_config=config)
    packed.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised")
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert len(set(widths)) > 1
    for each in (packed, again):
        assert [layer.mlp.up_proj.out_features for layer in each.model.layers] == widths
        weight = each.model.layers[0].mlp.up_proj.weight
        assert type(weight).__module__.startswith(name.partition(" ")[0])
        assert_close(each(TOKENS).logits, model(TOKENS).logits, relative=near)
    assert_close(again(TOKENS).logits, packed(TOKENS).logits, relative=0)
    assert torch.equal(again.generate(TOKENS, **ASK), packed.generate(TOKENS, **ASK))
    assert stored(tmp_path / "quantised") < stored(tmp_path / "small")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_quantised_is_neither_saved_nor_exported_again(name, tmp_path):
    config = CONFIGS[name][0]()
    folder = sosp_hub.save_pretrained(pruned(), tmp_path / "small")
    load = transformers.AutoModelForCausalLM.from_pretrained
    packed = load(folder, quantization_config=config)
    for write in (
        lambda: sosp_hub.save_pretrained(packed, tmp_path / "again"),
        lambda: sosp_hub.export(packed, "gguf", tmp_path / "small.gguf"),
    ):
        with pytest.raises(CheckpointError, match=r"q_proj.weight is quantised .*first, then"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_quantised_is_not_cut(name, tmp_path):
    dense = pruned()
    folder = sosp_hub.save_pretrained(dense, tmp_path / "dense")
    graph = sosp_hub.trace(dense, {"input_ids": TOKENS})
    scores = sosp_hub.score(dense, graph, [], criterion="magnitude")
    plan = sosp_hub.allocate(graph, scores, params=0.8)
    alone = sosp_hub.save_plan(replace(plan, base_model=str(folder)), tmp_path / "plan")
    config = CONFIGS[name][0]()
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for cut in (
        lambda: sosp_hub.apply(packed, graph, plan),
        lambda: sosp_hub.apply_(packed, graph, plan),
        lambda: sosp_hub.rebuild(packed, graph, plan, [{"input_ids": TOKENS}]),
        lambda: sosp_hub.apply_plan_file(alone, packed),
        lambda: sosp_hub.apply_plan_file(alone, quantization_config=config),
    ):
        with pytest.raises(PlanError, match=r"q_proj.weight is quantised .*; cut the model that"):
            cut()


def test_what_was_quantised_in_memory_is_neither_saved_nor_exported(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = pruned()
    quantization.quantize_(model, int8())
    for write in (
        lambda: sosp_hub.save_pretrained(model, tmp_path / "small"),
        lambda: sosp_hub.export(model, "gguf", tmp_path / "small.gguf"),
    ):
        with pytest.raises(CheckpointError, match=r"q_proj.weight is quantised .*first, then"):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_inspect_knows_quantised_weights(name, tmp_path, capsys):
    """They are stored in another form than the config builds, and no longer exported."""
    folder = sosp_hub.save_pretrained(pruned(), tmp_path / "small")
    load = transformers.AutoModelForCausalLM.from_pretrained
    packed = load(folder, quantization_config=CONFIGS[name][0]())
    packed.save_pretrained(tmp_path / "int8")
    found = examine(tmp_path / "int8")
    assert not found.faults
    assert main([str(tmp_path / "int8")]) == 0
    told = f"agree, but for {len(found.packed)} quantised modules, which cannot be compared"
    assert told in capsys.readouterr().out
    assert len(found.packed) > 10
    assert sum(layer.bytes for layer in found.layers) == found.totals["bytes"]
    for reader in found.readers:
        if reader.target or reader.name.startswith("GGUF"):
            assert not reader.loads
            assert f"quantised ({name.partition(' ')[0]})" in reader.why
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    config["vocab_size"] = 50
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    assert any("embed_tokens" in fault for fault in examine(tmp_path / "int8").faults)
