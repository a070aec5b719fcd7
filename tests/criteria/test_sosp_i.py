"""SOSP-I: orders against brute force, compensation against least squares, folding against gates."""

import copy

import pytest
import torch
import torch.nn.functional as F

import sosp_hub
from sosp_hub.criteria.elimination import Floors, compensation, greedy_order, surgeon_order
from sosp_hub.criteria.registry import make_criterion, score
from sosp_hub.criteria.sosp_i import compensate
from sosp_hub.derivatives import Protocol, gauss_newton
from sosp_hub.errors import CriterionError
from sosp_hub.gates import fold_, gated
from sosp_hub.plan import PruningPlan
from tests.cases import with_trait
from tests.compare import assert_close
from tests.gates.toys import TOYS, attention, group, perceptron, stand_in


def _matrix(size, rank=None):
    factor = torch.randn(rank or size + 2, size, dtype=torch.float64)
    return factor.T @ factor / len(factor)


def test_row_sums_by_hand():
    toy = perceptron()
    found = score(toy.model, toy.graph, [toy.batch], "sosp_i", loss_fn=F.cross_entropy)
    q = gauss_newton(toy.model, toy.groups, [toy.batch], Protocol(loss_fn=F.cross_entropy)).matrix
    assert_close(found, toy.split(toy.gradient().abs() + q.abs().sum(1) / 2), relative=1e-9)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_greedy_takes_the_least_growth_of_the_set_saliency(with_gradient):
    matrix, gradient = _matrix(6), torch.randn(6, dtype=torch.float64)
    q = matrix.abs() if with_gradient else matrix

    def saliency(chosen):
        first = gradient[chosen].abs().sum() if with_gradient else 0
        return first + q[chosen][:, chosen].sum() / 2

    expected: list[int] = []
    for _ in range(5):
        rest = [s for s in range(6) if s not in expected]
        expected.append(min(rest, key=lambda s: saliency([*expected, s])))
    order = greedy_order(matrix, Floors([6], 0.0), gradient if with_gradient else None)
    assert order == expected


def _best_gates(matrix, removed, damping):
    """The gates of least damped quadratic loss with some at 0, by solving for them."""
    kept = [s for s in range(len(matrix)) if s not in removed]
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)).double()
    gates = torch.zeros(len(matrix)).double()
    right = damped[kept][:, list(removed)].sum(1)
    gates[kept] = 1 + torch.linalg.solve(damped[kept][:, kept], right)
    change = gates - 1
    return gates, change @ damped @ change / 2


@pytest.mark.parametrize("rank", [None, 3])
def test_surgeon_takes_the_least_loss_after_compensation(rank, monkeypatch):
    monkeypatch.setattr("sosp_hub.criteria.elimination.BLOCK", 2)
    matrix = _matrix(7, rank)
    expected: list[int] = []
    for _ in range(6):
        rest = [s for s in range(7) if s not in expected]
        expected.append(min(rest, key=lambda s: _best_gates(matrix, [*expected, s], 0.05)[1]))
    assert surgeon_order(matrix, Floors([7], 0.0), damping=0.05) == expected


def test_compensation_is_the_best_set_of_gates():
    matrix = _matrix(6, rank=4)
    kept = torch.tensor([True, False, True, True, False, True])
    expected, _ = _best_gates(matrix, [1, 4], 0.1)
    assert_close(compensation(matrix, kept, 0.1), expected.clamp(min=0), relative=1e-9)


def test_a_copy_is_removed_first_and_its_twin_takes_over():
    """Of two equal structures the surgeon removes one, and doubles the other."""
    matrix = _matrix(4)
    twin = torch.zeros(5, 4, dtype=torch.float64)
    twin[:4], twin[4, 2] = torch.eye(4), 1.0  # 4 is a copy of 2
    matrix = twin @ matrix @ twin.T
    order = surgeon_order(matrix, Floors([5], 0.0), damping=1e-9)
    assert order[0] in (2, 4)
    kept = torch.ones(5, dtype=torch.bool)
    kept[order[0]] = False
    gates = compensation(matrix, kept, 1e-9)
    assert_close(gates[6 - order[0]], 2.0, relative=1e-4)


