"""block_influence: cosines by hand, and the layers of real models."""

import itertools

import pytest
import torch
from torch import nn

from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from sosp_hub.structure.groups import Group
from tests.compare import assert_close
from tests.gates.toys import stand_in


class Turn(nn.Module):
    """Adds to its stream; called by keyword and returning a tuple, as decoder layers may be."""

    def __init__(self, angle):
        super().__init__()
        cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        self.turn = nn.Parameter(torch.stack([cos, sin, -sin, cos]).view(2, 2).double())

    def forward(self, hidden_states):
        return (3 * hidden_states @ self.turn, None)


class Stack(nn.Module):
    def __init__(self, angles):
        super().__init__()
        self.embed = nn.Embedding(5, 2).double()
        self.layers = nn.ModuleList(Turn(angle) for angle in angles)

    def forward(self, input_ids, attention_mask=None, run=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(hidden_states=x)[0]
        return {"logits": x.mean(1)}


def layers(model, name="layers"):
    names = tuple(f"{name}.{i}" for i in range(len(model.get_submodule(name))))
    return stand_in(Group(f"{name}:layer", "layer", len(names), (), (), (), names))


def test_a_layer_counts_by_the_angle_it_turns():
    model = Stack([0.1, 1.0, 0.5])
    ids = torch.randint(5, (4, 3))
    found = score(model, layers(model), [{"input_ids": ids}], "block_influence")["layers:layer"]
    assert_close(found, 1 - torch.tensor([0.1, 1.0, 0.5]).double().cos(), relative=1e-6)


class Bend(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def bends():
    model = nn.Sequential(nn.Sequential(Bend(), Bend(), Bend()), nn.Flatten(), nn.Linear(20, 3))
    return model.double()


def test_the_mean_runs_over_tokens_batches_and_processes():
    model = bends()
    x, y = torch.randn(6, 5, 4).double(), torch.zeros(6, dtype=torch.long)
    streams = [x]
    for layer in model[0]:
        streams.append(layer(streams[-1]))
    expected = torch.stack(
        [1 - torch.cosine_similarity(a, b, -1).mean() for a, b in itertools.pairwise(streams)]
    )
    found = score(model, layers(model, "0"), [(x[:1], y[:1]), (x[1:], y[1:])], "block_influence")
    assert_close(found["0:layer"], expected, relative=1e-9)
    sent = []
    score(
        model, layers(model, "0"), [(x[:4], y[:4])], "block_influence",
        process_sum=lambda flat: sent.append(flat) or flat,
    )  # fmt: skip
    found = score(
        model, layers(model, "0"), [(x[4:], y[4:])], "block_influence",
        process_sum=lambda flat: flat + sent[0],
    )  # fmt: skip
    assert_close(found["0:layer"], expected, relative=1e-9)


def test_maps_are_compared_whole():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)), nn.Flatten())
    x = torch.randn(3, 2, 4, 4)
    found = score(model, layers(model, "0"), [(x, torch.zeros(3))], "block_influence")["0:layer"]
    cosine = torch.cosine_similarity(x.flatten(1), model[0][0](x).flatten(1), 1)
    assert_close(found[0], 1 - cosine.mean(), relative=1e-6)


def test_padding_does_not_count():
    model = Stack([0.3, 0.4])
    model.layers[0].forward = lambda hidden_states: (hidden_states.roll(1, -1) ** 2, None)
    ids = torch.randint(4, (3, 4))
    wanted = score(model, layers(model), [{"input_ids": ids}], "block_influence")
    long = torch.cat([torch.full((3, 2), 4), ids], 1)
    mask = (torch.arange(6) >= 2).long().expand(3, 6)
    batch = {"input_ids": long, "attention_mask": mask}
    assert_close(score(model, layers(model), [batch], "block_influence"), wanted, relative=1e-9)
    batch["attention_mask"] = mask.clone().fill_(1)
    with pytest.raises(AssertionError):
        assert_close(score(model, layers(model), [batch], "block_influence"), wanted, relative=1e-6)


def test_what_cannot_be_scored_is_said():
    model = Stack([0.1, 0.2]).train()
    batch = {"input_ids": torch.randint(5, (2, 3))}
    with pytest.raises(CriterionError, match="no calibration data"):
        score(model, layers(model), [], "block_influence")
    model.spare = nn.ModuleList([Bend(), Bend()])
    with pytest.raises(CriterionError, match=r"layer 'spare.0' did not run"):
        score(model, layers(model, "spare"), [batch], "block_influence")
    model.spare = nn.ModuleList(
        [*model.layers[:1], Bend()]
    )  # one that runs hides none that does not
    with pytest.raises(CriterionError, match=r"layer 'spare.1' did not run"):
        score(model, layers(model, "spare"), [batch], "block_influence")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
