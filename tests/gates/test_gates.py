"""Gates: what they multiply, and that the model comes back as it was."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sosp_hub.double_backward import CheapSecondDerivatives
from sosp_hub.errors import CriterionError
from sosp_hub.gates import _UnitGate, gated
from tests.compare import assert_close
from tests.gates.toys import TOYS, group, perceptron, residual


@pytest.fixture(params=TOYS)
def toy(request):
    return TOYS[request.param]()


def _state(model: nn.Module):
    return (
        [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        [
            len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs)
            for m in model.modules()
        ],
    )


def test_gates_multiply_what_the_oracle_multiplies(toy):
    row = torch.rand(toy.num_structures, dtype=torch.float64)
    dense, expected = toy.logits(toy.ones()), toy.logits(row)
    with gated(toy.model, toy.groups) as gates:
        assert_close(toy.model(toy.batch[0]), dense, relative=1e-12)
        gates.set_(toy.split(row))
        assert_close(toy.model(toy.batch[0]), expected, relative=1e-12)
    assert_close(toy.model(toy.batch[0]), dense, relative=1e-12)


def test_zero_is_the_pruned_model():
    toy = perceptron()
    kept = [0, 2, 3]
    small = copy.deepcopy(toy.model)
    small.a.weight, small.a.bias = (nn.Parameter(p[kept]) for p in (small.a.weight, small.a.bias))
    small.b.weight = nn.Parameter(small.b.weight[:, kept])
    with gated(toy.model, toy.groups) as gates:
        gates.set_({"a": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])})
        assert_close(toy.model(toy.batch[0]), small(toy.batch[0]), relative=1e-12)


def test_each_sample_has_its_own_gates():
    toy = residual()
    row = torch.rand(len(toy.batch[1]), toy.num_structures, dtype=torch.float64)
    singles = [toy.model(x[None], toy.split(m)) for x, m in zip(toy.batch[0], row, strict=True)]
    with gated(toy.model, toy.groups) as gates:
        gates.set_(toy.split(row), own=(len(row),))
        assert_close(toy.model(toy.batch[0]), torch.cat(singles), relative=1e-12)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("gate", ["activation", "weight"])
def test_the_model_comes_back_as_it_was(toy, fail, gate, caplog):
    model = toy.model
    model.train()
    model.head.eval() if hasattr(model, "head") else model.c.eval()
    next(model.parameters()).requires_grad_(False)
    before, weights = _state(model), copy.deepcopy(model.state_dict())
    leaves_well = pytest.raises(KeyError) if fail else contextlib.nullcontext()
    with caplog.at_level("INFO"), leaves_well, gated(model, toy.groups, gate):
        assert not any(module.training for module in model.modules())
        model(toy.batch[0]).sum().backward()
        if fail:
            raise KeyError
    assert _state(model) == before
    assert list(model.state_dict()) == list(weights)
    assert_close(dict(model.state_dict()), dict(weights), relative=0)
    assert all(p.grad is None for p in model.parameters())
    assert "train mode" in caplog.text


def test_weights_take_no_gradient(toy):
    with gated(toy.model, toy.groups) as gates:
        assert not any(parameter.requires_grad for parameter in toy.model.parameters())
        toy.model(toy.batch[0]).sum().backward()
        assert all(gate.grad is not None for gate in gates.values.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gates_are_at_least_float32(dtype):
    toy = perceptron()
    toy.model.to(dtype)
    with gated(toy.model, toy.groups) as gates:
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {gate.dtype for gate in gates.values.values()} == {expected}
        output = toy.model(toy.batch[0].to(dtype))
        assert output.dtype == dtype
        output.sum().backward()


def test_what_gates_sum_of_16_bits_is_in_float32():
    """Over the tokens of a batch it is soon more than float16 can hold."""
    toy = perceptron()
    x, row = toy.batch[0].repeat(2000, 1), toy.ones().requires_grad_()
    (expected,) = torch.autograd.grad(toy.model(x, toy.split(row)).sum(), row)
    scale = 4 * torch.finfo(torch.float16).max / float(expected.abs().max())
    half = copy.deepcopy(toy.model).half()
    with gated(half, toy.groups) as gates:
        (scale * half(x.half()).float().sum()).backward()
        found = torch.cat([gate.grad.flatten() for gate in gates.values.values()])
    assert_close(found, scale * expected, relative=1e-2)


def test_two_groups_on_one_input_multiply():
    toy = perceptron()
    halves = np.array([0, 0, 1, 1, -1])
    groups = {**toy.groups, "halves": group("halves", "head", 2, [("b", -1, halves)])}
    a, half = torch.rand(5, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    expected = toy.model(toy.batch[0], {"a": a * torch.cat([half, torch.ones(1)])[halves]})
    with gated(toy.model, groups) as gates:
        gates.set_({"a": a, "halves": half})
        assert_close(toy.model(toy.batch[0]), expected, relative=1e-12)


def test_neighbours_on_one_input():
    toy = perceptron()
    left, right = np.array([0, 1, -1, -1, -1]), np.array([-1, -1, 0, -1, 1])
    groups = {
        "left": group("left", "neuron", 2, [("b", -1, left)]),
        "right": group("right", "neuron", 2, [("b", -1, right)]),
    }
    row = torch.tensor([2.0, 3.0, 5.0, 1.0, 7.0], dtype=torch.float64)
    expected = toy.model(toy.batch[0], {"a": row})
    with gated(toy.model, groups) as gates:
        gates.set_({"left": torch.tensor([2.0, 3.0]), "right": torch.tensor([5.0, 7.0])})
        assert_close(toy.model(toy.batch[0]), expected, relative=1e-12)


def test_faults():
    toy = perceptron()
    nowhere = group("n", "layer", 2, [])
    elsewhere = group("e", "neuron", 2, [("d", -1, None)])
    short = group("s", "neuron", 2, [("b", -1, None)])
    for one, gate, words in (
        (nowhere, "activation", r"'n' \(layer\) has no place for a gate"),
        (nowhere, "weight", r"'n' \(layer\) has no filter"),
        (elsewhere, "activation", "the model has no 'd'"),
        (short, "activation", r"b: dimension 1 .* 5 positions, in the graph 2"),
    ):
        with pytest.raises(CriterionError, match=words), gated(toy.model, {one.name: one}, gate):
            toy.model(toy.batch[0])


def test_a_module_under_two_names_is_gated_once():
    toy = perceptron()
    toy.model.alias = toy.model.b
    twice = {"a": group("a", "neuron", 5, [("b", -1, None), ("alias", -1, None)])}
    row = torch.rand(5, dtype=torch.float64)
    expected = toy.model(toy.batch[0], {"a": row})
    with gated(toy.model, twice) as gates:
        gates.set_({"a": row})
        assert_close(toy.model(toy.batch[0]), expected, relative=1e-12)


def test_the_rows_of_a_sample_follow_each_other():
    """Windows and flattened tokens: the first dimension is a multiple of the samples."""
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    row = torch.rand(2, 3, dtype=torch.float64)
    expected = model(x * row[:, None])
    with gated(model, {"c": group("c", "neuron", 3, [("1", -1, None)])}) as gates:
        gates.set_({"c": row}, own=(2,))
        assert_close(model(x), expected, relative=1e-12)
        gates.set_(1.0, own=(3,))
        with pytest.raises(CriterionError, match="1: 3 samples with own gates are not found"):
            model(x)


def _derivatives(function, x, size, dim, after, apply):
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    gate = torch.ones([size if d == dim else 1 for d in range(x.ndim)], dtype=x.dtype)
    gate.requires_grad_()
    output = apply(after(function(x)), gate)
    scalar = (output * torch.randn_like(output)).sum() + output.pow(3).sum()
    first = torch.autograd.grad(scalar, (x, gate), create_graph=True)
    second = [
        torch.autograd.grad(first, (x, gate), directions, retain_graph=True)
        for directions in (
            (torch.randn_like(x), torch.randn_like(gate)),
            (torch.zeros_like(x), torch.ones_like(gate)),
        )
    ]
    return output, *first, *second[0], *second[1]


@pytest.mark.parametrize("change", [lambda y: y, lambda y: y.mul_(2)], ids=["as it is", "doubled"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 5), 2), ((3, 4, 2, 6), 1), ((5,), 0)])
def test_a_unit_gate(shape, dim, change, monkeypatch):
    monkeypatch.setattr("sosp_hub.double_backward.pieces.PIECE", 40)
    x = torch.randn(shape, dtype=torch.float64)
    expected = _derivatives(F.gelu, x, shape[dim], dim, change, torch.mul)
    actual = _derivatives(F.gelu, x, shape[dim], dim, change, _UnitGate.apply)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, relative=1e-10)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("function", [F.gelu, torch.tanh], ids=["gelu", "tanh"])
def test_a_unit_gate_whose_reader_has_no_derivative_gets_none(function):
    x, gate = torch.randn(2, 3).requires_grad_(), torch.ones(1, 3).requires_grad_()
    with CheapSecondDerivatives():
        read = _WithoutDerivative.apply(_UnitGate.apply(function(x), gate))
    assert torch.autograd.grad(read.sum(), (x, gate), allow_unused=True) == (None, None)


def test_gates_are_as_fine_as_the_finest_weight():
    """One layer in double precision: its derivatives are not cut to seven digits."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())
    groups = {"n": group("n", "neuron", 4, [("1", -1, None)])}
    with gated(model, groups) as gates:
        assert gates.values["n"].dtype == torch.float64


