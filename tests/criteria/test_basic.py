"""sosp_h, taylor, magnitude, random in closed form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sosp_hub.scoring import score
from tests.compare import assert_close
from tests.gates.toys import TOYS, group, perceptron, residual, stand_in


def test_sosp_h_is_gradient_and_row_sums():
    for make in TOYS.values():
        toy = make()
        found = score(toy.model, toy.graph, [toy.batch], "sosp_h", loss_fn=F.cross_entropy)
        expected = toy.gradient().abs() + 0.5 * toy.hessian().sum(1).abs()
        assert_close(found, toy.split(expected), relative=1e-9)


def test_sosp_h_of_a_linear_net_by_hand():
    # L = 1/2 (sum_s m_s w_s x - y)^2:  g_s = (f - y) w_s x,  r_s = w_s x f  with f the output
    first, second = nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)
    model = nn.Sequential(first, second).double()
    w = (first.weight[:, 0] * second.weight[0]).detach()
    graph = stand_in(group("w", "neuron", 3, [("1", -1, None)]))
    x, y = torch.tensor([[2.0]]).double(), torch.tensor([[0.5]]).double()
    found = score(model, graph, [(x, y)], loss_fn=lambda f, y: (f - y).square().mean() / 2)
    f = 2 * w.sum()
    expected = ((f - 0.5) * w * 2).abs() + 0.5 * (w * 2 * f).abs()
    assert_close(found["w"], expected, relative=1e-12)


def test_the_step_of_the_differences_is_the_one_that_was_asked_for():
    """Central differences of the gradient, by hand; a large step differs from the derivative."""
    toy = perceptron()
    sizes = {name: g.size for name, g in toy.graph.groups.items()}

    def gradient(at):
        gates = {n: (at * torch.ones(s).double()).requires_grad_() for n, s in sizes.items()}
        loss = F.cross_entropy(toy.model(toy.batch[0], gates), toy.batch[1])
        return dict(zip(gates, torch.autograd.grad(loss, [*gates.values()]), strict=True))

    found = {}
    for eps in (0.5, 0.01):
        options = {"mode": "differences", "eps": eps, "loss_fn": F.cross_entropy}
        found[eps] = score(toy.model, toy.graph, [toy.batch], "sosp_h", **options)
        high, low = gradient(1 + eps), gradient(1 - eps)
        expected = {
            n: ((high[n] + low[n]) / 2).abs() + ((high[n] - low[n]) / (2 * eps)).abs() / 2
            for n in sizes
        }
        assert_close(found[eps], expected, relative=1e-9)
    assert (found[0.5]["a"] - found[0.01]["a"]).abs().max() > 1e-3 * found[0.5]["a"].max()


def test_the_papers_gates_multiply_the_filters():
    """``gate: weight``: the curvature is that of a filter's scale, not the activation's."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    graph = stand_in(group("n", "neuron", 4, [("2", -1, None)], [("0.weight", 0, None, False)]))

    def loss(gate):
        weights = {"0.weight": model[0].weight.detach() * gate[:, None]}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    ones = torch.ones(4).double()
    gradient = torch.autograd.functional.jacobian(loss, ones)
    rows = torch.autograd.functional.hessian(loss, ones).sum(1)
    options = {"gate": "weight", "loss_fn": F.cross_entropy}
    found = score(model, graph, [(x, y)], "sosp_h", **options)
    assert_close(found["n"], gradient.abs() + rows.abs() / 2, relative=1e-9)


def test_absolute_values_come_after_the_mean():
    toy = perceptron()
    inputs, labels = toy.batch
    parts = [(inputs[:3], labels[:3]), (inputs[3:], labels[3:])]
    for name in ("sosp_h", "taylor"):
        whole = score(toy.model, toy.graph, [toy.batch], name, loss_fn=F.cross_entropy)
        assert_close(
            score(toy.model, toy.graph, parts, name, loss_fn=F.cross_entropy), whole, relative=1e-9
        )


