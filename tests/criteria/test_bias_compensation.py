"""Constants in biases: the mean output of a layer whose input was cut stays what it was."""

import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.criteria.compute.compensation import means_at_biases, shifted
from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from tests.cases import CASES
from tests.compare import assert_close


def _half(group, **more):
    kept = {group.name: tuple(range(0, group.size, 2))}
    return PruningPlan(kept, {group.name: group.size}, **more)


def _mean_output(model, module, inputs):
    """Over samples and tokens."""
    seen = []
    hook = lambda _, __, output: seen.append(output.reshape(-1, output.shape[-1]))  # noqa: E731
    handle = model.get_submodule(module).register_forward_hook(hook)
    with torch.no_grad():
        _ = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    handle.remove()
    return torch.cat(seen).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "test_vit"])
def test_the_mean_output_of_the_reader_stays(name, gated):
    case = next(case for case in CASES if case.name == name)
    model, inputs = case.model(), case.inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)  # so that means are not near 0
    graph = sosp_hub.trace(model, inputs)
    batch = inputs if isinstance(inputs, dict) else (inputs[0], torch.zeros(2, dtype=torch.long))
    groups = {n: g for n, g in graph.groups.items() if g.kind in ("head", "neuron")}
    means = means_at_biases(model, graph, groups, [batch])
    assert means.keys() == groups.keys()
    for group in list(groups.values())[:2]:
        gates = {group.name: torch.rand(-(-group.size // 2)).tolist()} if gated else {}
        plan = _half(group, gates=gates)
        (site,) = group.sites
        expected = _mean_output(model, site.module, inputs)
        shift = shifted(plan, model, graph, means)
        assert shift.shifts.keys() == {f"{site.module}.bias"}
        found = _mean_output(sosp_hub.apply(model, graph, shift), site.module, inputs)
        assert_close(found, expected, relative=1e-5)
        without = _mean_output(sosp_hub.apply(model, graph, plan), site.module, inputs)
        assert (without - expected).abs().max() > 1e-3 * expected.abs().max()
        assert PruningPlan.from_json(shift.to_json()) == shift


def test_nothing_is_folded_where_there_is_no_bias_or_zeros_are_padded():
    case = next(case for case in CASES if case.name == "llama")
    padded = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    for model, inputs in ((case.model(), case.inputs()), (padded, (torch.rand(1, 3, 8, 8),))):
        graph = sosp_hub.trace(model, inputs)
        assert means_at_biases(model, graph, graph.groups, []) == {}
        plan = _half(next(g for g in graph.groups.values() if g.exact))
        assert shifted(plan, model, graph, {}).shifts == {}


def test_faults():
    case = next(case for case in CASES if case.name == "vit")
    model, inputs = case.model(), case.inputs()
    graph = sosp_hub.trace(model, inputs)
    group = next(g for g in graph.groups.values() if g.kind == "neuron")
    bias = f"{group.sites[0].module}.bias"
    with pytest.raises(PlanError, match=r"shift of 2 values for '.*bias', which is \[\d+\] here"):
        sosp_hub.apply(model, graph, _half(group, shifts={bias: (0.0, 1.0)}))
    with pytest.raises(PlanError, match=r"for 'a.bias', which is no tensor here"):
        sosp_hub.apply(model, graph, _half(group, shifts={"a.bias": (0.0,)}))
    with pytest.raises(PlanError, match=r"the shift of 'a.bias' must be finite numbers, got nan"):
        _half(group, shifts={"a.bias": (float("nan"),)})
    plan = _half(group, shifts={"a.bias": (0.0,)})
    with pytest.raises(PlanError, match=r"the second plan shifts 'a.bias'"):
        PruningPlan({}, {}).compose(plan)


def test_no_mean_is_folded_where_a_cut_changes_what_is_left():
    """Behind a norm over the cut axis the others are other numbers than they were."""
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    batch = (torch.randn(8, 5), torch.zeros(8).long())
    graph = sosp_hub.trace(model, batch[:1])
    (group,) = graph.groups.values()
    assert not group.exact
    assert means_at_biases(model, graph, graph.groups, [batch]) == {}
