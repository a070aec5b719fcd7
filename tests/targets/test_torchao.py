"""Quantised after pruning, by torchao: on a model in memory, and on a folder as it is loaded."""

import json

import pytest
import torch
import transformers

import sosp_hub
from sosp_hub.errors import CheckpointError
from sosp_hub.inspect import main
from sosp_hub.inspection.examine import examine
from tests.checkpoint import cuts
from tests.compare import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of torchao

TOKENS = torch.arange(3, 9)[None]
ASK = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def int8():
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()


def test_a_folder_is_quantised_as_it_is_loaded_saved_and_loaded_again(tmp_path):
    model, config = cuts.pruned("llama"), transformers.TorchAoConfig(int8())
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    load = transformers.AutoModelForCausalLM.from_pretrained
    packed = load(folder, quantization_config=config)
    packed.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    widths = [layer.mlp.up_proj.weight.shape[0] for layer in model.model.layers]
    for each in (packed, again):
        assert [layer.mlp.up_proj.weight.shape[0] for layer in each.model.layers] == widths
        assert type(each.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
        assert_close(each(TOKENS).logits, model(TOKENS).logits, relative=0.02)
    assert torch.equal(again.generate(TOKENS, **ASK), packed.generate(TOKENS, **ASK))
    size = [sum(p.stat().st_size for p in (tmp_path / name).glob("*.safetensors"))
            for name in ("small", "int8")]  # fmt: skip
    assert size[1] < size[0]


def test_what_was_quantised_in_memory_is_neither_saved_nor_exported(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = cuts.pruned("llama")
    quantization.quantize_(model, int8())
    for write in (
        lambda: sosp_hub.save_pretrained(model, tmp_path / "small"),
        lambda: sosp_hub.export(model, "gguf", tmp_path / "small.gguf"),
    ):
        with pytest.raises(CheckpointError, match=r"q_proj.weight is quantised .*first, then"):
            write()
    assert not list(tmp_path.iterdir())


def test_inspect_knows_quantised_weights(tmp_path, capsys):
    """They are stored in another form than the config builds, and no longer exported."""
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")
    load = transformers.AutoModelForCausalLM.from_pretrained
    packed = load(folder, quantization_config=transformers.TorchAoConfig(int8()))
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
            assert "quantised (torchao)" in reader.why
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    config["vocab_size"] = 50
    (tmp_path / "int8" / "config.json").write_text(json.dumps(config))
    assert any("embed_tokens" in fault for fault in examine(tmp_path / "int8").faults)
