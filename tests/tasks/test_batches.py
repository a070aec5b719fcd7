"""Batches of any nesting: one form for what loaders give, samples counted, parts cut."""

import collections
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import sosp_hub
from sosp_hub.errors import DataError
from sosp_hub.evaluate import evaluate
from sosp_hub.tasks.batches import as_batch, is_listed, num_samples, split_batch, tensors
from sosp_hub.tasks.loss import batch_loss
from tests.structure.oracles import plan_of

X, Y = torch.arange(24.0).reshape(6, 4) / 24, torch.tensor([0, 1, 2, 0, 1, 2])
Pair = collections.namedtuple("Pair", "inputs labels")
Three = collections.namedtuple("Three", "values mask labels")


@dataclasses.dataclass
class Item:
    values: torch.Tensor
    labels: torch.Tensor
    name: str = "a"


class Net(nn.Module):
    """Takes its input by position or by name, and one that it may be given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, values, mask=None):
        if isinstance(values, dict):
            values = values["a"]
        values = torch.stack(list(values)) if isinstance(values, list) else values
        values = values if mask is None else values * mask
        return {"logits": self.last(self.first(values).relu())}


def encoding(**values):
    return transformers.BatchEncoding(values)


FORMS = {
    "tuple": ((X, Y), None),
    "list": ([X, Y], None),
    "named pair": (Pair(X, Y), None),
    "two inputs": (((X, torch.ones(6, 1)), Y), None),
    "inputs by name": (({"values": X}, Y), None),
    "dict": ({"values": X, "labels": Y}, None),
    "one mask for all": ({"values": X, "mask": torch.ones(1, 4), "labels": Y}, None),
    "encoding": (encoding(values=X, labels=Y), None),
    "three named": (Three(X, torch.ones(6, 1), Y), None),
    "dataclass": (Item(X, Y), None),
    "dict of lists": ({"values": list(X), "labels": Y}, None),
    "lists alone": (
        {"values": list(X), "labels": list(Y)},
        lambda outputs, batch: F.cross_entropy(outputs["logits"], torch.stack(batch["labels"])),
    ),
    "nested targets": (
        (X, {"classes": Y, "name": ["a"] * 6}),
        lambda outputs, targets: F.cross_entropy(outputs["logits"], targets["classes"]),
    ),
    "targets as a named tuple": (
        (X, Three(X, None, Y)),
        lambda outputs, targets: F.cross_entropy(outputs["logits"], targets.labels),
    ),
    "targets as a dataclass": (
        (X, Item(X, Y)),
        lambda outputs, targets: F.cross_entropy(outputs["logits"], targets.labels),
    ),
    "a dict for each sample": (
        (list(X), [{"label": y} for y in Y]),
        lambda outputs, targets: F.cross_entropy(
            outputs["logits"], torch.stack([target["label"] for target in targets])
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_scores_and_evaluates_as_a_plain_pair(form):
    model = Net()
    batch, loss_fn = FORMS[form]
    graph = sosp_hub.trace(model, (X,))
    expected = sosp_hub.score(model, graph, [(X, Y)], "fisher", micro_batch_size=1)
    given = sosp_hub.score(model, graph, [batch], "fisher", loss_fn=loss_fn, micro_batch_size=1)
    for name, scores in expected.items():
        torch.testing.assert_close(given[name], scores)
    plain = evaluate(model, [(X, Y)], ["loss"])["loss"]
    assert evaluate(model, [batch], ["loss"], loss_fn=loss_fn)["loss"].value == pytest.approx(
        plain.value
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_counted_and_cut_into_samples(form):
    batch = as_batch(FORMS[form][0])
    assert num_samples(batch) == 6
    parts = split_batch(batch, 2)
    assert [num_samples(part) for part in parts] == [2, 2, 2]
    assert [num_samples(part) for part in split_batch(batch, 4)] == [4, 2]
    assert all(is_listed(part) == is_listed(batch) for part in parts)
    whole = [t for t in tensors(batch) if t.ndim]
    if all(len(tensor) == 6 for tensor in whole):
        for i, tensor in enumerate(whole):
            joined = torch.cat([[t for t in tensors(part) if t.ndim][i] for part in parts])
            assert torch.equal(joined, tensor)


def test_as_many_images_as_channels():
    images = [torch.full((3, 4, 4), float(i)) for i in range(3)]
    batch = (tuple(images), tuple({"label": torch.tensor(i)} for i in range(3)))
    parts = split_batch(batch, 1)
    assert [part[0][0].shape for part in parts] == [(3, 4, 4)] * 3
    assert [int(part[1][0]["label"]) for part in parts] == [0, 1, 2]


def test_inputs_alone_are_compared_with_the_models_own_outputs():
    model = Net()
    graph = sosp_hub.trace(model, (X,))
    expected = sosp_hub.score(model, graph, [{"values": X}], "sosp_h")
    for batch in (X, (X,), [X]):
        given = sosp_hub.score(model, graph, [batch], "sosp_h")
        for name, scores in expected.items():
            torch.testing.assert_close(given[name], scores)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((X, X, Y), r"a tuple of 3; expected .* of several inputs \(\(a, b\), labels\)"),
        ((X, [1, 2]), "labels as int, int"),
        ((X, Y.numpy()), "labels as ndarray"),
        ((X.numpy(), Y), "inputs as ndarray"),
        ({"values": ["a"], "labels": [1]}, "a dict of values, labels"),
        ("text", "a str"),
        ({"values": X, "maks": X, "labels": Y}, "Net takes no maks"),
    ],
)
def test_what_is_no_batch(batch, words):
    with pytest.raises(DataError, match=words):
        batch_loss(Net(), batch)


class Detector(nn.Module):
    """Like torchvision's: losses in training, boxes else."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.last = nn.Linear(3, 2)

    def forward(self, images, targets=None):
        values = self.drop(self.norm(torch.stack(images))).mean((2, 3))
        if self.training:
            labels = torch.stack([target["label"] for target in targets])
            return {
                "loss_class": F.cross_entropy(self.last(values), labels),
                "loss_size": self.last.weight.square().mean(),
            }
        return [{"scores": row} for row in self.last(values)]


