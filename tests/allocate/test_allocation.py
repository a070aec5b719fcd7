"""Allocation: budgets that are met and tight, whatever floors, rounding and ties ask for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sosp_hub.allocation import allocate
from sosp_hub.cost import CostModel
from sosp_hub.errors import BudgetError, PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import cut
from tests.cases import CASES
from tests.compare import assert_close

GRAPHS = {}


class Block(nn.Module):
    """Three MLP groups (8, 8 and 20 neurons) and attention with tied head widths."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = (
            nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 20), nn.Linear(20, 6),
        )  # fmt: skip
        self.qkv = nn.ModuleList(nn.Linear(6, 12) for _ in range(3))
        self.out = nn.Linear(12, 3)
        self.dim = 4

    def forward(self, x):
        x = self.four(self.three(self.two(self.one(x).relu()).relu()).relu())
        q, k, v = (m(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for m in self.qkv)
        y = (q @ k.mT * 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


EVERY = ("channel", "head", "kv_group", "neuron", "head_dim", "residual")


def graph_of(name="block"):
    """A graph by name, traced once."""
    if name not in GRAPHS:
        if name == "block":
            torch.manual_seed(0)
            GRAPHS[name] = trace(Block().eval(), (torch.randn(2, 5, 6),))
        else:
            (case,) = [case for case in CASES if case.name == name]
            outputs = None if case.library == "timm" else "logits"
            GRAPHS[name] = trace(case.model(), case.inputs(), outputs=outputs)
    return GRAPHS[name]


def random_saliency(graph, seed=0, kinds=EVERY):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(group.size, generator=generator)
        for name, group in graph.groups.items()
        if group.kind in kinds
    }


def shares(graph, plan, chosen):
    """What is kept of every quantity."""
    model = CostModel(graph)
    dense, found = model(), model(plan.num_kept())
    sizes = {name: graph.groups[name].size for name in chosen}
    kept = {**sizes, **plan.num_kept()}
    return {
        "macs": found.macs / dense.macs,
        "params": found.params / dense.params,
        "memory_bytes": found.bytes / dense.bytes,
        "structures": sum(kept.values()) / sum(sizes.values()),
    }


BUDGETS = st.fixed_dictionaries(
    {},
    optional={
        name: st.floats(0.45, 1.0) for name in ("macs", "params", "structures", "memory_bytes")
    },
).filter(bool)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["block", "llama", "test_resnet"]), BUDGETS, st.integers(0, 99),
    st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([1, 2, 4]), st.booleans(),
)  # fmt: skip
def test_every_budget_is_met_with_everything_that_is_asked(
    name, budgets, seed, keep_at_least, round_to, uniform
):
    graph = graph_of(name)
    saliency = random_saliency(graph, seed)
    try:
        plan = allocate(
            graph, saliency, **budgets, keep_at_least=keep_at_least, round_to=round_to,
            uniform=uniform, kinds=EVERY,
        )  # fmt: skip
    except BudgetError as refused:
        assert "least that can be reached" in str(refused)  # noqa: PT017 - it may be refused
        return
    graph.check(plan)
    found = shares(graph, plan, saliency)
    for quantity, share in budgets.items():
        assert found[quantity] <= share
    kept = plan.num_kept()
    for group_name, count in kept.items():
        size = graph.groups[group_name].size
        assert count >= max(1, keep_at_least * size - 1e-6)
        assert count % round_to == 0 or count == size
        values = saliency[group_name]
        lost = [i for i in range(size) if i not in plan.kept[group_name]]
        assert values[list(plan.kept[group_name])].min() >= values[lost].max(), "the best ones stay"
    if uniform:
        alike = {}
        for group_name in saliency:
            group = graph.groups[group_name]
            alike.setdefault((group.kind, group.size), set()).add(kept.get(group_name, group.size))
        assert all(len(counts) == 1 for counts in alike.values()), alike


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["block", "test_resnet"]), st.floats(0.3, 0.99), st.integers(0, 99))
def test_a_budget_is_tight(name, share, seed):
    """With one structure more (the next in the ranking) the budget would not hold."""
    graph = graph_of(name)
    saliency = random_saliency(graph, seed, kinds=("channel", "neuron"))
    plan = allocate(graph, saliency, macs=share, keep_at_least=0)
    removed = {
        (float(saliency[n][i]), n, i)
        for n, kept in plan.kept.items()
        for i in range(graph.groups[n].size)
        if i not in kept
    }
    assert shares(graph, plan, saliency)["macs"] <= share
    if not removed:
        return
    assert not any(set(tie) & set(saliency) for tie in graph.ties)
    _, last, _ = max(removed)  # the last one that went
    counts = plan.num_kept()
    dense = CostModel(graph)()
    assert CostModel(graph)({**counts, last: counts[last] + 1}).macs > share * dense.macs


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.3, 1.0), min_size=2, max_size=2), st.integers(0, 99))
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(budgets, seed):
    graph = graph_of("llama")
    saliency = random_saliency(graph, seed, kinds=("kv_group", "head", "neuron"))
    small, large = (
        allocate(graph, saliency, params=share, keep_at_least=0) for share in sorted(budgets)
    )
    for name, kept in large.kept.items():
        assert set(small.kept[name]) <= set(kept)


