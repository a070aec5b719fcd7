"""``widen``: the wider model computes what the old one computed, exactly."""

import random

import pytest
import torch
from torch import nn

from sosp_hub.errors import PlanError, VerificationError
from sosp_hub.plan import GrowthPlan
from sosp_hub.structure.trace import call, output_tensors, trace
from sosp_hub.surgery.apply import apply
from sosp_hub.surgery.widen import why_not, widen
from tests.cases import CASES
from tests.compare import assert_close
from tests.structure.oracles import fill, plan_of, run
from tests.surgery.test_apply import WritesToItself, assert_untouched, outputs_of, state

pytestmark = pytest.mark.slow

LLAMA = next(case for case in CASES if case.name == "llama")
RESNET = next(case for case in CASES if case.name == "test_resnet")


def prepared(case):
    model = fill(case.model())
    return model, trace(model, case.inputs(), outputs=outputs_of(case))


def ragged_copies(graph, seed=0):
    """One to three copies of each structure of every group that can be widened."""
    chance = random.Random(seed)
    label = {name: tie for tie in graph.ties for name in tie}
    copies = {}
    for name, group in graph.groups.items():
        tie = label.get(name, (name,))
        if any(why_not(graph, other) for other in tie):
            continue
        numbers = [chance.randint(1, 3) for _ in range(group.size)]
        short = -sum(numbers) % group.multiple
        numbers[0] += short
        copies[name] = copies[tie[0]] if tie[0] in copies else tuple(numbers)
    return copies


def two_layers(weights, copies):
    """By hand: hidden neurons of two linear layers, copied, each reader's column divided."""
    first, bias, second = weights
    index = [i for i, number in enumerate(copies) for _ in range(number)]
    number = torch.tensor(copies)[index]
    return first[index], bias[index], second[:, index] / number


def test_equal_shares_are_the_columns_divided():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = trace(model, (torch.randn(2, 4),))
    wide = widen(model, graph, {"0:neuron": (1, 3, 2)}, spread=0.0)
    expected = two_layers((model[0].weight, model[0].bias, model[2].weight), (1, 3, 2))
    assert_close([wide[0].weight, wide[0].bias, wide[2].weight], expected)
    assert (wide[0].out_features, wide[2].in_features) == (6, 6)
    assert_close(wide[2].bias, model[2].bias, relative=0)


def test_a_model_whose_pass_writes_to_its_weights_stays():
    torch.manual_seed(0)
    model = WritesToItself().eval()
    graph, before = trace(model, (torch.arange(8)[None],)), state(model)
    wide = widen(model, graph, {"first:neuron": (1, 2) * 8})
    assert_untouched(model, before)
    assert_close(wide.scale, model.scale, relative=0)
    assert_close(run(wide, graph), run(model, graph))


