"""Peak memory of a forward pass, counted by hand."""

import pytest
import torch
from torch import nn

from sosp_hub.pipeline.memory import forward_peak

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="counts the CPU's bytes")


class Tied(nn.Module):
    """One matrix used twice, and a buffer."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x):
        return self.second(self.first(x)) + self.shift


def chain(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


# The model, its input and the values alive at the height: weights, input, then two neighbours.
CASES = {
    "chain": (chain(50), (8, 6), 6 * 50 + 50 + 50 * 3 + 3 + 8 * 6 + 2 * 8 * 50),
    "narrow chain": (chain(20), (8, 6), 6 * 20 + 20 + 20 * 3 + 3 + 8 * 6 + 2 * 8 * 20),
    "tied weights count once": (Tied(10), (4, 10), 10 * 10 + 10 + 4 * 10 + 2 * 4 * 10),
}


@pytest.mark.parametrize("name", CASES)
def test_peak_is_weights_input_and_the_values_alive_at_once(name):
    model, shape, expected = CASES[name]
    x = torch.zeros(shape)
    found = [forward_peak(model.eval(), (x,)) for _ in range(3)]
    assert found == [4 * expected] * 3


def test_keyword_inputs():
    x = torch.zeros(8, 6)
    model = chain(50)
    assert forward_peak(model, {"input": x}) == forward_peak(model, (x,))
