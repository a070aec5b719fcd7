"""A pruned model that drafts for its parent: the same output, in fewer passes."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sosp_hub
from sosp_hub.drafting import measure_drafting
from sosp_hub.errors import ModelError
from sosp_hub.inspect import main

pytestmark = pytest.mark.slow


def llama(seed=0, vocabulary=60):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def pruned_of(model, params):
    inputs = {"input_ids": torch.arange(16).reshape(2, 8), "use_cache": False}
    graph = sosp_hub.trace(model, inputs)
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    return sosp_hub.apply(model, graph, sosp_hub.allocate(graph, scores, params=params))


PROMPTS = [torch.tensor([[1, 5, 9]]), torch.tensor([[1, 30, 2, 7]])]


def test_a_draft_that_is_the_parent_is_always_accepted():
    found = measure_drafting(llama(), llama(), PROMPTS, num_tokens=24, names=("a", "b"))
    assert found.identical
    assert found.num_tokens == 48
    assert found.acceptance_length > 1.5  # a random model is not sure, and drafts few


def test_a_pruned_draft_leaves_the_output_as_it_is():
    parent = llama()
    found = measure_drafting(parent, pruned_of(parent, 0.9), PROMPTS, num_tokens=24, names="ab")
    assert found.identical
    assert found.acceptance_length >= 1
    other = measure_drafting(parent, llama(seed=1), PROMPTS, num_tokens=24, names="ab")
    assert other.identical
    assert other.acceptance_length < found.acceptance_length
    assert "output of 48 tokens identical" in str(found)
    assert found.alone_tokens_per_s > 0
    assert not parent._forward_pre_hooks


def test_both_models_come_back_in_their_modes_and_prompts_need_no_names():
    parent, draft = llama().train(), llama(seed=1).train()
    parent.model.layers[0].eval()
    before = [[each.training for each in model.modules()] for model in (parent, draft)]
    found = measure_drafting(parent, draft, [*PROMPTS] * 3, num_tokens=4, names=())
    assert found.num_tokens == 24
    assert [[each.training for each in model.modules()] for model in (parent, draft)] == before


def test_another_vocabulary_is_refused():
    with pytest.raises(ModelError, match="the draft has 50 tokens, its parent 60"):
        measure_drafting(llama(), llama(vocabulary=50), PROMPTS)


def test_inspect_tells_it(tmp_path, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "The": 1, "weather": 2, "is": 3, "a": 4, "time": 5}
    inner = Tokenizer(WordLevel(words, "<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(
        tmp_path / "base"
    )
    parent = llama()
    parent.save_pretrained(tmp_path / "base")
    sosp_hub.save_pretrained(pruned_of(parent, 0.9), tmp_path / "small")
    given = [str(tmp_path / "small"), "--draft-for", str(tmp_path / "base")]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is True
    assert found["acceptance_length"] >= 1
    assert AutoTokenizer.from_pretrained(tmp_path / "base").vocab_size == 6