def test_taylor():
    toy = residual()
    inputs, labels = toy.batch
    found = score(toy.model, toy.graph, [toy.batch], "taylor", loss_fn=F.cross_entropy)
    assert_close(found, toy.split(toy.gradient().abs()), relative=1e-9)
    parts = [(inputs[:1], labels[:1]), (inputs[1:], labels[1:])]
    squares = []
    for x, y in parts:
        part = residual()
        part.model.load_state_dict(toy.model.state_dict())
        squares.append(type(part)(part.model, part.graph, (x, y)).gradient().square() * len(y))
    found = score(toy.model, toy.graph, parts, "taylor", form="squared", loss_fn=F.cross_entropy)
    assert_close(found, toy.split(sum(squares) / 5), relative=1e-9)


def test_scores_are_zero_in_train_mode_and_so_eval_mode_is_used():
    """Why the mode is switched: BatchNorm in train mode undoes any scale of a filter."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)
    )
    model.double().train()
    x, y = torch.randn(4, 2, 6, 6).double(), torch.tensor([0, 1, 1, 0])
    gate = torch.ones(3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    weights = {"0.weight": model[0].weight.detach() * gate}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    (gradient,) = torch.autograd.grad(loss, gate)
    assert gradient.abs().max() < 1e-5
    graph = stand_in(group("c", "channel", 3, [], [("0.weight", 0, None, False)]))
    found = score(model, graph, [(x, y)], "taylor", gate="weight", loss_fn=F.cross_entropy)
    assert found["c"].min() > 1e-4


def test_magnitude():
    toy = residual()
    found = score(toy.model, toy.graph, [], "magnitude")
    model = toy.model
    squares = model.stem.weight.square().sum((1, 2, 3)) + model.two.weight.square().sum((1, 2, 3))
    assert_close(found["stream"], squares.sqrt(), relative=1e-12)
    assert_close(found["inner"], model.one.weight.flatten(1).norm(dim=1), relative=1e-12)


def test_magnitude_of_a_head_takes_all_its_rows():
    toy = TOYS["attention"]()
    found = score(toy.model, toy.graph, [], "magnitude")
    rows = toy.model.qkv.weight.unflatten(0, (3, 2, 3)).square().sum((0, 2, 3))
    assert_close(found["heads"], rows.sqrt(), relative=1e-12)


def test_magnitude_over_the_mean_of_its_group():
    toy = residual()
    found = score(toy.model, toy.graph, [], "magnitude", normalize="mean")
    norms = toy.model.one.weight.flatten(1).norm(dim=1)
    assert_close(found["inner"], norms * len(norms) / norms.sum(), relative=1e-12)
    assert_close(found["stream"].mean().item(), 1.0, relative=1e-12)


@pytest.mark.parametrize("name", ["magnitude", "lamp", "fpgm"])
def test_a_complex_weight_scores_as_its_two_real_ones(name):
    """The imaginary part counts too."""
    real = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(4, 2)).double()
    made = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2)).double()
    parts = real[0].weight.detach().unflatten(0, (4, 2))
    made[0].weight = nn.Parameter(torch.complex(parts[:, 0], parts[:, 1]))
    two = stand_in(group("a", "neuron", 4, [], [("0.weight", 0, np.arange(8) // 2, False)]))
    one = stand_in(group("a", "neuron", 4, [], [("0.weight", 0, None, False)]))
    expected = score(real, two, [], name)["a"]
    assert_close(score(made, one, [], name)["a"], expected, relative=1e-12)


def test_random_follows_the_seed():
    toy = perceptron()
    one = score(toy.model, toy.graph, [], "random", seed=1)
    assert_close(one, score(toy.model, toy.graph, [], "random", seed=1), relative=0)
    assert not torch.equal(one["a"], score(toy.model, toy.graph, [], "random", seed=2)["a"])
