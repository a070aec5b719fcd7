"""A copied model against what ``copy.deepcopy`` makes of it, object by object."""

import copy
from collections import OrderedDict
from types import FunctionType, MethodType, NoneType

import pytest
import timm
import torch
import transformers as tf
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sosp_hub.structure.copies import copy_model

SIZES = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


class Odd(nn.Module):
    """Shares containers, also empty ones, between modules, and refers to its parent."""

    def __init__(self):
        super().__init__()
        self.cache, self.seen = {}, []
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3)
        for module in (self.up, self.down):
            module.cache, module.parent = self.cache, [self]  # a list: not a submodule
        self.down.bias = self.up.bias
        self.up.register_forward_hook(self.note)
        self.down._forward_hooks = self.up._forward_hooks

    def note(self, *_):
        self.seen.append(1)


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo):
        twin = type(self)(3, 4)
        twin.label = "own"
        memo[id(self)] = twin
        return twin


class OwnState(nn.Linear):
    def __getstate__(self):
        return {**vars(self), "label": "state"}


class OwnRestored(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__({**state, "label": "restored"})


class OwnReduced(nn.Linear):
    def __reduce__(self):
        return OwnReduced, (5, 6)


class Slotted(nn.Linear):
    __slots__ = ("label",)


class OwnTable(OrderedDict):
    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __deepcopy__(self, memo):
        return OwnTable("copied")


def slotted():
    model = Slotted(3, 4)
    model.label = ["slot"]
    return model


def with_own_table():
    model = nn.Linear(3, 4)
    model._forward_hooks = OwnTable("first")
    return model


MODELS = {
    "resnet": lambda: timm.create_model("resnet10t"),
    "lstm": lambda: nn.LSTM(3, 4),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "odd": Odd,
    "own copy": lambda: nn.Sequential(OwnCopy(3, 4)),
    "own state": lambda: nn.Sequential(OwnState(3, 4)),
    "own restored": lambda: nn.Sequential(OwnRestored(3, 4)),
    "own reduced": lambda: nn.Sequential(OwnReduced(3, 4)),
    "slots": lambda: nn.Sequential(slotted()),
    "own table": with_own_table,
    "weight norm": lambda: weight_norm(nn.Linear(3, 4)),
}


def parts_of(value):
    """What an object consists of: pairs of a name and a value."""
    if isinstance(value, dict):
        parts = [*value.items()]
    elif isinstance(value, list | tuple):
        parts = [*enumerate(value)]
    else:
        parts = []
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__") or ()]
    parts += [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*parts, *getattr(value, "__dict__", {}).items()]


def told(value, seen, path="model"):
    """Each object that is reached, with its number in order of the first visit, and what it is."""
    if isinstance(value, type | FunctionType | torch.dtype | set | int | float | str | NoneType):
        yield path, value
        return
    if isinstance(value, MethodType):
        yield path, value.__func__
        yield from told(value.__self__, seen, path)
        return
    number, known = [*seen].index(id(value)) if id(value) in seen else len(seen), id(value) in seen
    seen[id(value)] = value
    yield path, type(value), number
    if known:
        return
    if isinstance(value, torch.Tensor):
        yield path, value.shape, value.requires_grad, float(value.detach().double().sum())
    for name, part in parts_of(value):
        yield from told(part, seen, f"{path}.{name}")


def copied(copy_of, model):
    torch.manual_seed(0)  # what is built anew has weights of its own
    return copy_of(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_what_deepcopy_gives(name):
    model = MODELS[name]()
    expected = copied(copy.deepcopy, model)
    assert [*told(copied(copy_model, model), {})] == [*told(expected, {})]


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_shares_nothing_that_can_be_written_to(name):
    model = MODELS[name]()
    theirs, own = {}, {}
    assert [*told(model, theirs), *told(copy_model(model), own)]
    shared = [own[place] for place in own.keys() & theirs.keys()]
    assert [value for value in shared if not isinstance(value, tuple)] == []