@pytest.mark.parametrize("selection", ["greedy", "signed", "surgeon"])
def test_floors_hold_in_every_order(selection):
    toy = perceptron()
    found = score(
        toy.model,
        toy.graph,
        [toy.batch],
        "sosp_i",
        selection=selection,
        keep_at_least=0.3,
        loss_fn=F.cross_entropy,
    )
    last = 5 + 3 - 2 - 1
    assert {name: int((s == last).sum()) for name, s in found.items()} == {"a": 2, "b": 1}
    ranked = torch.cat([found["a"], found["b"]])
    assert sorted(ranked[ranked < last].tolist()) == list(range(last))


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS)
def test_folded_equals_gated(make):
    toy = make()
    row = toy.split(torch.rand(toy.num_structures, dtype=torch.float64))
    with gated(toy.model, toy.groups) as gates:
        gates.set_(row)
        expected = toy.model(toy.batch[0])
    fold_(toy.model, toy.groups, row)
    assert_close(toy.model(toy.batch[0]), expected, relative=1e-12)


@pytest.mark.parametrize("case", with_trait("residual"), ids=str)
def test_folded_and_cut_equals_gated(case):
    """Gates of a plan folded into the weights, then the cut: the model with these gates."""
    model, inputs = case.model(), case.inputs()
    graph = sosp_hub.trace(model, inputs)
    groups = {
        name: g
        for name, g in graph.groups.items()
        if g.kind in ("channel", "head", "neuron") and g.sites and g.exact
    }
    values, kept = {}, {}
    for name, g in groups.items():
        gates = torch.rand(g.size) + 0.5
        kept[name] = tuple(range(0, g.size, 2))
        gates[1::2] = 0.0
        values[name] = gates
    plan = PruningPlan(kept, {name: g.size for name, g in groups.items()})
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(*inputs))
    logits = lambda output: output if isinstance(output, torch.Tensor) else output.logits  # noqa: E731
    with torch.no_grad(), gated(model, groups) as gates:
        gates.set_(values)
        expected = logits(call(model))
    folded = copy.deepcopy(model)
    fold_(folded, groups, {name: v + (v == 0) for name, v in values.items()})
    with torch.no_grad():
        pruned = sosp_hub.apply(folded, graph, plan)
        assert_close(logits(call(pruned)), expected, relative=1e-4)


def test_a_net_with_a_twin_is_cut_for_nothing():
    toy = perceptron(num_samples=32)
    with torch.no_grad():  # neuron 3 is a copy of neuron 1
        toy.model.a.weight[3], toy.model.a.bias[3] = toy.model.a.weight[1], toy.model.a.bias[1]
        toy.model.b.weight[:, 3] = toy.model.b.weight[:, 1]
    criterion = make_criterion("sosp_i", selection="surgeon", damping=1e-9)
    found = criterion.select(toy.model, stand_in(toy.groups["a"]), [toy.batch])
    first = int(found.saliency["a"].argmin())
    assert first in (1, 3)
    kept = {"a": tuple(i for i in range(5) if i != first)}
    gates = compensate({"a": toy.groups["a"]}, found.curvature.matrix, kept, damping=1e-9)
    assert_close(toy.model(toy.batch[0], gates), toy.model(toy.batch[0]), relative=1e-4)


def test_faults():
    toy = attention()
    shared = copy.deepcopy(toy.model)
    shared.alias = shared.out
    before = copy.deepcopy(shared.state_dict())
    with pytest.raises(CriterionError, match=r"'heads': .* cannot be folded into 'out\.weight'"):
        fold_(shared, toy.groups, {"heads": torch.rand(2)})
    assert_close(dict(shared.state_dict()), dict(before), relative=0)
    many = stand_in(group("many", "neuron", 20_001, [("b", -1, None)]))
    with pytest.raises(CriterionError, match=r"20001 structures need a matrix of 3 GB"):
        score(toy.model, many, [toy.batch], "sosp_i")
