"""What a run measures of speed, and how the card says it."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from sosp_hub.pipeline.measuring import timed_inputs
from sosp_hub.pipeline.result import costs, decoding_of, latency_of
from sosp_hub.plan import PruningPlan
from sosp_hub.report import numbers
from sosp_hub.report.facts import collect
from sosp_hub.structure.trace import trace
from tests.cases import CASES

LLAMA = next(case for case in CASES if case.name == "llama")


def run(task):
    """A recipe and a loaded model, as far as a measurement looks at them."""
    evaluate = SimpleNamespace(latency_batch_size=2, latency_tokens=7)
    recipe = SimpleNamespace(evaluate=evaluate, model=SimpleNamespace(dtype="float32", task=task))
    processor = SimpleNamespace(tokenizer=range(50), max_positions=None)
    return recipe, SimpleNamespace(model=LLAMA.model(), processor=processor, task=task)


@pytest.mark.filterwarnings("ignore")
def test_generation_is_split_into_prefill_and_decode():
    recipe, loaded = run("text-generation")
    measured = recipe, loaded, LLAMA.model()
    with torch.no_grad():
        latency = {**latency_of(*measured, 0.01), **decoding_of(*measured, 0.01)}
    assert latency["after"]["length"] == latency["decode"]["after"]["length"] == 7
    assert all(latency["decode"][when]["seconds"] > 0 for when in ("before", "after"))
    graph = trace(loaded.model, LLAMA.inputs(), outputs="logits")
    cost = costs(graph, PruningPlan({}, {}))
    length = LLAMA.inputs()["input_ids"].shape[1]
    assert (cost["of_one"], cost["tokens"]) == (f"{length} tokens", length)
    report = {"task": "text-generation", "cost": cost, "latency": latency}
    found = collect(report).costs.rows
    assert found[2][1] == numbers.count(cost["before"]["macs"] / length)
    rows = [row[0] for row in found]
    assert rows == [
        "Parameters",
        f"Multiply-accumulates of one input ({length} tokens)",
        f"Multiply-accumulates per token (mean of {length})",
        "Weights",
        "Latency of prefill, a prompt of 7 tokens",
        "Latency of decode, one token after that prompt",
    ]


def test_other_tasks_have_one_latency():
    assert decoding_of(*run("fill-mask"), LLAMA.model()) == {}
    cost = {when: {"macs": 10, "params": 5, "bytes": 20} for when in ("before", "after")}
    report = {
        "task": "text-classification",
        "cost": {**cost, "of_one": "16 tokens", "tokens": 16},
        "latency": {when: {"seconds": 1.0, "length": 16} for when in ("before", "after")},
    }
    rows = [row[0] for row in collect(report).costs.rows]
    assert rows == [
        "Parameters",
        "Multiply-accumulates of one input (16 tokens)",
        "Weights",
        "Latency of one forward pass",
    ]
    report["cost"] = cost  # an older report does not say
    assert collect(report).costs.rows[1][0] == "Multiply-accumulates of one input"


def test_no_prompt_is_so_long_that_no_token_can_follow():
    """A model with learned positions ended in an IndexError."""
    recipe, loaded = run("text-generation")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=6, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    loaded.model, loaded.processor.max_positions = transformers.GPT2LMHeadModel(config), 6
    with torch.no_grad():
        latency = decoding_of(recipe, loaded, loaded.model, 0.01)
    assert latency["decode"]["before"]["length"] == 5
    loaded.task = "text-classification"
    assert timed_inputs(recipe, loaded)["input_ids"].shape == (2, 6)