def test_a_gate_is_where_its_structure_is():
    """As behind a channel shuffle: as many positions as structures, in another order."""
    model, x = nn.Linear(4, 2).double(), torch.randn(3, 4).double()
    order = [2, 0, 3, 1]
    values = torch.tensor([0.5, 2.0, -1.0, 3.0]).double()
    outer, expected = nn.Sequential(nn.Identity(), model), model(x * values[order]).detach()
    with gated(outer, {"n": group("n", "neuron", 4, [("1", -1, order)])}) as gates:
        gates.set_({"n": values})
        assert_close(outer(x).detach(), expected, relative=1e-12)


class Three(nn.Module):
    """Reads three things, of which the first is gated."""

    def forward(self, x, scale, shift):
        return x * scale + shift


class Calls(nn.Module):
    def __init__(self, by_name):
        super().__init__()
        self.inner, self.by_name = Three(), by_name

    def forward(self, x):
        if self.by_name:
            return self.inner(x=x, scale=2.0, shift=1.0)
        return self.inner(x, 2.0, 1.0)


@pytest.mark.parametrize("by_name", [False, True])
def test_whichever_way_a_module_is_called(by_name):
    model, x = Calls(by_name), torch.randn(2, 3)
    values = torch.tensor([0.0, 2.0, 1.0])
    with gated(model, {"n": group("n", "neuron", 3, [("inner", -1, None)])}) as gates:
        assert_close(model(x).detach(), x * 2 + 1)
        gates.set_({"n": values})
        assert_close(model(x).detach(), x * values * 2 + 1)


def test_own_gates_of_samples_need_samples_in_front():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    groups = {"n": group("n", "neuron", 3, [("1", 0, None)])}
    with gated(model, groups) as gates:
        gates.set_(1.0, own=(3,))
        with pytest.raises(CriterionError, match="not found along dimension 0"):
            model(torch.randn(3, 4))


@pytest.mark.parametrize(("positions", "width"), [(1, 4), (4, 1)])
def test_a_gate_is_not_spread_over_another_model(positions, width):
    """One that has another width: numbers of one size must not be broadcast over it."""
    model = nn.Sequential(nn.Identity(), nn.Linear(width, 2))
    groups = {"n": group("n", "neuron", positions, [("1", -1, None)])}
    words = f"has {width} positions, in the graph {positions}"
    with gated(model, groups), pytest.raises(CriterionError, match=words):
        model(torch.randn(3, width))
