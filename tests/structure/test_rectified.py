"""Channels behind a BatchNorm and a ReLU: with the pair switched off, their readers see zeros."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import sosp_hub.zoo.timm
from sosp_hub.structure.trace import trace

assert sosp_hub.zoo.timm  # registers the CIFAR ResNets


class Pair(nn.Module):
    """A convolution whose channels a second one reads, as ``between`` hands them on."""

    def __init__(self, between, norm=nn.BatchNorm2d):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 4, 1)
        self.side, self.between = nn.Conv2d(3, 8, 3), between

    def forward(self, x):
        return self.two(self.between(self, self.one(x), x)).mean((2, 3))


def plain(self, y, x):
    return F.relu(self.norm(y))


PAIRS = {
    "relu": (plain, True),
    "relu6": (lambda self, y, x: nn.ReLU6()(self.norm(y)), True),
    "pooled": (lambda self, y, x: F.max_pool2d(plain(self, y, x), 2), True),
    "dropout": (lambda self, y, x: F.dropout(plain(self, y, x), training=self.training), True),
    "leaky": (lambda self, y, x: F.leaky_relu(self.norm(y)), False),
    "hardtanh below zero": (lambda self, y, x: F.hardtanh(self.norm(y)), False),
    "no relu": (lambda self, y, x: self.norm(y), False),
    "relu first": (lambda self, y, x: self.norm(F.relu(y)), False),
    "an addition between": (lambda self, y, x: F.relu(self.norm(y) + self.side(x)), False),
    "an addition behind": (lambda self, y, x: plain(self, y, x) + self.side(x), False),
    "of another tensor": (lambda self, y, x: (self.norm(y), F.relu(y))[1], False),
    "twice": (lambda self, y, x: plain(self, y, x) + F.relu(self.norm(self.side(x))), True),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_a_pair(name):
    between, is_pair = PAIRS[name]
    group = trace(Pair(between), (torch.randn(2, 3, 8, 8),)).groups["one:channel"]
    assert group.rectified == (("norm",) if is_pair else ())


def test_other_norms_are_no_pair():
    for norm in (nn.InstanceNorm2d, lambda n: nn.BatchNorm2d(n, affine=False)):
        graph = trace(Pair(plain, norm), (torch.randn(2, 3, 8, 8),))
        assert not any(group.rectified for group in graph.groups.values())


MODELS = {  # with the number of groups behind pairs
    "cifar_resnet20": (32, 9),
    "test_resnet": (32, 7),
    "test_byobnet": (32, None),
    "mobilenetv2_035": (32, 18),
    "densenet121": (32, 120),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_readers_see_zeros_where_the_pair_is_off(name):
    size, expected = MODELS[name]
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, size, size)
    groups = [group for group in trace(model, (x,)).groups.values() if group.rectified]
    assert expected in (None, len(groups))
    seen = {}
    for module_name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, name=module_name: seen.update({name: args[0]})
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group in groups:
            for norm in group.rectified:
                for member in group.members:
                    if member.tensor.startswith(f"{norm}.") and member.tensor in parameters:
                        off = torch.from_numpy(member.index) == 1
                        parameters[member.tensor][off] = -1.0 if "bias" in member.tensor else 0.0
        model(x)
    for group in groups:
        for site in group.sites:
            read = seen[site.module].movedim(site.dim, -1)
            assert not read[..., site.index == 1].any(), (group.name, site.module)