def test_the_least_salient_go_first_over_all_groups():
    """By hand: of 36 neurons the 9 of least saliency go, wherever they are."""
    graph = graph_of()
    saliency = random_saliency(graph, kinds=("neuron",))
    saliency = {
        n: v for n, v in saliency.items() if n in {"one:neuron", "two:neuron", "three:neuron"}
    }
    assert [v.numel() for v in saliency.values()] == [8, 8, 20]
    plan = allocate(graph, saliency, structures=0.75, keep_at_least=0)
    threshold = torch.cat(list(saliency.values())).sort().values[9]
    expected = {n: torch.nonzero(v >= threshold)[:, 0].tolist() for n, v in saliency.items()}
    assert {n: list(kept) for n, kept in plan.kept.items()} == {
        n: kept for n, kept in expected.items() if len(kept) < graph.groups[n].size
    }


def test_equal_saliency_is_decided_the_same_way_each_time():
    graph = graph_of()
    flat = {name: torch.ones(group.size) for name, group in graph.groups.items()}
    one, two = (allocate(graph, flat, params=0.6) for _ in range(2))
    assert one.kept == two.kept


def test_a_floor_that_bites_is_reported():
    graph = graph_of()
    saliency = {"one:neuron": torch.zeros(8), "three:neuron": torch.ones(20)}
    plan = allocate(graph, saliency, structures=0.75, keep_at_least=0.25)
    assert plan.num_kept()["one:neuron"] == 2
    assert plan.provenance["floors"]["one:neuron"] == {"wanted": 0, "kept": 2}
    assert "three:neuron" not in plan.provenance["floors"]


def test_what_is_predicted_is_written_down():
    graph = graph_of()
    plan = allocate(graph, random_saliency(graph), macs=0.5)
    found = CostModel(graph)(plan.num_kept())
    assert plan.provenance["predicted"] == {
        **{"macs": found.macs, "params": found.params, "bytes": found.bytes},
        "of_one": graph.sized.sample,
    }
    assert plan.provenance["budget"] == {"macs": 0.5}


def test_a_threshold_takes_what_scores_less_and_floors_and_budgets_hold_beside_it():
    graph = graph_of()
    saliency = {"three:neuron": torch.linspace(-1, 1, 20), "one:neuron": torch.full((8,), -3.0)}
    plan = allocate(graph, saliency, threshold=0.0, keep_at_least=0.2)
    assert plan.kept == {"three:neuron": tuple(range(10, 20)), "one:neuron": (0, 1)}
    assert plan.provenance["budget"] == {"threshold": 0.0}
    assert allocate(graph, saliency, threshold=-9.0).kept == {}
    plan = allocate(graph, saliency, threshold=0.0, structures=0.25)  # more, until it holds
    assert plan.kept["three:neuron"] == tuple(range(14, 20))
    plan = allocate(graph, saliency, threshold=0.0, structures=0.99)  # holds already
    assert plan.kept["three:neuron"] == tuple(range(10, 20))
    with pytest.raises(BudgetError, match="threshold is a score, a finite number; got nan"):
        allocate(graph, saliency, threshold=float("nan"))


def test_groups_without_saliency_stay_whole():
    graph = graph_of()
    plan = allocate(graph, {"three:neuron": torch.rand(20)}, params=0.9)
    assert list(plan.kept) == ["three:neuron"]


