"""Modules of no library, with what makes saving them hard."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


class Net(nn.Module):
    """Tied tensors, a buffer that no state holds, batch norm, a constant."""

    def __init__(self, width=16, activation=nn.ReLU):
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.conv = nn.Conv1d(width, 24, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
        self.act = activation()
        self.down = nn.Linear(24, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.linspace(1, 2, 24), persistent=False)
        self.register_buffer("order", torch.arange(7), persistent=False)

    def forward(self, tokens):
        hidden = self.norm(self.conv(self.table(tokens).transpose(1, 2)))
        return self.head(self.down(self.act(hidden).transpose(1, 2) * self.scale))


class Block(nn.Sequential):
    """Adds to a stream."""

    def __init__(self):
        super().__init__(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, hidden):
        return hidden + super().forward(hidden)


class Stack(nn.Module):
    """Layers that can be left out."""

    def __init__(self, num_layers=4):
        super().__init__()
        self.first = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(num_layers))
        self.last = nn.Linear(8, 3)

    def forward(self, tokens):
        hidden = self.first(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)


class Inside(nn.Module):
    """A model within another."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or Net()
        self.last = nn.Linear(20, 5)

    def forward(self, tokens):
        return self.last(self.net(tokens).relu())


class Mixed(Net, PyTorchModelHubMixin):
    """Saves and loads itself."""

    def __init__(self, width: int = 16):
        super().__init__(width)


class MixedWithout(Net, PyTorchModelHubMixin):
    """Has nothing to say in a config."""

    def __init__(self):
        super().__init__()


class MixedWithAll(Net, PyTorchModelHubMixin):
    """Is given whatever the config holds."""

    def __init__(self, width: int = 16, **others):
        assert not others, others
        super().__init__(width)


class Exact(nn.Module):
    """Half precision, and a whole number among the parameters' tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.register_buffer("steps", torch.tensor(3))
        self.to(torch.bfloat16)

    def forward(self, values):
        return self.last(self.first(values).relu())


TOKENS = (torch.arange(14).reshape(2, 7) % 20,)
VALUES = (torch.linspace(-1, 1, 24).reshape(4, 6).bfloat16(),)
