"""Inputs of any nesting: how large a sample is, how many there are, one less."""

from collections import UserDict

import pytest
import torch
import transformers

from sosp_hub.structure.inputs import num_samples, num_tokens, one_sample, with_samples
from sosp_hub.structure.trace import trace
from tests.cases import CASES

TOKENS = torch.zeros(2, 16, dtype=torch.long)
IMAGES = torch.zeros(4, 3, 8, 9)
LLAMA = next(case for case in CASES if case.name == "llama")

SAMPLES = [
    ((IMAGES,), "3x8x9", 4, 0),
    (IMAGES, "3x8x9", 4, 0),
    ({"pixel_values": IMAGES}, "3x8x9", 4, 0),
    ({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}, "16 tokens", 2, 16),
    (transformers.BatchEncoding({"input_ids": TOKENS}), "16 tokens", 2, 16),
    (({"input_ids": TOKENS, "attention_mask": TOKENS},), "16 tokens", 2, 16),
    (
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]},
        "16 tokens, 5 tokens",
        2,
        16,
    ),
    ({"input_ids": TOKENS, "pixel_values": IMAGES[:2]}, "16 tokens, pixel_values 3x8x9", 2, 16),
    (([IMAGES[0], IMAGES[1]],), "3x8x9", 2, 0),
    ((torch.zeros(5, 7), torch.zeros(5)), "7, a number", 5, 0),
    ({"x": torch.zeros(5, 7), "time": torch.zeros(5)}, "7, time a number", 5, 0),
    ({"input_ids": TOKENS, "use_cache": False}, "16 tokens", 2, 16),
]


@pytest.mark.parametrize(("inputs", "words", "samples", "tokens"), SAMPLES)
def test_what_is_said_of_inputs(inputs, words, samples, tokens):
    assert (one_sample(inputs), num_samples(inputs), num_tokens(inputs)) == (words, samples, tokens)
    fewer = with_samples(inputs, range(samples - 1))
    assert num_samples(fewer) == samples - 1
    assert one_sample(fewer) == words
    assert num_samples(with_samples(inputs, [*range(samples), 0])) == samples + 1


def test_costs_of_another_size_than_the_traced_one():
    """Budgets and costs are those of the larger inputs; what is verified are the small ones."""
    from sosp_hub.cost import cost
    from sosp_hub.plan import PruningPlan

    model, small = LLAMA.model(), LLAMA.inputs()
    large = {name: value.repeat(1, 3) if hasattr(value, "repeat") else value
             for name, value in small.items()}  # fmt: skip
    graph = trace(model, small, outputs="logits", cost_inputs=large)
    plainly = trace(model, large, outputs="logits")
    assert graph.sized.sample == plainly.sized.sample != trace(model, small).sized.sample
    assert cost(graph) == cost(plainly)
    kept = {name: tuple(range(group.size // 2)) for name, group in graph.groups.items()
            if group.kind == "neuron"}  # fmt: skip
    plan = PruningPlan(kept, {name: graph.groups[name].size for name in kept})
    assert cost(graph, plan) == cost(plainly, plan)
    assert cost(graph, plan).macs < cost(graph).macs
    assert graph.example_inputs is small


class Wrapped(torch.nn.Module):
    """A model that takes what its tokenizer returns as one argument."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, encoding):
        return UserDict(logits=self.inner(encoding["input_ids"]).logits)


def test_mappings_that_are_no_dicts_are_traced_as_dicts():
    """What a tokenizer returns is a UserDict: its tensors were not seen."""
    model, inputs = LLAMA.model(), {"input_ids": TOKENS}
    encoding = transformers.BatchEncoding(inputs)
    found = trace(model, encoding, outputs="logits", cost_inputs=encoding)
    assert type(found.example_inputs) is dict
    nested = trace(Wrapped(model), (encoding,), outputs="logits")
    for graph in (found, nested):
        sizes = sorted(group.size for group in graph.groups.values())
        assert sizes == [2, 2, 2, 2, 2, 64, 96, 96]