def test_a_group_tied_to_one_that_may_not_go_stays_whole():
    graph = graph_of()
    assert len(graph.ties) == 1
    one, two = graph.ties[0]
    free = {"three:neuron": torch.rand(20)}
    plan = allocate(graph, {one: torch.zeros(4), **free}, structures=0.9, kinds=EVERY)
    assert one not in plan.kept
    plan = allocate(
        graph, {one: torch.zeros(4), two: torch.zeros(4), **free}, structures=0.9, kinds=EVERY
    )
    assert plan.num_kept()[one] == plan.num_kept()[two] < 4


def test_latency_is_what_the_caller_measures():
    graph = graph_of()
    calls = []

    def measure(plan):
        calls.append(plan)
        return 1.0 + sum(plan.num_kept().get(n, graph.groups[n].size) for n in ("one:neuron",))

    plan = allocate(graph, {"one:neuron": torch.arange(8.0)}, latency_s=6 / 9, measure=measure)
    assert plan.kept["one:neuron"] == (3, 4, 5, 6, 7)
    assert calls


def test_numpy_and_lists_are_saliency_too():
    graph = graph_of()
    values = [float(i) for i in range(8)]
    plans = [
        allocate(graph, {"one:neuron": made}, structures=0.5)
        for made in (values, torch.tensor(values), torch.tensor(values).numpy())
    ]
    assert_close([list(p.kept["one:neuron"]) for p in plans], [[4, 5, 6, 7]] * 3, relative=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "macs"),
        ({"macs": 0.0}, "macs.*0.0"),
        ({"macs": 1.5}, "macs.*1.5"),
        ({"macs": float("nan")}, "macs.*nan"),
        ({"params": -0.1}, "params.*-0.1"),
        ({"macs": 0.5, "keep_at_least": 1.2}, "keep_at_least.*1.2"),
        ({"macs": 0.5, "round_to": 0}, "round_to.*0"),
        ({"latency_s": 0.5}, "measure"),
        ({"macs": "0.5"}, "macs.*'0.5'"),
        ({"macs": 0.5, "round_to": 1.5}, "round_to.*1.5"),
        ({"macs": 0.001}, "least that can be reached"),
        ({"macs": 0.5, "round_to": 512}, "least that can be reached.*round_to=512"),
        ({"macs": 0.5, "uniform": True, "keep_at_least": 0.9}, "least.*uniform"),
        ({"macs": 0.5, "kinds": ("expert",)}, "expert.*neuron"),
    ],
)
def test_what_cannot_be_met_is_said(arguments, words):
    graph = graph_of()
    with pytest.raises(BudgetError, match=f"(?s){words}"):
        allocate(graph, random_saliency(graph), **arguments)


def test_a_budget_that_is_out_of_reach_names_groups_without_a_score():
    """Some criteria leave groups whole: fisher the neurons of Mixtral's experts."""
    graph = graph_of()
    saliency = random_saliency(graph)
    first = next(iter(saliency))
    del saliency[first]
    with pytest.raises(
        BudgetError, match=f"1 more of these kinds have no score.*another may.*{first}"
    ):
        allocate(graph, saliency, macs=0.001)


@pytest.mark.parametrize(
    ("saliency", "words"),
    [
        ({"nowhere:neuron": torch.ones(4)}, "nowhere:neuron"),
        ({"one:neuron": torch.ones(7)}, "one:neuron.*8.*7"),
        ({"one:neuron": torch.ones(8, 1)}, "one:neuron.*8.*1"),
        ({"one:neuron": torch.full((8,), float("nan"))}, "one:neuron.*finite"),
        ({"one:neuron": torch.full((8,), float("inf"))}, "one:neuron.*finite"),
        ({"one:neuron": torch.arange(8) > 3}, "one:neuron.*true and false.*number"),
        ({"one:neuron": [True, False] * 4}, "one:neuron.*true and false.*number"),
    ],
)
def test_saliency_that_does_not_fit_names_its_group(saliency, words):
    with pytest.raises(BudgetError, match=f"(?s){words}"):
        allocate(graph_of(), saliency, macs=0.5)


def test_one_kind_may_be_given_without_a_list():
    graph = graph_of()
    saliency = random_saliency(graph)
    alone = allocate(graph, saliency, structures=0.8, kinds="neuron")
    assert alone == allocate(graph, saliency, structures=0.8, kinds=["neuron"])


