"""scp_score: the normal distribution by hand, and what has no pair."""

import logging
import math

import pytest
import torch
from torch import nn

from sosp_hub.allocation import allocate
from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from tests.compare import assert_close

INPUTS = (torch.randn(2, 3, 8, 8),)


def stack(*norms):
    layers = [nn.Conv2d(3, 4, 3)]
    for norm in norms:
        layers += [norm, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 2))


def normal(beta, gamma, t=0.05):
    return 0.5 * (1 + math.erf((t - beta) / (abs(gamma) + 1e-8) / math.sqrt(2)))


BETA, GAMMA = [0.3, -1.0, 0.05, 0.2], [0.5, -0.25, 1.0, 0.0]


def prepared():
    model = stack(nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor(BETA))
        model[1].weight.copy_(torch.tensor(GAMMA))
    return model


def test_a_channel_counts_by_the_probability_that_it_passes():
    model = prepared()
    (found,) = score(model, trace(model, INPUTS), [], "scp_score").values()
    expected = [0.95 - normal(b, g) for b, g in zip(BETA, GAMMA, strict=True)]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), relative=1e-6)
    assert_close(found[2:], torch.tensor([0.45, 0.95]).double(), relative=1e-6)  # Phi(0), Phi(-inf)
    (found,) = score(model, trace(model, INPUTS), [], "scp_score", t=-1.0, c0=0.5).values()
    expected = [0.5 - normal(b, g, -1.0) for b, g in zip(BETA, GAMMA, strict=True)]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), relative=1e-6)


class Dense(nn.Module):
    """Two pairs read the first convolution's channels, the second behind those of another."""

    def __init__(self):
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.grow(self.one(x).relu())
        return self.head(self.two(torch.cat([y, x], 1)).relu()).mean((2, 3))


def test_of_several_pairs_the_one_counts_that_is_most_probably_on():
    model = Dense()
    with torch.no_grad():
        model.one.bias.copy_(torch.tensor([2.0, -2.0, 0.0, 1.0]))
        model.two.bias.copy_(torch.tensor([0.5, 0.6, -1.0, -1.0, 0.1, 3.0]))
    found = score(model, trace(model, INPUTS), [], "scp_score")
    expected = {
        "stem:channel": [0.95 - normal(beta, 1) for beta in (2.0, -1.0, 0.1, 3.0)],
        "grow:channel": [0.95 - normal(beta, 1) for beta in (0.5, 0.6)],
    }
    expected = {name: torch.tensor(values).double() for name, values in expected.items()}
    assert_close(found, expected, relative=1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.inner = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
        self.out, self.head = nn.Conv2d(5, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.out(self.inner(x))).relu()).mean((2, 3))


def test_what_is_read_otherwise_stays_whole_and_is_told(caplog):
    model = Block()
    graph = trace(model, INPUTS)
    with caplog.at_level(logging.INFO, "sosp_hub"):
        found = score(model, graph, [], "scp_score")
    assert set(found) == {"inner.0:channel"}
    assert "1 of 2 stay whole: stem:channel" in caplog.text
    plan = allocate(graph, found, params=0.9)
    assert set(plan.kept) == {"inner.0:channel"}


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 4)], ids=["none", "group norm"])
def test_without_a_pair_what_applies_is_named(norm):
    model = stack(norm)
    words = r"'scp_score' scores only groups that are read through a BatchNorm.* none of the \d .*"
    with pytest.raises(CriterionError, match=rf"{words}\(channel\).*use .*magnitude or") as caught:
        score(model, trace(model, INPUTS), [], "scp_score")
    assert "scp_score or" not in str(caught.value)
    assert "block_influence" not in str(caught.value)
