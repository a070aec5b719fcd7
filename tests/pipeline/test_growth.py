"""Bottlenecks and growth, by hand on a small chain of layers."""

import pytest
import torch
from torch import nn

from sosp_hub.cost import cost
from sosp_hub.pipeline.growth import (
    bottlenecks,
    factor_of_equal_size,
    global_ratio,
    ratios,
    widened,
)
from sosp_hub.structure.trace import trace
from tests.structure.oracles import plan_of

pytestmark = pytest.mark.slow

A, B, C = "0:neuron", "2:neuron", "4:neuron"


@pytest.fixture(scope="module")
def graph():
    layers = [nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(30, 2))
    return trace(model, (torch.randn(2, 3),))


@pytest.fixture(scope="module")
def plan(graph):
    """Of 60 structures 24 go: 0.4; of the layers 0.1, 0.25 and 0.6."""
    return plan_of(graph, {A: range(9), B: range(15), C: range(12)})


def test_ratios(graph, plan):
    assert ratios(graph.groups, plan) == pytest.approx({A: 0.1, B: 0.25, C: 0.6})
    assert global_ratio(graph.groups, plan) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.2, []), (0.5, [A]), (0.63, [A, B]), (1.6, [A, B, C])]
)
def test_what_loses_less_than_a_share_of_the_global_ratio_is_a_bottleneck(
    graph, plan, threshold, expected
):
    assert bottlenecks(graph.groups, plan, threshold) == expected


def test_a_layer_that_the_plan_keeps_whole_is_the_narrowest(graph):
    assert bottlenecks(graph.groups, plan_of(graph, {C: range(10)}), 0.5) == [A, B]


def test_of_a_fraction_the_most_salient_are_copied(graph):
    saliency = {A: torch.tensor([5.0, 1, 9, 2, 8, 3, 7, 4, 6, 0])}
    assert widened(graph, [A], 2.0, saliency).copies == {A: (2,) * 10}
    assert widened(graph, [A], 1.3, saliency).copies == {A: (1, 1, 2, 1, 2, 1, 2, 1, 1, 1)}
    assert widened(graph, [A], 2.2, saliency).copies == {A: (2, 2, 3, 2, 3, 2, 2, 2, 2, 2)}


def test_the_control_has_as_many_parameters(graph):
    saliency = {name: torch.rand(group.size) for name, group in graph.groups.items()}
    growth = widened(graph, [C], 2.0, saliency)
    factor = factor_of_equal_size(graph, growth, [A, B, C], 2.0)
    control = widened(graph, [A, B, C], factor, saliency)
    wanted, found = (cost(graph, counts=each.num_kept()).params for each in (growth, control))
    assert 1 < factor < 2
    assert abs(found - wanted) < 60  # one more of B costs 10 + 30 + 1
