"""The five ways in which a pruned checkpoint goes wrong without a word, each shut."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedBlock, RemovedMlp
from sosp_hub.compat.transformers import cache_in, find_cache
from sosp_hub.errors import CheckpointError
from tests.checkpoint import cuts
from tests.checkpoint.test_families import output
from tests.compare import assert_close

pytestmark = pytest.mark.slow

TOKENS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}


def without_attention(layer=0):
    """A model whose attention in one layer, and MLP in the next, were taken out."""
    model = cuts.pruned("llama")
    layers = model.model.layers
    layers[layer].self_attn = RemovedAttention(layer_idx=layer)
    layers[layer + 1].mlp = RemovedMlp()
    return model.eval()


# Trap 1: a removed block leaves its weights out, and stock transformers fills in random ones.


def only_removed_blocks():
    """No tensor shrinks here; only the tombstones stop a loader."""
    cls, config, _ = cuts.FAMILIES["llama"]
    model = cls(config).eval()
    model.model.layers[1].mlp = RemovedMlp()
    return model


@pytest.fixture(scope="module")
def without_the_package(tmp_path_factory):
    """What a process without the hooks says when it loads each of these folders."""
    root, makers = tmp_path_factory.mktemp("without"), {
        "neurons": lambda: cuts.pruned("llama"),
        "heads": lambda: cuts.pruned("bert"),
        "removed": without_attention,
        "only-removed": only_removed_blocks,
        "timm": lambda: cuts.pruned_timm("test_resnet"),
    }  # fmt: skip
    for name, make in makers.items():
        sosp_hub.save_pretrained(make(), root / name)
    resaved = transformers.AutoModelForCausalLM.from_pretrained(root / "only-removed")
    resaved.save_pretrained(root / "saved-by-transformers")  # the tombstones stay
    code = f"""
import sys, timm, transformers
from pathlib import Path
assert "sosp_hub" not in sys.modules
for folder in Path({str(root)!r}).iterdir():
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        try:
            if folder.name == "timm":
                timm.create_model(f"local-dir:{{folder}}", pretrained=True)
            else:
                auto.from_pretrained(folder)
            print(folder.name, "LOADED")
        except Exception as error:
            print(folder.name, type(error).__name__, str(error).replace(chr(10), " "))
import sosp_hub  # the switch is off
print("HOOKED" if timm.is_model("sosp_hub_pruned") else "left alone")
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "SOSP_HUB_HOOKS": "0"},
    )
    return root, answer.stdout.splitlines()


def test_fails_loudly_without_the_package(without_the_package):
    _, said = without_the_package
    assert len(said) == 13
    assert said.pop() == "left alone"
    for line in said:
        assert (
            "sosp_hub_pruned" in line
            if line.startswith("timm ")
            else "ignore_mismatched_sizes" in line
        ), line


def test_removed_blocks_survive_the_librarys_own_save(without_the_package):
    root, _ = without_the_package
    weights = load_file(root / "only-removed" / "model.safetensors")
    assert [tensor.shape for name, tensor in weights.items() if ".1.mlp" in name] == [(0,)]
    loaded, again = (
        transformers.AutoModelForCausalLM.from_pretrained(root / name)
        for name in ("only-removed", "saved-by-transformers")
    )
    assert_close(output(loaded, TOKENS), output(again, TOKENS), relative=0)


def test_delta_without_a_changed_size_is_not_saved(tmp_path):
    """Nothing in such files could stop a loader that does not know the delta."""
    cls, config, _ = cuts.FAMILIES["bert"]
    model = cls(config).eval()
    model.bert.encoder.layer[1].attention.self.num_attention_heads = 2
    model.bert.encoder.layer[1].attention.self.attention_head_size = 16
    with pytest.raises(CheckpointError, match="without sosp_hub"):
        sosp_hub.save_pretrained(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


# Trap 2: a removed attention must keep the cache in step.


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
)
def test_removed_attention_generates_with_padding_and_caches(options, tmp_path):
    model = without_attention()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        sosp_hub.save_pretrained(model, tmp_path / "small")
    )
    padded = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    ask = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = loaded.generate(**padded, **ask, **options)
    single = loaded.generate(padded["input_ids"][:1, 2:], **ask, use_cache=False)
    assert answer[0, 5:].tolist() == single[0, 3:].tolist()


def test_removed_attention_in_a_loop_over_tokens():
    model, tokens = without_attention(), torch.arange(3, 11)[None]
    expected, cache, seen = output(model, {"input_ids": tokens}), {}, []
    for at in range(tokens.shape[1]):
        step = model(tokens[:, at : at + 1], **cache, use_cache=True)
        cache = cache_in(step)
        assert len(cache) == 1
        seen.append(step.logits.detach())
    assert_close(torch.cat(seen, dim=1), expected, relative=1e-5)


