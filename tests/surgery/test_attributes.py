"""Sizes that layers repeat beside their weights, also where the traced code reads none of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, plan_of, run


class Around(nn.Module):
    """Conv 2 -> 6, a layer, conv 6 -> 3."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 3, 1)
        self.layer = layer

    def forward(self, x):
        return self.last(self.inner(self.first(x)))

    def inner(self, x):
        return self.layer(x)


class WeightAlone(Around):
    """As Mamba does: the weight of a depthwise convolution is used, the layer is not called."""

    def inner(self, x):
        return F.conv1d(x, self.layer.weight, self.layer.bias, groups=x.shape[1])


def cut(model):
    """The model with four of the six channels, and what it must give."""
    torch.manual_seed(0)
    model = fill(model.eval())
    graph = trace(model, (torch.randn(2, 2, 5),))
    plan = plan_of(graph, {"first:channel": (0, 2, 3, 5)})
    pruned = apply(model, graph, plan)
    assert_close(run(pruned, graph), gated(model, graph, plan), what="the cut")
    return pruned


@pytest.mark.parametrize("kind", [Around, WeightAlone])
def test_a_depthwise_convolution_can_be_called_after_the_cut(kind):
    pruned = cut(kind(nn.Conv1d(6, 6, 3, groups=6)))
    layer = pruned.layer
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 4, 4)
    x = torch.randn(2, 2, 5)
    assert_close(pruned.last(layer(pruned.first(x))), pruned(x), what="the layer, called")


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_knows_how_many_channels_it_has(affine):
    assert cut(Around(nn.BatchNorm1d(6, affine=affine))).layer.num_features == 4
