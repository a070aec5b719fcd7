"""SOSP-I: orders against brute force, compensation against least squares, folding against gates."""

import pytest
import timm
import torch
import torch.nn.functional as F

import sosp_hub
from sosp_hub.criteria.compute.compensation import compensated
from sosp_hub.criteria.compute.curvature import CurvatureMeasure
from sosp_hub.criteria.compute.elimination import (
    Floors,
    absolute_row_sums,
    compensation,
    greedy_order,
    surgeon_order,
)
from sosp_hub.derivatives import LowRank, Protocol, gauss_newton
from sosp_hub.errors import CriterionError
from sosp_hub.gates import gated
from sosp_hub.plan import PruningPlan
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import fold
from tests.cases import with_trait
from tests.compare import assert_close
from tests.gates.toys import TOYS, attention, group, perceptron, stand_in


def _matrix(size, rank=None):
    return _low_rank(size, rank or size + 2).dense()


def _low_rank(size, rank):
    return LowRank(torch.randn(rank, size, dtype=torch.float64) / rank**0.5)


def test_row_sums_by_hand():
    toy = perceptron()
    found = score(toy.model, toy.graph, [toy.batch], "sosp_i", loss_fn=F.cross_entropy)
    q = gauss_newton(toy.model, toy.groups, [toy.batch], Protocol(loss_fn=F.cross_entropy)).matrix
    assert_close(found, toy.split(toy.gradient().abs() + q.abs().sum(1) / 2), relative=1e-9)


