"""Tasks of lm-evaluation-harness: its numbers, its standard errors, and what is missing."""

import builtins
import json
import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sosp_hub.errors import DataError
from sosp_hub.harness import check_harness, harness_metrics
from sosp_hub.recipe.load import parse_recipe
from tests.compare import assert_close

pytestmark = pytest.mark.slow

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *"abcdefghij"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        )
    ).train()  # fmt: skip


def test_it_counts_as_one_counts_by_hand(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        {"question": "a b c", "choices": ["d", "e", "f"], "answer": i % 3} for i in range(9)
    ] + [{"question": "h i", "choices": ["a", "j"], "answer": i % 2} for i in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(TASK.replace("FILE", str(file)))
    model, words = llama(), tokenizer()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = harness_metrics(model, words, ["toy_choice"], folder=tmp_path, batch_size=4)
    assert model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    right = 0
    model.eval()
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = words(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
            logs = model(ids).logits.log_softmax(-1)
            scores.append(logs[0, -2, ids[0, -1]].item())
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
    metric = found["accuracy@toy_choice"]
    assert_close(metric.value, right / len(rows), relative=1e-9)
    assert metric.n == 15
    assert metric.stderr == pytest.approx((metric.value * (1 - metric.value) / 14) ** 0.5, rel=0.01)
    limited = harness_metrics(model, words, ["toy_choice"], folder=tmp_path, limit=4)
    assert limited["accuracy@toy_choice"].n == 4


def test_without_the_harness_that_is_told(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"evaluate\.harness: needs lm-evaluation-harness; pip"):
        check_harness()


def test_it_is_of_language_models():
    text = """
model: {library: timm, id: resnet18, task: image-classification}
data: {id: sklearn/digits}
evaluate: {harness: [arc_easy]}
"""
    with pytest.raises(Exception, match=r"evaluate\.harness: is of language models"):
        parse_recipe(text, "recipe", output_dir="out")
