"""Caches that are made before the first token, from the config alone."""

import copy
import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

import sosp_hub
from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.plan import PruningPlan
from tests.bench.families import FAMILIES
from tests.checkpoint import cuts
from tests.compare import assert_close

TOKENS = torch.arange(5, 12)[None]
ASK = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STATIC = {"cache_implementation": "static", "prefill_chunk_size": 2, "disable_compile": True}
_WITHOUT = {
    "one KV head, which stays": ("llama_mqa", "gemma", "gpt_bigcode_mqa"),
    "one matrix for query, key and value, whose heads stay": ("phi3",),
    "no heads to cut": ("bloom", "reformer"),
    "static caches that transformers makes wrong or not at all, dense too": (
        *("falcon_mqa", "mpt", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma"),
    ),
    "compressed keys, whose number stays": ("deepseek_v3",),
}
_DECODERS = [
    each
    for each in FAMILIES
    if "CausalLM" in each.model or "LMHead" in each.model or each.name in ("llava", "paligemma")
]
WITH_HEADS = [
    each for each in _DECODERS if not any(each.name in names for names in _WITHOUT.values())
]


def with_fewer_heads(family):
    """A model whose first layer lost KV heads, or heads where each has its own keys."""
    torch.manual_seed(0)
    model = family.build()
    graph = sosp_hub.trace(model, family.inputs())
    kinds = {group.kind for group in graph.groups.values()}
    kind = "kv_group" if "kv_group" in kinds else "head"
    name, group = next((n, g) for n, g in graph.groups.items() if g.kind == kind)
    kept = (1,) if group.size == 2 else (0, group.size - 1)
    return sosp_hub.apply(model, graph, PruningPlan({name: kept}, {name: group.size}), "fast")


@pytest.fixture(scope="module")
def llama():
    """KV heads 1, 2 and 4 of 4, and three widths."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 96,
        "max_position_embeddings": 64,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    graph = sosp_hub.trace(model, {"input_ids": TOKENS.repeat(2, 1), "use_cache": False})
    layer = "model.layers.{}.self_attn.q_proj:kv_group"
    width = "model.layers.{}.mlp.gate_proj:neuron"
    kept = {layer.format(0): (2,), layer.format(1): (0, 3)}
    kept |= {width.format(i): tuple(range(40 + i)) for i in range(2)}
    sizes = {name: graph.groups[name].size for name in kept}
    return sosp_hub.apply(model, graph, PruningPlan(kept, sizes))


def loaded(model, folder):
    return type(model).from_pretrained(sosp_hub.save_pretrained(model, folder))


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_HEADS, ids=lambda each: each.name)
def test_a_static_cache_is_made_in_the_sizes_of_each_layer(family, tmp_path):
    model = with_fewer_heads(family)
    expected = model.generate(TOKENS, **ASK)
    for each in (model, loaded(model, tmp_path / "small")):
        assert torch.equal(each.generate(TOKENS, **ASK, **STATIC), expected)


def test_the_config_tells_each_layer_and_builds_the_model_as_before(llama, tmp_path, monkeypatch):
    folder = sosp_hub.save_pretrained(llama, tmp_path / "small")
    record = json.loads((folder / "config.json").read_text())
    assert record["per_layer_config"] == {
        "0": {"num_key_value_heads": 1, "intermediate_size": 40},
        "1": {"num_key_value_heads": 2, "intermediate_size": 41},
    }
    warned = []
    library = importlib.import_module(type(llama.config).is_heterogeneous.fget.__module__)
    monkeypatch.setattr(library.logger, "warning_once", warned.append)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not warned
    assert_close(again(TOKENS).logits, llama(TOKENS).logits, relative=1e-6)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == record


def test_a_model_that_is_cut_again_or_made_uniform_keeps_no_stale_copy(llama):
    graph = sosp_hub.trace(llama, {"input_ids": TOKENS.repeat(2, 1), "use_cache": False})
    names = [name for name in graph.groups if name.endswith("neuron")]
    kept = {name: tuple(range(32)) for name in names}
    sizes = {name: graph.groups[name].size for name in names}
    again = sosp_hub.apply(llama, graph, PruningPlan(kept, sizes))
    told = [(each.num_key_value_heads, each.intermediate_size)
            for each in again.config.per_layer_config]  # fmt: skip
    assert told == [(1, 32), (2, 32), (4, 32)]
    assert [each.intermediate_size for each in llama.config.per_layer_config] == [40, 41, 96]


EXPORTED = {
    "1, 2 and 4 KV heads": lambda: None,
    "no attention in layer 1": lambda: without(1),
    "no attention in layer 0": lambda: without(0),
}


def without(*layers):
    model = cuts.pruned("llama")
    for i in layers:
        model.model.layers[i].self_attn = RemovedAttention(layer_idx=i)
    model.model.layers[2].mlp = RemovedMlp()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_the_librarys_exportable_module_runs_each_layer(name, llama, tmp_path):
    model = EXPORTED[name]() or llama
    for each in (loaded(model, tmp_path / "small"), copy.deepcopy(llama)):
        generation = {"cache_implementation": "static", "use_cache": True}
        generation["cache_config"] = {"batch_size": 1, "max_cache_len": 16}
        each.generation_config = transformers.GenerationConfig(**generation)
        module = TorchExportableModuleWithStaticCache(each)
        given = [
            module(input_ids=TOKENS[:, i : i + 1], cache_position=torch.tensor([i]))
            for i in range(TOKENS.shape[1])
        ]
        expected = each(TOKENS, use_cache=False).logits
        assert_close(torch.cat(given, 1), expected, relative=1e-5)


_COMPILED = """
import json, sys
import torch, transformers
import sosp_hub
from torch._dynamo.backends.registry import lookup_backend

compiled = []

def backend(graph, inputs):
    compiled.append(graph)
    return lookup_backend(sys.argv[4])(graph, inputs)

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
options = {"cache_implementation": "static", "disable_compile": True, **json.loads(sys.argv[2])}
tokens = model.generate(torch.tensor(json.loads(sys.argv[3])), **options)
print(json.dumps([len(compiled), tokens.tolist()]))
"""


_NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=_NO_COMPILER)])
def test_a_step_of_generation_compiles_as_one_graph(llama, tmp_path, backend):
    """With a static cache and other KV heads in each layer; the tokens of the eager model.

    In a process of its own: a code that torch ran before may not be compiled any more.
    """
    folder = sosp_hub.save_pretrained(llama, tmp_path / "small")
    given = [str(folder), json.dumps(ASK), json.dumps(TOKENS.tolist()), backend]
    command = [sys.executable, "-c", _COMPILED, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_compiled, tokens = json.loads(done.stdout.splitlines()[-1])
    assert tokens == llama.generate(TOKENS, **ASK).tolist()
    assert num_compiled >= 1
