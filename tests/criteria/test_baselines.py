"""Criteria on gates and on weights, in closed form or by brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sosp_hub.derivatives import Protocol, sample_squares
from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from tests.compare import assert_close
from tests.criteria.processes import in_processes
from tests.gates.toys import Tokens, attention, group, perceptron, residual, stand_in


def of_one_sample(toy, i):
    """The gate gradient of one sample's loss, from the forward pass that is written out."""

    def loss(row):
        inputs, labels = toy.batch
        logits = toy.model(inputs[i : i + 1], toy.split(row))
        return F.cross_entropy(logits, labels[i : i + 1])

    return torch.autograd.functional.jacobian(loss, toy.ones())


def test_fisher_takes_one_sample_at_a_time():
    """Also where the gates sit on a weight that samples share, as in attention's second layer."""
    for make in (perceptron, residual, attention):
        toy = make(num_samples=6)
        rows = torch.stack([of_one_sample(toy, i) for i in range(6)])
        found = score(toy.model, toy.graph, [toy.batch], "fisher", loss_fn=F.cross_entropy)
        assert_close(found, toy.split(rows.square().mean(0)), relative=1e-9)
        assert_close(in_processes(toy, "fisher"), found, relative=1e-9)


def test_fisher_of_tokens_is_that_of_each_token():
    torch.manual_seed(0)
    model, ids = Tokens(False).double(), torch.randint(7, (4, 3))
    graph = stand_in(group("a", "neuron", 5, [("down", -1, None)]))
    batches = [(ids, ids)]

    def loss_fn(outputs, labels):
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    of_tokens, whole = (
        sample_squares(model, graph.groups, batches, Protocol(loss_fn), per_token=each).second
        for each in (True, False)
    )
    assert (of_tokens["a"] > 1.1 * whole["a"]).any()
    found = score(model, graph, batches, "fisher", per_token=True, loss_fn=loss_fn)
    assert_close(found, of_tokens, relative=1e-9)
    assert_close(score(model, graph, batches, "fisher", loss_fn=loss_fn), whole, relative=1e-9)


def test_fisher_takes_no_more_samples_at_once_than_it_may():
    toy, sizes = perceptron(num_samples=6), []

    def loss_fn(outputs, labels):
        sizes.append(len(labels))
        return F.cross_entropy(outputs, labels)

    whole = score(toy.model, toy.graph, [toy.batch], "fisher", loss_fn=loss_fn)
    assert sizes == [6]
    options = {"micro_batch_size": 2, "loss_fn": loss_fn}
    found = score(toy.model, toy.graph, [toy.batch], "fisher", **options)
    assert sizes == [6, 2, 2, 2]
    assert_close(found, whole, relative=1e-9)


def test_lamp():
    toy = residual()
    found = score(toy.model, toy.graph, [], "lamp")["inner"]
    squares = toy.model.one.weight.square().sum((1, 2, 3)).tolist()
    expected = [square / sum(other for other in squares if other >= square) for square in squares]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), relative=1e-12)
    assert found.max() == 1
    toy.model.one.weight.data[1:3] = toy.model.one.weight.data[3]  # of equal norm
    toy.model.one.weight.data[4] = 0
    found = score(toy.model, toy.graph, [], "lamp")["inner"]
    assert found[1] == found[2] == found[3]
    assert found[4] == 0


def test_fpgm():
    toy = residual()
    found = score(toy.model, toy.graph, [], "fpgm", standardize=False)
    parts = [toy.model.stem.weight.flatten(1), toy.model.two.weight.flatten(1)]
    for name, whole in (("stream", torch.cat(parts, 1)), ("inner", toy.model.one.weight)):
        expected = [sum((a - b).norm() for b in whole.flatten(1)) for a in whole.flatten(1)]
        assert_close(found[name], torch.stack(expected), relative=1e-9)


def test_fpgm_of_a_head_takes_all_its_rows():
    toy = attention()
    found = score(toy.model, toy.graph, [], "fpgm", kinds=["head"], standardize=False)
    rows = toy.model.qkv.weight.unflatten(0, (3, 2, 3))
    assert_close(found["heads"], (rows[:, 0] - rows[:, 1]).norm().repeat(2), relative=1e-9)
    found = score(toy.model, toy.graph, [], "fpgm", kinds=["head"])
    assert_close(found["heads"], torch.zeros(2), relative=0)  # two are as far from one another