@pytest.mark.parametrize("init", ["net2net", "fresh"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_wider_model_equals_the_old_one(case, init):
    model, graph = prepared(case)
    before = state(model)
    copies = ragged_copies(graph)
    assert copies
    wide = widen(model, graph, copies, init=init)
    assert_untouched(model, before)
    assert type(wide) is type(model)
    assert_close(run(wide, graph), run(model, graph))
    again = trace(wide, case.inputs(), outputs=outputs_of(case))
    assert {name: again.groups[name].size for name in copies} == {
        name: sum(numbers) for name, numbers in copies.items()
    }


def test_channels_neurons_heads_and_kv_groups_can_be_widened():
    found = {}
    for case in CASES:
        _, graph = prepared(case)
        found[case.name] = {g.kind for name, g in graph.groups.items() if not why_not(graph, name)}
    assert found["test_resnet"] == {"channel"}
    assert found["llama"] == {"head", "kv_group", "neuron"}
    assert found["test_vit"] == {"head", "neuron"}


def test_a_normalised_stream_can_be_doubled_but_not_raggedly():
    """Mean and variance of a layer norm stay when every channel is there twice."""
    case = next(case for case in CASES if case.name == "llama")
    model, graph = prepared(case)
    (name,) = [name for name, group in graph.groups.items() if group.kind == "residual"]
    size = graph.groups[name].size
    wide = widen(model, graph, {name: (2,) * size})
    assert wide.model.embed_tokens.weight.shape[1] == 2 * size
    assert_close(run(wide, graph), run(model, graph))
    with pytest.raises(PlanError, match="copy all its structures equally often"):
        widen(model, graph, {name: (2,) + (1,) * (size - 1)})
    with pytest.raises(PlanError, match="net2net"):
        widen(model, graph, {name: (2,) * size}, init="fresh")


def test_copies_part_ways_in_training():
    """With equal shares two copies have equal gradients for ever; with uneven ones they do not."""
    model, graph = prepared(LLAMA)
    name = next(name for name, group in graph.groups.items() if group.kind == "neuron")
    size = graph.groups[name].size
    gradients = {}
    for spread in (0.0, 0.5):
        wide = widen(model, graph, {name: (2,) * size}, spread=spread)
        output_tensors(call(wide, LLAMA.inputs()))[0].square().mean().backward()
        up = wide.model.layers[0].mlp.up_proj.weight.grad
        gradients[spread] = (up[::2] - up[1::2]).norm() / up.norm()
    assert gradients[0.0] < 1e-5
    assert gradients[0.5] > 0.1


def test_fresh_structures_are_new_and_read_by_nothing_yet():
    model, graph = prepared(RESNET)
    name = next(n for n, g in graph.groups.items() if g.kind == "channel" and not why_not(graph, n))
    reader = next(m.tensor for m in graph.groups[name].members if m.reads)
    maker = next(m.tensor for m in graph.groups[name].members if not m.reads)
    wide = widen(model, graph, {name: (2,) * graph.groups[name].size}, init="fresh")
    old, new = (dict(each.named_parameters()) for each in (model, wide))
    assert_close(new[maker][::2], old[maker], relative=0)
    assert_close(new[maker][1::2].std(), old[maker].std(), relative=0.2)
    assert not torch.equal(new[maker][1::2], old[maker])
    assert_close(new[reader][:, ::2], old[reader], relative=0)
    assert new[reader][:, 1::2].abs().max() == 0


def test_what_was_widened_can_be_cut_back():
    model, graph = prepared(RESNET)
    copies = ragged_copies(graph)
    wide = widen(model, graph, copies, init="fresh")
    again = trace(wide, RESNET.inputs())
    kept = {}
    for name, numbers in copies.items():
        starts = [sum(numbers[:i]) for i in range(len(numbers))]
        kept[name] = tuple(starts)
    back = apply(wide, again, plan_of(again, kept))
    assert_close(back.state_dict(), model.state_dict(), relative=0)


def test_tied_groups_are_widened_together():
    for case in CASES:
        model, graph = prepared(case)
        for one, *_ in graph.ties:
            with pytest.raises(PlanError, match="equally many"):
                widen(model, graph, {one: (2,) * graph.groups[one].size})
            return
    raise AssertionError("no case has a tie")


class Queries(nn.Module):
    """Activations multiplied with each other, and a mean over channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(2, 3)
        self.c, self.d = nn.Linear(4, 5), nn.Linear(1, 3)

    def forward(self, x):
        mean = self.c(x).relu().mean(-1, keepdim=True)
        return self.out(self.a(x) @ self.b(x).transpose(-1, -2)) + self.d(mean)


def test_what_is_not_exact_is_refused_with_the_reason():
    model = Queries()
    graph = trace(model, (torch.randn(3, 2, 4),))
    (products,) = [n for n, g in graph.groups.items() if g.size == 6]
    with pytest.raises(PlanError, match=rf"{products}.*not only weights read it"):
        widen(model, graph, {products: (2,) * 6})
    gpt2 = next(case for case in CASES if case.name == "gpt2")
    model, graph = prepared(gpt2)
    (stream,) = [n for n, g in graph.groups.items() if g.kind == "residual"]
    with pytest.raises(PlanError, match="tied to another weight"):
        widen(model, graph, {stream: (2,) * 64})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"copies": {"nothing": (1,)}}, "no group 'nothing'"),
        ({"copies": {"0:neuron": (1, 1)}}, "has 3 structures here"),
        ({"copies": {"0:neuron": (1, 0, 1)}}, "at least one copy.*got 0"),
        ({"copies": {"0:neuron": (1, 1.5, 1)}}, "got 1.5"),
        ({"copies": {"0:neuron": ()}}, "no structures"),
        ({"init": "zeros"}, "'zeros'.*net2net or fresh"),
        ({"spread": 1.0}, "spread: got 1.0"),
    ],
)
def test_bad_arguments_are_named(given, words):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = trace(model, (torch.randn(2, 4),))
    with pytest.raises(PlanError, match=words):
        widen(model, graph, **{"copies": {"0:neuron": (2, 1, 1)}, **given})


@pytest.mark.parametrize("hidden", [False, True])
def test_a_wrong_share_is_noticed(monkeypatch, hidden):
    """Also behind weights that are zero, as those of a fresh head may be."""
    model, graph = prepared(LLAMA)
    name = next(name for name, group in graph.groups.items() if group.kind == "neuron")
    if hidden:
        nn.init.zeros_(model.lm_head.weight)
    monkeypatch.setattr(
        "sosp_hub.surgery.widen._shares", lambda weight, *_: torch.ones_like(weight)
    )
    with pytest.raises(VerificationError, match=name):
        widen(model, graph, {name: (2,) * graph.groups[name].size})


def test_one_copy_of_everything_changes_nothing():
    model, graph = prepared(LLAMA)
    copies = {name: (1,) * group.size for name, group in graph.groups.items()}
    for growth in (GrowthPlan(copies), GrowthPlan({})):
        wide = widen(model, graph, growth)
        assert_close(wide.state_dict(), model.state_dict(), relative=0)