NOTHING = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
VERBS = {
    **{
        name: lambda model, graph, batches, name=name: sosp_hub.score(model, graph, batches, name)
        for name in ("taylor", "fisher", "sosp_h", "sosp_i", "activation", "wanda_sp")
    },
    "evaluate": lambda model, graph, batches: sosp_hub.evaluate(model, batches),
    "rebuild": lambda model, graph, batches: sosp_hub.rebuild(
        model, graph, plan_of(graph, dict.fromkeys(graph.groups, (0, 1))), batches
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_batch_without_samples_is_told(verb):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    graph = sosp_hub.trace(model, (torch.randn(2, 4),))
    some = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(DataError, match=r"a batch has no samples \(shapes \(0, 4\), \(0,\)\)"):
        VERBS[verb](model, graph, [some, NOTHING])


def test_losses_of_a_detector_are_its_own_loss_in_either_mode():
    model = Detector().eval()
    images = tuple(torch.randn(3, 5, 5) for _ in range(4))
    batch = (images, tuple({"label": torch.tensor(i % 2)} for i in range(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = batch_loss(model, batch)
    assert set(loss.outputs) == {"loss_class", "loss_size"}
    assert loss.weight == 4
    torch.testing.assert_close(loss.value, sum(loss.outputs.values()))
    assert torch.equal(loss.value, batch_loss(model, batch).value)  # no dropout
    assert not any(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():  # no statistics either
        assert torch.equal(tensor, before[name]), name
    model.train()
    assert torch.isfinite(batch_loss(model, batch).value)
    assert all(module.training for module in model.modules())
