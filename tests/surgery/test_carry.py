"""State of an optimizer and averages of weights follow the cut; the oracle slices by itself."""

import copy

import pytest
import torch
from torch import nn

from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.surgery.carry import carry_optimizer, carry_tensors

KEPT = (0, 2, 5)


def trained() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    inputs = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return model, optimizer, inputs


def plan_of(graph) -> PruningPlan:
    (name,) = graph.groups
    return PruningPlan({name: KEPT}, {name: 6})


def test_moments_are_cut_like_the_weights():
    model, optimizer, inputs = trained()
    graph = trace(model, (inputs,))
    pruned = apply(model, graph, plan_of(graph))
    before = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    carry_optimizer(optimizer, model, pruned, graph, plan_of(graph))
    cuts = [
        lambda t: t[list(KEPT)],
        lambda t: t[list(KEPT)],
        lambda t: t[:, list(KEPT)],
        lambda t: t,
    ]
    for old, new, cut in zip(model.parameters(), pruned.parameters(), cuts, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[new][key], cut(before[old][key]))
        torch.testing.assert_close(optimizer.state[new]["step"], before[old]["step"])
    weights = [p.detach().clone() for p in pruned.parameters()]
    pruned(inputs).square().sum().backward()
    optimizer.step()
    assert all((p != w).any() for p, w in zip(pruned.parameters(), weights, strict=True))


def test_an_average_is_cut_and_counters_stay():
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    average = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    carried = carry_tensors({**average, "updates": torch.tensor(3)}, graph, plan_of(graph))
    pruned = apply(model, graph, plan_of(graph))
    assert carried.pop("updates") == 3
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(carried[name], tensor * 0.5)
    with pytest.raises(PlanError, match="already cut"):
        carry_tensors(carried, graph, plan_of(graph))


def test_a_strange_parameter_leaves_the_optimizer_alone():
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    strange = nn.Parameter(torch.zeros(2, 7))
    optimizer = torch.optim.SGD([*model.parameters(), strange], lr=0.1)
    with pytest.raises(PlanError, match=r"\[2, 7\]"):
        carry_optimizer(optimizer, model, copy.deepcopy(model), graph, plan_of(graph))
    assert optimizer.param_groups[0]["params"][-1] is strange
