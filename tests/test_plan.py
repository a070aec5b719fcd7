"""A plan is plain data: what it refuses, what two of them are together, and its JSON."""

import json
import math

import pytest
import torch
from torch import nn

from sosp_hub.errors import PlanError
from sosp_hub.plan import GrowthPlan, PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.compare import assert_close

NAMES = ("0:neuron", "2:neuron")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"kept": {"a": (2, 1)}, "sizes": {"a": 4}}, r"'a' must be sorted and distinct"),
        ({"kept": {"a": (1, 1)}, "sizes": {"a": 4}}, r"'a' must be sorted and distinct"),
        ({"kept": {"a": (1, 4)}, "sizes": {"a": 4}}, r"'a' has 4 structures; kept index 4"),
        ({"kept": {"a": (-1, 2)}, "sizes": {"a": 4}}, r"'a' has 4 structures; kept index -1"),
        ({"kept": {"a": (False, True)}, "sizes": {"a": 2}}, r"'a' must list whole numbers"),
        ({"kept": {"a": (0.0, 1.0)}, "sizes": {"a": 2}}, r"'a' must list whole numbers"),
        ({"kept": {"a": (0,)}, "sizes": {"a": True}}, r"'a' must list whole numbers"),
        ({"kept": {"a": (0,)}, "sizes": {}}, r"same groups, not \['a'\]"),
        ({"kept": {}, "sizes": {"b": 3}}, r"same groups, not \['b'\]"),
        ({"kept": {"a": (0, 1)}, "gates": {"a": (1.0,)}}, r"'a' keeps 2 .* but has 1 gates"),
        ({"kept": {"a": (0,)}, "gates": {"a": (1.0, 2.0)}}, r"'a' keeps 1 .* but has 2 gates"),
        ({"kept": {"a": (0,)}, "gates": {"a": (math.inf,)}}, r"gates of group 'a' .* got inf"),
        ({"kept": {"a": (0,)}, "gates": {"a": (math.nan,)}}, r"gates of group 'a' .* got nan"),
        ({"kept": {"a": (0,)}, "shifts": {"bias": (1.0, -math.inf)}}, r"'bias' .* got -inf"),
    ],
)
def test_what_is_no_plan_is_refused_when_it_is_made(plan, words):
    with pytest.raises(PlanError, match=words):
        PruningPlan(**{"sizes": dict.fromkeys(plan["kept"], 4), **plan})


@pytest.mark.parametrize(
    ("copies", "words"),
    [((1, 0), "got 0"), ((1, -2), "got -2"), ((), "no structures"), ((1, 1.0), r"got 1\.0")],
)
def test_a_growth_takes_nothing_away(copies, words):
    with pytest.raises(PlanError, match=words):
        GrowthPlan({"a": copies})


def traced():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    model.double().eval()
    inputs = torch.randn(4, 3).double()
    return model, inputs, trace(model, (inputs,))


def test_two_plans_in_one_are_the_two_one_after_the_other():
    """Indices, gates and shifts; a group of both plans, one of the first alone, of the second."""
    model, inputs, graph = traced()
    one, two = NAMES
    first = PruningPlan(
        {one: (1, 2, 4, 5)}, {one: 6}, "lab/base", "abc", {"budget": 0.5},
        gates={one: (0.5, 2.0, 3.0, 1.0)}, shifts={"2.bias": (0.1, -0.2, 0.3, 0.0, 0.5)},
    )  # fmt: skip
    second = PruningPlan(
        {one: (0, 3), two: (1, 2, 4)}, {one: 4, two: 5}, gates={one: (4.0, 0.25)},
        provenance={"budget": 0.2},
    )  # fmt: skip
    once = apply(model, graph, first)
    twice = apply(once, trace(once, (inputs,)), second)
    composed = first.compose(second)
    assert composed.kept == {one: (1, 5), two: (1, 2, 4)}
    assert composed.sizes == {one: 6, two: 5}
    assert (composed.base_model, composed.base_revision) == ("lab/base", "abc")
    assert composed.provenance == {"steps": [{"budget": 0.5}, {"budget": 0.2}]}
    assert_close(apply(model, graph, composed)(inputs), twice(inputs), relative=1e-12)


def test_plans_that_do_not_follow_each_other_are_not_composed():
    one, two = NAMES
    first = PruningPlan({one: (1, 2, 4)}, {one: 6})
    for size in (2, 4, 6):
        with pytest.raises(PlanError, match=rf"has 3 structures .* made for {size}"):
            first.compose(PruningPlan({one: (0,)}, {one: size}))
    with pytest.raises(PlanError, match=r"second plan shifts '2\.bias'"):
        first.compose(PruningPlan({two: (0,)}, {two: 5}, shifts={"2.bias": (1.0,) * 5}))


@pytest.mark.parametrize(("stack", "inside"), [("net.layers", "net.layers.1.up"), ("", "1.up")])
def test_cuts_inside_layers_that_moved_up_are_not_composed(stack, inside):
    """Layer 1 of the second plan was layer 2."""
    first = PruningPlan({f"{stack}:layer": (0, 2, 3)}, {f"{stack}:layer": 4})
    with pytest.raises(PlanError, match=r"is of another layer than before; apply one after"):
        first.compose(PruningPlan({f"{inside}:neuron": (0,)}, {f"{inside}:neuron": 6}))
    again = first.compose(PruningPlan({f"{stack}:layer": (0, 2)}, {f"{stack}:layer": 3}))
    assert again.kept == {f"{stack}:layer": (0, 3)}
    beside = PruningPlan({"net.layersaside:neuron": (0,)}, {"net.layersaside:neuron": 6})
    if stack:
        assert first.compose(beside).kept == {**first.kept, **beside.kept}


def test_json_gives_the_same_plan_back():
    plan = PruningPlan(
        {"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2}, "lab/base", "abc", {"budget": {"macs": 0.5}},
        gates={"a": (0.25, 1.5)}, shifts={"x.bias": (1e-17, -3.0)},
    )  # fmt: skip
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert json.loads(again.to_json()) == json.loads(plan.to_json())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
        ({"schema_version": None}, "schema_version is None"),
        ({"kept": None}, "must map group names"),
        ({"kept": [1, 2]}, "must map group names"),
        ({"sizes": 3}, "must map group names"),
        ({"kept": {"a": 1}}, "must map group names"),
        ({"kept": {"a": ["x"]}}, "must list whole numbers"),
        ({"gates": {"a": ["x", 1.0]}}, "must be finite numbers"),
    ],
)
def test_a_damaged_plan_is_told_as_that(change, words):
    record = json.loads(PruningPlan({"a": (0, 2)}, {"a": 3}).to_json()) | change
    with pytest.raises(PlanError, match=words):
        PruningPlan.from_json(json.dumps(record))