def test_fpgm_has_memory_for_a_part_of_the_distances(monkeypatch):
    toy = residual()
    whole = score(toy.model, toy.graph, [], "fpgm")
    monkeypatch.setattr("sosp_hub.criteria.fpgm._ROWS", 4)
    assert_close(score(toy.model, toy.graph, [], "fpgm"), whole, relative=1e-12)
    for scores in whole.values():
        assert_close(scores.mean() + 1, 1.0, relative=1e-12)
        assert_close(scores.square().mean(), 1.0, relative=1e-12)


def test_fpgm_refuses_filters_of_different_shapes():
    uneven = np.array([0, 0, 1, 2, 2, 2])
    toy = residual()
    graph = stand_in(group("g", "channel", 3, [], [("one.weight", 0, uneven, False)]))
    with pytest.raises(CriterionError, match=r"'g' \(channel\): its structures have filters"):
        score(toy.model, graph, [], "fpgm")


def test_grasp():
    for make in (perceptron, residual, attention):
        toy = make()
        expected = toy.hessian() @ toy.gradient()
        found = score(toy.model, toy.graph, [toy.batch], "grasp", loss_fn=F.cross_entropy)
        assert_close(found, toy.split(expected), relative=1e-9)
        near = score(
            toy.model, toy.graph, [toy.batch], "grasp",
            loss_fn=F.cross_entropy, mode="differences", eps=1e-3,
        )  # fmt: skip
        assert_close(near, toy.split(expected), relative=1e-4)
        assert_close(in_processes(toy, "grasp"), found, relative=1e-9)


def test_grasp_is_the_change_of_the_squared_gradient():
    toy = perceptron()
    found = score(toy.model, toy.graph, [toy.batch], "grasp", loss_fn=F.cross_entropy)

    def squared_gradient(row):
        (g,) = torch.autograd.grad(toy.loss(row), row, create_graph=True)
        return g.square().sum()

    change = torch.autograd.functional.jacobian(squared_gradient, toy.ones()) / 2
    assert_close(found, toy.split(change), relative=1e-9)


def test_hap_of_structures_that_do_not_interact():
    # L = 1/2 mean_n sum_s (m_s a_s x_ns - y_ns)^2, so H_ss = mean_n (a_s x_ns)^2, H_st = 0
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    for layer in model:
        layer.weight.data = torch.diag(torch.randn(3).double())
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    graph = stand_in(group("g", "neuron", 3, [("1", -1, None)]))
    found = score(
        model, graph, [(x, y)], "hap", num_probes=1,
        loss_fn=lambda f, y: (f - y).square().sum() / len(y) / 2,
    )  # fmt: skip
    assert_close(found["g"], model(x).square().mean(0) / 2, relative=1e-9)


@pytest.mark.slow
def test_hap_is_the_diagonal_and_noise_that_shrinks():
    toy = perceptron()
    hessian = toy.hessian()
    options = {"loss_fn": F.cross_entropy, "num_probes": 400}
    found = torch.cat(list(score(toy.model, toy.graph, [toy.batch], "hap", **options).values()))
    noise = (hessian.square().sum(1) - hessian.diag().square()) / 400
    assert ((2 * found - hessian.diag()).abs() < 5 * noise.sqrt()).all()
    assert (hessian.diag().abs() > 5 * noise.sqrt()).any()  # else zeros would pass
    few = {seed: score(toy.model, toy.graph, [toy.batch], "hap", seed=seed) for seed in (0, 1)}
    assert not torch.equal(few[0]["a"], few[1]["a"])
    assert_close(in_processes(toy, "hap"), few[0], relative=1e-9)


@pytest.mark.parametrize("name", ["grasp", "hap"])
def test_data_that_is_gone_after_one_pass_is_refused(name):
    toy = perceptron()
    with pytest.raises(CriterionError, match=rf"'{name}' goes through .* given a list_iterator"):
        score(toy.model, toy.graph, iter([toy.batch]), name)