UNITS = [None, torch.tensor([4.0, 0.3, 1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64)]


@pytest.mark.parametrize("units", UNITS, ids=["", "per unit"])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_greedy_takes_the_least_growth_of_the_set_saliency(with_gradient, units):
    units = units[:6] if units is not None else None
    matrix, gradient = _matrix(6), torch.randn(6, dtype=torch.float64)
    q = matrix.abs() if with_gradient else matrix

    def saliency(chosen):
        first = gradient[chosen].abs().sum() if with_gradient else 0
        return first + q[chosen][:, chosen].sum() / 2

    def growth(chosen, s):
        grown = saliency([*chosen, s]) - saliency(chosen)
        return grown if units is None else grown / units[s]

    expected: list[int] = []
    for _ in range(5):
        rest = [s for s in range(6) if s not in expected]
        expected.append(min(rest, key=lambda s: growth(expected, s)))
    order = greedy_order(matrix, Floors([6], 0.0), gradient if with_gradient else None, units)
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


@pytest.mark.parametrize("units", UNITS, ids=["", "per unit"])
@pytest.mark.parametrize("rank", [None, 3])
def test_surgeon_takes_the_least_loss_after_compensation(rank, units, monkeypatch):
    monkeypatch.setattr("sosp_hub.criteria.compute.elimination.BLOCK", 2)
    matrix = _matrix(7, rank)

    def growth(chosen, s):
        before, after = (_best_gates(matrix, c, 0.05)[1] for c in (chosen, [*chosen, s]))
        return after - before if units is None else (after - before) / units[s]

    expected: list[int] = []
    for _ in range(6):
        rest = [s for s in range(7) if s not in expected]
        expected.append(min(rest, key=lambda s: growth(expected, s)))
    assert surgeon_order(matrix, Floors([7], 0.0), damping=0.05, units=units) == expected


@pytest.mark.parametrize("steepness", [1.0, 30.0], ids=["nearer", "too far"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_rescored_order_is_that_of_surgeries_on_what_is_left(every, steepness):
    """Each piece by hand: a damped step if it brings the gates nearer, then what goes next."""
    toy, damping = perceptron(), 0.05 / steepness
    with torch.no_grad():
        toy.model.c.weight *= steepness  # softmax is then nearly a choice
    criterion, taken = CurvatureMeasure(Protocol(F.cross_entropy)), []
    options = {"damping": damping, "loss_fn": F.cross_entropy}

    def far(gates):
        return criterion.divergence(toy.model, toy.groups, [toy.batch], toy.split(gates))

    gates, expected = torch.ones(8).double(), []
    while len(expected) < 6:
        rest = [s for s in range(8) if s not in expected]
        found = criterion.measure(toy.model, toy.groups, [toy.batch], toy.split(gates))
        matrix, gradient = found.matrix, torch.cat(list(found.gradient.values()))
        if expected:
            size = damping * matrix.diagonal().mean() * torch.eye(len(rest)).double()
            moved = gates.clone()
            moved[rest] -= torch.linalg.solve(matrix[rest][:, rest] + size, gradient[rest])
            moved = moved.clamp(min=0)
            taken.append(far(moved) < far(gates))
            gates = moved if taken[-1] else gates
        mean = matrix[rest][:, rest].diagonal().mean()
        damped = matrix + damping * mean * torch.eye(8).double()
        start, gone = gates.clone(), []
        for _ in range(min(every, 6 - len(expected))):
            left = [s for s in rest if s not in gone]
            full = [g for g in (range(5), range(5, 8)) if len(set(g) & set(left)) == 1]
            able = [s for s in left if not any(s in g for g in full)]
            losses = {s: _moved(damped, start, rest, [*gone, s])[1] for s in able}
            gone.append(min(losses, key=losses.get))
        gates = _moved(damped, start, rest, gone)[0].clamp(min=0)
        expected += gone
    options |= {"selection": "surgeon", "rescore_every": every, "keep_at_least": 0.0}
    scores = score(toy.model, toy.graph, [toy.batch], "sosp_i", **options)
    order = torch.cat(list(scores.values())).argsort(stable=True).tolist()
    assert order[:6] == expected
    assert any(taken) if steepness == 1 else not all(taken)


def _moved(damped, start, rest, gone):
    """Gates nearest to ``start`` in the damped quadratic with some at 0, and what that costs."""
    kept = [s for s in rest if s not in gone]
    change = torch.zeros_like(start)
    change[gone] = -start[gone]
    right = -damped[kept][:, gone] @ change[gone]
    change[kept] = torch.linalg.solve(damped[kept][:, kept], right)
    gates = start + change
    gates[gone] = 0.0
    return gates, (change @ damped @ change / 2).item()


def test_compensation_is_the_best_set_of_gates():
    matrix = _matrix(6, rank=4)
    kept = torch.tensor([True, False, True, True, False, True])
    expected, _ = _best_gates(matrix, [1, 4], 0.1)
    assert_close(compensation(matrix, kept, 0.1), expected.clamp(min=0), relative=1e-9)


@pytest.mark.parametrize(
    "order",
    [
        lambda m: greedy_order(m, Floors([20, 20], 0.2)),
        lambda m: greedy_order(m, Floors([20, 20], 0.2), torch.arange(40).double() / 10),
        lambda m: surgeon_order(m, Floors([20, 20], 0.2), 0.01),
    ],
    ids=["signed", "greedy", "surgeon"],
)
@pytest.mark.parametrize(("block", "candidates"), [(1, 1), (3, 40), (256, 40)])
def test_low_rank_gives_the_order_of_the_matrix(order, block, candidates, monkeypatch):
    few, more = _low_rank(40, 5), _low_rank(40, 12)
    few.factor[:, ::4] = 0.0  # dead structures, which cost the same
    few.factor[:, ::3] *= 1e-4
    monkeypatch.setattr("sosp_hub.criteria.compute.elimination.BLOCK", block)
    monkeypatch.setattr("sosp_hub.criteria.compute.elimination.REMOVALS", block)
    monkeypatch.setattr("sosp_hub.criteria.compute.elimination.CANDIDATES", candidates)
    for matrix in (few, more):
        assert order(matrix) == order(matrix.dense())
        assert sorted(order(matrix)) != order(matrix)


@pytest.mark.parametrize(("candidates", "removals"), [(5, 3), (5, 5), (12, 4)])
def test_beyond_the_candidates_a_block_goes_before_all_costs_are_computed_again(
    candidates, removals, monkeypatch
):
    monkeypatch.setattr("sosp_hub.criteria.compute.elimination.CANDIDATES", candidates)
    monkeypatch.setattr("sosp_hub.criteria.compute.elimination.REMOVALS", removals)
    matrix = _low_rank(24, 6)
    dense = matrix.dense()

    def growth(chosen, s):
        return _best_gates(dense, [*chosen, s], 0.05)[1] - _best_gates(dense, chosen, 0.05)[1]

    expected: list[int] = []
    while len(expected) < 20:
        rest = [s for s in range(24) if s not in expected]
        at_first = sorted((growth(expected, s), s) for s in rest)
        some, bound = [s for _, s in at_first[:candidates]], at_first[candidates:][:1]
        for number in range(min(removals, 20 - len(expected))):
            cost, cheapest = min((growth(expected, s), s) for s in some if s not in expected)
            if number and bound and cost > bound[0][0]:
                break
            expected.append(cheapest)
    order = surgeon_order(matrix, Floors([24], 1 / 6), damping=0.05)
    assert order == expected
    assert order != surgeon_order(dense, Floors([24], 1 / 6), damping=0.05)  # it does matter


def test_low_rank_gives_the_sums_and_gates_of_the_matrix():
    matrix = _low_rank(2000, 5)
    dense = matrix.dense()
    assert_close(absolute_row_sums(matrix), dense.abs().sum(1), relative=1e-12)
    assert_close(absolute_row_sums(dense), dense.abs().sum(1), relative=1e-12)
    kept, fixed = torch.arange(2000) % 3 > 0, torch.arange(2000) % 5 == 0
    found = compensation(matrix, kept, 0.1, fixed)
    assert_close(found, compensation(dense, kept, 0.1, fixed), relative=1e-9)


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
    graph = sosp_hub.trace(toy.model, toy.batch[0])
    groups = {name: g for name, g in graph.groups.items() if not graph.fold_obstacle(name)}
    row = {name: torch.rand(g.size, dtype=torch.float64) for name, g in groups.items()}
    with gated(toy.model, groups) as gates:
        gates.set_(row)
        expected = toy.model(toy.batch[0])
    sizes = {name: g.size for name, g in groups.items()}
    kept = {name: tuple(range(size)) for name, size in sizes.items()}
    gates = {name: tuple(values.tolist()) for name, values in row.items()}
    fold(toy.model, graph, PruningPlan(kept, sizes, gates=gates))
    assert_close(toy.model(toy.batch[0]), expected, relative=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", with_trait("residual"), ids=str)
def test_a_compensated_plan_equals_the_gated_model(case):
    """Every second structure goes; what is cut and folded computes what the gated model does."""
    model, inputs = case.model(), case.inputs()
    graph = sosp_hub.trace(model, inputs)
    kinds = ("channel", "head", "kv_group", "neuron")
    mixed = [tie for tie in graph.ties if any(graph.groups[n].kind not in kinds for n in tie)]
    groups = {
        name: g
        for name, g in graph.groups.items()
        if g.kind in kinds and g.sites and g.exact and not any(name in tie for tie in mixed)
    }
    assert ("kv_group" in {g.kind for g in groups.values()}) == ("gqa" in case.traits)
    matrix = _matrix(sum(g.size for g in groups.values()))
    whole = next(name for name in groups if not any(name in tie for tie in graph.ties))
    kept = {name: tuple(range(0, g.size, 2)) for name, g in groups.items() if name != whole}
    plan = PruningPlan(kept, {name: groups[name].size for name in kept})
    fixed = [name for name in groups if graph.fold_obstacle(name)]
    plan = compensated(plan, groups, matrix, 0.1, fixed=fixed)
    assert plan.gates.keys() == groups.keys() - set(fixed)  # also one that is left whole
    values = {}
    for name, g in groups.items():
        values[name] = torch.zeros(g.size)
        indices = list(plan.kept.get(name, range(g.size)))
        values[name][indices] = torch.tensor(plan.gates.get(name, [1.0] * len(indices)))
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(*inputs))
    logits = lambda output: output if isinstance(output, torch.Tensor) else output.logits  # noqa: E731
    with torch.no_grad(), gated(model, groups) as gates:
        gates.set_(values)
        expected = logits(call(model))
    with torch.no_grad():
        assert_close(logits(call(sosp_hub.apply(model, graph, plan))), expected, relative=1e-5)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_fixed_gates_stay_and_the_others_make_up_for_them():
    matrix = _matrix(6)
    damped = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(6).double()
    groups = {name: group(name, "neuron", 3, []) for name in "ab"}
    plan = PruningPlan({"a": (0, 2)}, {"a": 3})
    found = compensated(plan, groups, matrix, 0.1, fixed=["a"])
    assert found.kept == {"a": (0, 2), "b": (0, 1, 2)}
    expected = 1 + torch.linalg.solve(damped[3:, 3:], damped[3:, 1])
    assert_close(found.gates, {"b": expected.clamp(min=0).tolist()}, relative=1e-9)
    assert found.provenance["compensation"]["groups"] == 1


def test_a_net_with_a_twin_is_cut_for_nothing():
    toy = perceptron(num_samples=32)
    with torch.no_grad():  # neuron 3 is a copy of neuron 1
        toy.model.a.weight[3], toy.model.a.bias[3] = toy.model.a.weight[1], toy.model.a.bias[1]
        toy.model.b.weight[:, 3] = toy.model.b.weight[:, 1]
    groups = {"a": toy.groups["a"]}
    curvature = CurvatureMeasure().measure(toy.model, groups, [toy.batch])
    found = score(
        toy.model,
        stand_in(*groups.values()),
        [],
        "sosp_i",
        selection="surgeon",
        curvature=curvature,
    )
    first = int(found["a"].argmin())
    assert first in (1, 3)
    plan = PruningPlan({"a": tuple(i for i in range(5) if i != first)}, {"a": 5})
    plan = compensated(plan, groups, curvature.matrix, damping=1e-9)
    gates = torch.zeros(5, dtype=torch.float64)
    gates[list(plan.kept["a"])] = torch.tensor(plan.gates["a"], dtype=torch.float64)
    assert_close(toy.model(toy.batch[0], {"a": gates}), toy.model(toy.batch[0]), relative=1e-4)


@pytest.mark.parametrize("budget", [{"structures": 0.6}, {"macs": 0.6}, {"params": 0.6}])
def test_every_budget_takes_the_surgeons_order_from_its_front(budget):
    """So the gates in closed form are those that the surgeon counted on when it chose."""
    toy = perceptron()
    graph = sosp_hub.trace(toy.model, toy.batch[0])
    options = {"selection": "surgeon", "loss_fn": F.cross_entropy}
    found = score(toy.model, graph, [toy.batch], "sosp_i", **options)
    plan = sosp_hub.allocate(graph, found, **budget)
    gone = [
        float(found[name][i])
        for name, kept in plan.kept.items()
        for i in set(range(plan.sizes[name])) - set(kept)
    ]
    assert gone
    assert sorted(gone) == list(range(len(gone)))


def test_faults():
    toy = attention()
    neurons = stand_in(toy.groups["neurons"])
    with pytest.raises(CriterionError, match=r"only groups that are read by layers.*and none"):
        score(toy.model, neurons, [toy.batch], "sosp_i")  # down.weight is read by the block's code
    toy = perceptron()
    of_one = CurvatureMeasure().measure(toy.model, {"a": toy.groups["a"]}, [toy.batch])
    with pytest.raises(CriterionError, match=r"is of 5 structures, the groups have 8"):
        score(toy.model, toy.graph, [], "sosp_i", curvature=of_one)
    of_both = CurvatureMeasure().measure(toy.model, toy.groups, [toy.batch])
    with pytest.raises(CriterionError, match=r"is of 8 structures, the groups have 5"):
        score(toy.model, stand_in(toy.groups["a"]), [], "sosp_i", curvature=of_both)


@pytest.mark.parametrize("samples", [3, 19])
@pytest.mark.parametrize("criterion", ["sosp_i", "fisher"])
def test_what_samples_share_gets_a_pass_for_each_sample(criterion, samples):
    """A table of relative positions, 19 rows long, is computed once for all samples."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit_relpos", num_classes=10).eval()
    images = torch.randn(samples, *model.pretrained_cfg["input_size"])
    labels = torch.arange(samples) % 10
    graph = trace(model, (images[:2],))
    assert any("rel_pos" in name for name in graph.groups)
    found, expected = (
        score(model, graph, [(images, labels)], criterion=criterion, micro_batch_size=size)
        for size in (None, 1)
    )
    assert_close(found, expected, relative=1e-6)


@pytest.mark.parametrize("selection", ["row_sum", "greedy", "signed", "surgeon"])
def test_where_nothing_changes_the_outputs_there_is_no_order(selection):
    toy = perceptron()
    with torch.no_grad():
        for weight in toy.model.parameters():
            weight.zero_()
    with pytest.raises(CriterionError, match="all scores are 0, which ranks nothing"):
        score(toy.model, toy.graph, [toy.batch], "sosp_i", selection=selection)
