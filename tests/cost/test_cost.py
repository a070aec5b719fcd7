"""Predicted costs against what PyTorch counts on the cut model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sosp_hub.cost import Cost, CostModel, cost, unit_costs
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import call, trace
from sosp_hub.surgery.apply import cut
from tests.cases import CASES
from tests.structure.oracles import half, plan_of, ragged

MODELS = {}


def prepared(case):
    """Model, graph and example inputs; traced once."""
    if case.name not in MODELS:
        model = case.model().requires_grad_(False)
        outputs = None if case.library == "timm" else "logits"
        MODELS[case.name] = model, trace(model, case.inputs(), outputs=outputs)
    return MODELS[case.name]


def measured(model: nn.Module, inputs, num_samples: int) -> Cost:
    """Operations as PyTorch counts them (two a multiply-accumulate); tensors as they are stored."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, inputs)
    parameters = list(model.parameters())
    shared = {id(parameter) for parameter in parameters}
    stored = [t for t in model.state_dict(keep_vars=True).values() if id(t) not in shared]
    return Cost(
        macs=counter.get_total_flops() // 2 // num_samples,
        params=sum(parameter.numel() for parameter in parameters),
        bytes=sum(t.numel() * t.element_size() for t in parameters + stored),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dense_model_costs_what_is_measured(case):
    model, graph = prepared(case)
    assert cost(graph) == measured(model, case.inputs(), 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_of_everything_costs_what_is_predicted(case):
    _, graph = prepared(case)
    plan = half(graph)
    pruned = cut(case.model().requires_grad_(False), graph, plan)
    assert cost(graph, plan) == measured(pruned, case.inputs(), 2)
    traced = trace(pruned, case.inputs(), outputs=graph.outputs)
    assert cost(graph, plan) == cost(traced), "as the graph of the cut model has it"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CASES), st.integers(0, 10**6))
def test_any_plan_costs_what_is_predicted(case, seed):
    _, graph = prepared(case)
    chosen = {name for i, name in enumerate(graph.groups) if (seed >> (i % 20)) & 1}
    plan = ragged(graph, lambda group: group.name in chosen, seed)
    pruned = cut(case.model().requires_grad_(False), graph, plan)
    assert cost(graph, plan) == measured(pruned, case.inputs(), 2)


@given(st.sampled_from(CASES), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_fewer_structures_never_cost_more(case, seed):
    _, graph = prepared(case)
    model = CostModel(graph)
    counts = ragged(graph, seed=seed).num_kept()
    fewer = {name: max(1, count - 1) for name, count in counts.items()}
    more, less = model(counts), model(fewer)
    assert (less.macs, less.params, less.bytes) <= (more.macs, more.params, more.bytes)
    assert less.macs <= more.macs
    assert less.params <= more.params
    assert less.bytes <= more.bytes


def test_counts_and_plans_say_the_same():
    _, graph = prepared(CASES[0])
    plan = half(graph)
    assert (
        cost(graph, plan)
        == cost(graph, counts=plan.num_kept())
        == CostModel(graph)(plan.num_kept())
    )
    assert cost(graph) == cost(graph, PruningPlan({}, {}))


def test_by_hand():
    """Two layers: 5 * 6 + 6 * 3 products a token, four tokens a sample."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = trace(model, (torch.randn(2, 4, 5),))
    (name,) = graph.groups
    for kept, width in ((None, 6), ((0, 3, 4), 3)):
        plan = None if kept is None else plan_of(graph, {name: kept})
        params = 5 * width + width + width * 3 + 3
        assert cost(graph, plan) == Cost(4 * (5 * width + width * 3), params, 4 * params)


def test_bytes_follow_the_dtype():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).to(torch.bfloat16)
    model[1].float()
    model.forward = lambda x: model[1](model[0](x).float())
    graph = trace(model, (torch.randn(2, 5, dtype=torch.bfloat16),))
    assert cost(graph).bytes == 2 * (5 * 6 + 6) + 4 * (6 * 3 + 3)


def test_tied_weights_count_once():
    (case,) = [case for case in CASES if case.name == "gpt2"]
    model, graph = prepared(case)
    assert cost(graph).params == sum(parameter.numel() for parameter in model.parameters())
    assert cost(graph).params < sum(tensor.numel() for tensor in model.state_dict().values())


def test_batches_do_not_matter():
    (case,) = [case for case in CASES if case.name == "llama"]
    model = case.model()
    assert len({cost(trace(model, case.inputs(n), outputs="logits")) for n in (2, 3, 5)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("quantity", ["macs", "params", "bytes"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "llama"])
def test_a_unit_costs_what_a_cut_of_it_alone_saves(name, quantity):
    case = next(case for case in CASES if case.name == name)
    model, graph = prepared(case)
    tied = {name for tie in graph.ties for name in tie}
    dense = getattr(measured(model, case.inputs(), 2), quantity)
    saved = {}
    for group in graph.groups.values():
        if group.size > 1 and group.multiple == 1 and group.name not in tied:
            plan = PruningPlan({group.name: tuple(range(group.size - 1))}, {group.name: group.size})
            pruned = cut(case.model().requires_grad_(False), graph, plan)
            saved[group.name] = dense - getattr(measured(pruned, case.inputs(), 2), quantity)
    units = unit_costs(graph, quantity)
    assert len(saved) > 1
    first = next(iter(saved))
    for group, value in saved.items():
        assert units[group][-1] / units[first][-1] == pytest.approx(value / saved[first])
        assert len(units[group]) == graph.groups[group].size
    every = [unit for values in units.values() for unit in values]
    assert sum(every) / len(every) == pytest.approx(1, rel=1e-2)


class Joined(nn.Module):
    """What reads a concatenation: half of it can be cut, the other half is the model's input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(11, 3)

    def forward(self, x):
        return self.down(torch.cat([x, self.up(x).relu()], -1))


def test_a_concatenation_costs_what_its_parts_cost():
    graph = trace(Joined(), (torch.randn(2, 5),))
    plan = plan_of(graph, {"up:neuron": (0, 3)})
    pruned = cut(Joined(), graph, plan)
    assert cost(graph, plan) == measured(pruned, graph.example_inputs, 2)
    assert cost(graph, plan).params == 5 * 2 + 2 + 7 * 3 + 3


class Stack(nn.Module):
    """A dozen residual blocks, so that the name of one begins with that of another."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)) for _ in range(12)
        )
        self.blocks = nn.ModuleList(Residual(block) for block in self.blocks)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_a_layer_that_goes_takes_its_own_cost_alone():
    graph = trace(Stack(), (torch.randn(2, 4),))
    for gone in (1, 11):
        plan = plan_of(graph, {"blocks:layer": tuple(i for i in range(12) if i != gone)})
        pruned = cut(Stack(), graph, plan)
        assert cost(graph, plan) == measured(pruned, graph.example_inputs, 2)


def test_a_structure_that_saves_nothing_counts_as_nearly_nothing():
    """A norm without scales has no parameter: scores per parameter must stay finite."""
    graph = trace(Stack(), (torch.randn(2, 4),))
    free = {name: replace(group, layers=()) for name, group in graph.groups.items() if group.layers}
    units = unit_costs(replace(graph, groups={**graph.groups, **free}), "params")
    assert set(units["blocks:layer"]) == {1e-3}
    assert min(value for values in units.values() for value in values) == 1e-3
