"""Tiny models whose forward pass takes gates, written out: the oracle of the hooks.

Each toy is float64 and smooth, and comes with hand-made groups, so that nothing here depends on
how a trace finds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sosp_hub.structure.groups import Group, Member, Site


def group(name: str, kind: str, size: int, sites: list, members: list = ()) -> Group:
    """Sites as (module or parameter, dim, index), members as (tensor, dim, index, reads)."""
    index = np.arange(size)
    return Group(
        name,
        kind,
        size,
        tuple(
            Member(tensor, dim, index if at is None else np.asarray(at), reads)
            for tensor, dim, at, reads in members
        ),
        tuple(
            Site(
                None if where.endswith("weight") else where,
                where if where.endswith("weight") else None,
                dim,
                index if at is None else np.asarray(at),
            )
            for where, dim, at in sites
        ),
    )


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, gates: Mapping[str, Tensor] | None = None) -> Tensor:
        gates = gates or {}
        x = F.gelu(self.a(x)) * gates.get("a", 1.0)
        return self.c(torch.tanh(self.b(x)) * gates.get("b", 1.0))


class Residual(nn.Module):
    """A convolution whose channels a block adds to, read in two places; BatchNorm in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.one, self.one_bn = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.two, self.two_bn = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)

    def forward(self, x: Tensor, gates: Mapping[str, Tensor] | None = None) -> Tensor:
        stream = (gates or {}).get("stream", torch.ones(4)).view(-1, 1, 1)
        inner = (gates or {}).get("inner", torch.ones(6)).view(-1, 1, 1)
        x = F.silu(self.stem_bn(self.stem(x)))
        y = F.silu(self.one_bn(self.one(x * stream)))
        y = self.two_bn(self.two(F.softplus(self.depthwise(y)) * inner))
        x = F.gelu(F.avg_pool2d(x, 2) + y)
        return self.head(x.mean((2, 3)) * stream.flatten())


class Attention(nn.Module):
    """One block: two heads of three channels, masked, and a gated MLP whose last weight is raw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm2, self.up, self.act = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.down = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor, gates: Mapping[str, Tensor] | None = None) -> Tensor:
        heads = (gates or {}).get("heads", torch.ones(2)).repeat_interleave(3)
        neurons = (gates or {}).get("neurons", torch.ones(4))
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2) * heads)
        y = self.norm2(x)
        y = F.silu(self.act(y)) * self.up(y) * neurons
        x = x + F.linear(y, self.down.weight, self.down.bias)  # not through the module
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Toy:
    model: nn.Module
    graph: Any
    batch: tuple[Tensor, Tensor]

    @property
    def groups(self) -> dict[str, Group]:
        return self.graph.groups

    @property
    def num_structures(self) -> int:
        return sum(group.size for group in self.groups.values())

    def ones(self) -> Tensor:
        return torch.ones(self.num_structures, dtype=torch.float64)

    def split(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([group.size for group in self.groups.values()], -1)
        return dict(zip(self.groups, parts, strict=True))

    def logits(self, row: Tensor) -> Tensor:
        return self.model(self.batch[0], self.split(row))

    def loss(self, row: Tensor) -> Tensor:
        """The loss as a function of all gates in a row."""
        return F.cross_entropy(self.logits(row), self.batch[1])

    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, self.ones())

    def gradient(self) -> Tensor:
        return torch.autograd.functional.jacobian(self.loss, self.ones())


def stand_in(*groups: Group) -> Any:
    """What a criterion needs of a graph."""
    return SimpleNamespace(groups={group.name: group for group in groups})


class Tokens(nn.Module):
    """A perceptron at each token, whose tokens then see those before; rows of all, or apart."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 7)
        self.flat = flat

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.table(ids)).tanh()
        x = self.down(x.flatten(0, 1) if self.flat else x).view(*ids.shape, -1)
        return x.cumsum(1) * x


def _toy(model: nn.Module, inputs: Tensor, *groups: Group) -> Toy:
    labels = torch.arange(len(inputs)) % 3
    return Toy(model.double().eval(), stand_in(*groups), (inputs.double(), labels))


def perceptron(num_samples: int = 7) -> Toy:
    a = group(
        "a",
        "neuron",
        5,
        [("b", -1, None)],
        [("a.weight", 0, None, False), ("b.weight", 1, None, True)],
    )
    b = group(
        "b",
        "neuron",
        3,
        [("c", -1, None)],
        [("b.weight", 0, None, False), ("c.weight", 1, None, True)],
    )
    return _toy(Perceptron(), torch.randn(num_samples, 4), a, b)


def residual(num_samples: int = 5) -> Toy:
    stream = group(
        "stream",
        "channel",
        4,
        [("one", 1, None), ("head", -1, None)],
        [
            ("stem.weight", 0, None, False),
            ("stem_bn.weight", 0, None, False),
            ("one.weight", 1, None, True),
            ("two.weight", 0, None, False),
            ("two.bias", 0, None, False),
            ("head.weight", 1, None, True),
        ],
    )
    inner = group(
        "inner",
        "channel",
        6,
        [("two", 1, None)],
        [("one.weight", 0, None, False), ("two.weight", 1, None, True)],
    )
    return _toy(Residual(), torch.randn(num_samples, 2, 6, 6), stream, inner)


def attention(num_samples: int = 4) -> Toy:
    of_head = np.arange(6) // 3
    heads = group(
        "heads",
        "head",
        2,
        [("out", -1, of_head)],
        [("qkv.weight", 0, np.tile(of_head, 3), False), ("out.weight", 1, of_head, True)],
    )
    neurons = group(
        "neurons",
        "neuron",
        4,
        [("down.weight", 1, None)],
        [("up.weight", 0, None, False), ("down.weight", 1, None, True)],
    )
    return _toy(Attention(), torch.randn(num_samples, 5, 6), heads, neurons)


TOYS: dict[str, Callable[..., Toy]] = {
    "perceptron": perceptron,
    "residual": residual,
    "attention": attention,
}