def test_removed_blocks_load_again(tmp_path):
    cls, config, _ = cuts.FAMILIES["llama"]
    model = cls(config).eval()
    model.model.layers[1] = RemovedBlock()
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert_close(output(loaded, TOKENS), output(model, TOKENS), relative=1e-6)


def blind(self, hidden_states, *_, past_keys=None, **__):
    """A stand-in of before the argument was renamed, which leaves the cache alone."""
    return torch.zeros_like(hidden_states), None


def failing(self, hidden_states, *_, **__):
    raise TypeError("forward() got an unexpected keyword argument")


@pytest.mark.parametrize("forward", [blind, failing])
def test_a_stand_in_that_does_not_keep_the_cache_is_not_saved_nor_loaded(
    forward, tmp_path, monkeypatch
):
    model = without_attention()
    folder = sosp_hub.save_pretrained(model, tmp_path / "sound")

    def breaks(self, hidden_states, *args, **kwargs):
        cached = find_cache((*args, *kwargs.values())) is not None
        return (forward if cached else blind)(self, hidden_states)

    monkeypatch.setattr(RemovedAttention, "forward", breaks)
    with pytest.raises(CheckpointError, match=r"key-value cache.*doctor"):
        sosp_hub.save_pretrained(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    for load in (sosp_hub.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"key-value cache.*doctor"):
            load(folder)


def test_a_cache_that_nobody_knows_is_no_proof(tmp_path, monkeypatch):
    monkeypatch.setattr("sosp_hub.checkpoint.format.proof.cache_in", lambda output: {})
    with pytest.raises(CheckpointError, match="key-value cache"):
        sosp_hub.save_pretrained(without_attention(), tmp_path / "small")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sound_stand_in_is_proven_in_half_precision_too(dtype, tmp_path):
    folder = sosp_hub.save_pretrained(without_attention().to(dtype), tmp_path / "small")
    assert sosp_hub.from_pretrained(folder).dtype == dtype


# Trap 3: a single weight file of an older save is what loads.


def test_shards_replace_an_older_single_file(tmp_path):
    folder = tmp_path / "small"
    sosp_hub.save_pretrained(cuts.pruned("llama"), folder)
    (folder / "README.md").write_text("mine")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "figures").mkdir()
    (folder / "figures" / "widths.png").write_bytes(b"png")
    model = cuts.pruned("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    sosp_hub.save_pretrained(model, folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "pytorch_model.bin").exists()
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "figures" / "widths.png").exists()
    assert_close(
        output(sosp_hub.from_pretrained(folder), TOKENS), output(model, TOKENS), relative=1e-6
    )
    sosp_hub.save_pretrained(model, folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_failed_save_changes_nothing(tmp_path, monkeypatch):
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Tokenizer:
        def save_pretrained(self, _):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sosp_hub.save_pretrained(cuts.pruned("mistral"), folder, tokenizer=Tokenizer())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# Trap 4: names of modules differ between versions.


def test_another_version_is_named(tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    config["sosp_hub"]["library_version"] = "4.57.6"
    modules = config["sosp_hub"]["base"]["modules"]
    modules["layers.0.feed_forward"] = modules.pop("layers.0.mlp")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.feed_forward.*written with transformers 4\.57\.6"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


# Trap 5: ignore_mismatched_sizes defeats every guard.


def test_ignore_mismatched_sizes_is_refused(tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")
    for load in (sosp_hub.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="ignore_mismatched_sizes"):
            load(folder, ignore_mismatched_sizes=True)


# And what the saver itself must not let through.


def test_an_attribute_that_is_no_number_is_noticed(tmp_path):
    model = cuts.pruned("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(CheckpointError, match="act_fn"):
        sosp_hub.save_pretrained(model, tmp_path / "small")
    model = cuts.pruned("llama")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(CheckpointError, match="computes"):
        sosp_hub.save_pretrained(model, tmp_path / "small")


def test_missing_weights_are_refused(tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    gone = copy.copy(tensors)
    gone.pop("model.layers.1.mlp.up_proj.weight")
    save_file(gone, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape("model.layers.1.mlp.up_proj.weight")):
        sosp_hub.from_pretrained(folder)
    save_file(
        {**tensors, "extra": torch.zeros(1)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="unexpected tensors: extra"):
        sosp_hub.from_pretrained(folder)