def test_the_least_that_can_be_reached_can_be_reached():
    graph = graph_of()
    saliency = random_saliency(graph)
    with pytest.raises(BudgetError) as caught:
        allocate(graph, saliency, macs=0.01)
    least = float(str(caught.value).split(" is the least")[0].split()[-1])
    allocate(graph, saliency, macs=least + 0.001)


def test_a_tie_does_not_take_a_group_out_of_its_uniform_set():
    """Two groups of 8 are alike, and one of them is tied to a group of another kind."""
    graph = graph_of()
    one, two = (name for name in graph.groups if graph.groups[name].size == 8)
    other = replace(graph.groups[one], name="other", kind="channel")
    for tie in ((two, "other"), ("other", two)):
        tied = replace(graph, groups={"other": other, **graph.groups}, ties=(tie,))
        saliency = random_saliency(tied, kinds=("neuron", "channel"))
        kinds = ("neuron", "channel")
        plan = allocate(tied, saliency, structures=0.6, uniform=True, kinds=kinds)
        counts = {name: plan.num_kept().get(name, 8) for name in (one, two, "other")}
        assert len(set(counts.values())) == 1, counts


def test_no_group_is_left_with_a_count_that_it_must_not_have():
    graph = graph_of()
    name = next(name for name in graph.groups if graph.groups[name].size == 20)
    barred = frozenset(range(1, 12)) | {13, 14}
    strict = replace(
        graph, groups={**graph.groups, name: replace(graph.groups[name], barred=barred)}
    )
    saliency = {name: random_saliency(graph)[name]}
    found = set()
    for share in (0.1, 0.5, 0.6, 0.7, 0.8):
        try:
            plan = allocate(strict, saliency, structures=share, keep_at_least=0.0)
        except BudgetError:
            continue
        strict.check(plan)
        found.add(plan.num_kept()[name])
    assert found == {12, 16}
    with pytest.raises(PlanError, match="must not keep 13 of its 20"):
        strict.check(PruningPlan({name: tuple(range(13))}, {name: 20}))


@pytest.mark.parametrize("round_to", [1, 2, 3, 6, 8])
def test_rounding_never_breaks_what_a_kernel_needs(round_to):
    """A kernel that runs for multiples of 4 alone, as the grouped product of experts does."""
    graph = graph_of()
    name = next(name for name in graph.groups if graph.groups[name].size == 20)
    strict = replace(graph, groups={**graph.groups, name: replace(graph.groups[name], multiple=4)})
    saliency = {name: random_saliency(graph)[name]}
    for share in (0.3, 0.5, 0.65, 0.8):
        try:
            plan = allocate(strict, saliency, structures=share, round_to=round_to)
        except BudgetError:
            continue
        count = plan.num_kept()[name]
        assert count % 4 == 0
        assert count % round_to == 0
        assert count <= share * 20


def test_tied_groups_meet_half_way_and_obey_each_others_barred_counts():
    """Four zeros and four ones that keep equally many: two go of each, not four."""
    graph = graph_of()
    one, two = graph.ties[0]
    saliency = {one: torch.zeros(4), two: torch.ones(4), "three:neuron": torch.full((20,), 0.5)}

    def kept(graph):
        plan = allocate(
            graph, saliency, structures=24 / 28, keep_at_least=0, kinds=EVERY
        )  # four structures go
        graph.check(plan)
        return [plan.num_kept().get(name, 4) for name in (one, two)]

    assert kept(graph) == [2, 2]
    for name in (one, two):
        barred = replace(graph.groups[name], barred=frozenset({2}))
        assert kept(replace(graph, groups={**graph.groups, name: barred})) == [3, 3]


def test_a_structure_that_scores_the_threshold_stays():
    scores = torch.tensor([-1.0, 0.0, -0.5, 0.0, 2.0, 0.0, 1.0, -2.0])
    plan = allocate(graph_of(), {"one:neuron": scores}, threshold=0.0)
    assert plan.kept["one:neuron"] == (1, 3, 4, 5, 6)


def test_only_the_kinds_that_leave_the_rest_as_it_is_go_unasked():
    """Streams, widths of heads and whole layers are cut only where they are named."""
    graph = graph_of("llama")
    saliency = {name: torch.zeros(group.size) for name, group in graph.groups.items()}
    kinds = {graph.groups[name].kind for name in allocate(graph, saliency, macs=0.7).kept}
    assert kinds
    assert kinds <= {"channel", "head", "kv_group", "neuron"}
    assert {"residual", "layer"} <= {group.kind for group in graph.groups.values()}


