"""The table of standard layers is true in both directions, for torch's own layers as they are."""

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from sosp_hub.standard_layers import standard_layer

LAYERS = [
    nn.Linear(3, 4),
    nn.Linear(3, 4, bias=False),
    nn.Conv1d(4, 6, 5, groups=2),
    nn.Conv2d(4, 6, (3, 1)),
    nn.Conv3d(4, 4, 1, groups=4),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.BatchNorm2d(5),
    nn.BatchNorm1d(5, affine=False),
    nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
    nn.GroupNorm(2, 4),
    nn.LayerNorm((3, 4)),
    nn.RMSNorm(4),
    nn.Embedding(7, 3),
    Conv1D(6, 4),
]


@pytest.mark.parametrize("module", LAYERS, ids=str)
def test_sizes_and_shapes_are_those_of_the_layer(module):
    layer = standard_layer(module)
    weight = next(
        iter({**dict(module.named_parameters()), **dict(module.named_buffers())}.values())
    )
    sizes = layer.sizes(module, tuple(weight.shape))
    assert sizes == {name: getattr(module, name) for name in sizes}
    assert sizes
    shapes = layer.shapes(module, vars(module))
    tensors = {n: t for n, t in module.state_dict().items() if n != "num_batches_tracked"}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shapes[name] for name in tensors
    }


def test_of_other_classes_nothing_is_known():
    assert standard_layer(nn.ReLU()) is None
    assert standard_layer(nn.MultiheadAttention(4, 2)) is None
