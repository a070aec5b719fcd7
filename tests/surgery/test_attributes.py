"""Sizes that layers repeat beside their weights, also where the traced code reads none of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, half, plan_of, run
from tests.structure.test_adversarial import Attends, AttendsAcross


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


class Settings:
    """What the engine takes for a transformers config, read while the model runs."""

    model_type = "toy"

    def __init__(self, heads):
        self.heads = heads

    def to_diff_dict(self):
        return vars(self)


class Heads(nn.Module):
    """Reads from its config how many heads its six channels are."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.up(x)
        x = x.view(*x.shape[:-1], self.config.heads, -1)
        return self.down(x.softmax(-1).flatten(-2))


class Model(nn.Module):
    """Two layers that share one config with the model."""

    def __init__(self):
        super().__init__()
        self.config = Settings(heads=3)
        self.layers = nn.ModuleList(Heads(self.config) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_share_a_config_can_be_cut_unequally():
    torch.manual_seed(0)
    model = fill(Model().eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    first, second = (name for name, group in graph.groups.items() if group.size == 3)
    plan = plan_of(graph, {first: (2,), second: (0, 1)})
    pruned = apply(model, graph, plan)
    assert [layer.config.heads for layer in pruned.layers] == [1, 2]
    assert model.config.heads == 3
    assert_close(run(pruned, graph), gated(model, graph, plan))


class WeightsAlone(nn.Module):
    """Uses what a layer holds and never calls it, so that the traced code reads no size of it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.layer.weight, self.layer.bias)
        if isinstance(self.layer, nn.RMSNorm):
            return F.rms_norm(x, x.shape[-1:], self.layer.weight)
        return F.layer_norm(x, x.shape[-1:], self.layer.weight, self.layer.bias)


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.LayerNorm(6), {"normalized_shape": (4,)}),
        (nn.RMSNorm(6), {"normalized_shape": (4,)}),
        (nn.Linear(6, 6), {"in_features": 4, "out_features": 6}),
    ],
    ids=["LayerNorm", "RMSNorm", "Linear"],
)
def test_what_other_libraries_read_of_a_layer_is_true_after_the_cut(layer, sizes):
    """LoRA, quantisers and printed models go by these; the traced code read none of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), WeightsAlone(layer), nn.Linear(6, 3))
    graph = trace(fill(model.eval()), (torch.randn(2, 5),))
    pruned = apply(model, graph, plan_of(graph, {"0:neuron": (0, 2, 3, 5)}))
    assert pruned[0].out_features == 4
    assert {name: getattr(pruned[1].layer, name) for name in sizes} == sizes


def test_an_embedding_knows_its_width():
    model = fill(nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 3)).eval())
    graph = trace(model, (torch.tensor([[1, 2], [3, 4]]),))
    (name,) = graph.groups
    pruned = apply(model, graph, plan_of(graph, {name: (0, 5)}))
    assert (pruned[0].num_embeddings, pruned[0].embedding_dim) == (7, 2)


@pytest.mark.parametrize(("kind", "widths"), [(Attends, (2, 2, 2)), (AttendsAcross, (4, 5, 5))])
def test_attention_says_the_widths_that_it_has(kind, widths):
    """Heads and their width are cut; keys may have a width of their own, which stays."""
    model = fill(kind().eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    attention = apply(model, graph, half(graph)).attention
    assert (attention.embed_dim, attention.kdim, attention.vdim) == widths
    assert attention.head_dim * attention.num_heads == attention.embed_dim