def test_a_budget_with_whole_layers_holds_for_what_is_left():
    (case,) = [case for case in CASES if case.name == "llama"]
    graph = graph_of("llama")
    saliency = {name: torch.zeros(g.size) for name, g in graph.groups.items() if g.kind == "layer"}
    share = 0.7
    plan = allocate(graph, saliency, params=share, kinds="layer")
    dense = sum(parameter.numel() for parameter in case.model().parameters())
    left = sum(p.numel() for p in cut(case.model(), graph, plan).parameters())
    assert left <= share * dense
    assert plan.provenance["predicted"]["params"] == left


def test_named_groups_keep_their_own_share_and_the_others_stay_whole():
    graph = graph_of()
    saliency = random_saliency(graph)
    plan = allocate(graph, saliency, groups={"one*": 0.5, "three*": 0.3})
    (one,) = [name for name in plan.kept if name.startswith("one")]
    (three,) = [name for name in plan.kept if name.startswith("three")]
    assert set(plan.kept) == {one, three}
    assert (len(plan.kept[one]), len(plan.kept[three])) == (4, 6)
    best = saliency[one].argsort(descending=True)[:4].sort().values.tolist()
    assert list(plan.kept[one]) == best
    assert plan.provenance["groups"] == {"one*": 0.5, "three*": 0.3}


@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_budget_beside_named_groups_is_met_by_the_others(share):
    graph = graph_of()
    saliency = random_saliency(graph)
    plan = allocate(graph, saliency, groups={"three*": 0.9}, macs=share)
    (three,) = [name for name in plan.kept if name.startswith("three")]
    assert len(plan.kept[three]) == 18
    assert shares(graph, plan, saliency)["macs"] <= share


def test_floors_by_name():
    graph = graph_of()
    saliency = random_saliency(graph, kinds=("head", "kv_group", "neuron"))
    saliency = {name: s * (name[:5] != "three") for name, s in saliency.items()}
    loose, tight, turned = (
        allocate(graph, saliency, structures=0.5, keep_at_least=floor)
        for floor in (0.1, {"*": 0.05, "thr*": 0.75}, {"thr*": 0.75, "*": 0.05})
    )
    assert turned.kept == tight.kept  # of two floors the higher holds
    (three,) = [name for name in loose.kept if name.startswith("three")]
    assert len(loose.kept[three]) == 2
    assert len(tight.kept[three]) == 15
    assert shares(graph, tight, saliency)["structures"] <= 0.5


def test_only_and_exclude():
    graph = graph_of()
    saliency = random_saliency(graph)
    plan = allocate(graph, saliency, structures=0.5, only=["one*", "two*"], exclude="two*")
    assert [name[:3] for name in plan.kept] == ["one"]
    whole = allocate(graph, saliency, structures=0.5, exclude=["one*", "two*"])
    assert whole.kept
    assert not [name for name in whole.kept if name.startswith(("one", "two"))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": {"onne*": 0.5}}, r"budget.groups: 'onne\*' is no group that may be cut"),
        ({"groups": {"one*": 0.5, "*ne*": 0.4}}, r"keep 0.5 \('one\*'\) and 0.4"),
        ({"groups": {"one*": 1.5}}, "groups: 'one.*share that is kept.*1.5"),
        ({"macs": 0.5, "keep_at_least": {"five*": 0.1}}, r"keep_at_least: 'five\*'"),
        ({"macs": 0.5, "only": ["five"]}, "only: 'five' is no group"),
        ({"macs": 0.5, "only": []}, r"only: nothing to cut: \[\]"),
        ({"macs": 0.5, "only": [1]}, "only: 1 is no name"),
        ({"macs": 0.5, "exclude": 3}, "exclude: 3 is no name"),
        ({"macs": True}, "got True"),
        ({"groups": [("one", 0.5)]}, "groups: a list; write a share for each name"),
        ({"macs": 0.5, "exclude": ["five"]}, "exclude: 'five' is no group"),
        ({"macs": 0.5, "exclude": "*"}, "nothing to cut"),
    ],
)
def test_names_that_select_nothing_are_errors(options, words):
    graph = graph_of()
    with pytest.raises(BudgetError, match=words):
        allocate(graph, random_saliency(graph), **options)
