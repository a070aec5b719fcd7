"""Gates that are moved on from a plan's: against autograd on the model written out, and by hand."""

import pytest
import torch
import torch.nn.functional as F

import sosp_hub
from sosp_hub.criteria.compute.compensation import compensated, refined
from sosp_hub.criteria.compute.curvature import CurvatureMeasure
from sosp_hub.derivatives import LowRank, Protocol, by_group
from sosp_hub.gates import gated
from sosp_hub.plan import PruningPlan
from tests.cases import CASES
from tests.compare import assert_close
from tests.gates.toys import group, perceptron, residual

DAMPINGS = (0.01, 0.1, 1.0)


def _distance(toy, gates, loss="cross_entropy"):
    """Of the toy's own forward pass from its dense outputs; the mean over samples."""
    dense, logits = toy.model(toy.batch[0]).detach(), toy.model(toy.batch[0], gates)
    if loss == "squared":
        return (logits - dense).square().sum(-1).mean() / 2
    p, q = dense.softmax(-1), logits.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def _somewhere(toy):
    row = torch.rand(toy.num_structures, dtype=torch.float64) + 0.5
    row[::3] = 0.0
    return row


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("make", [perceptron, residual])
def test_the_gradient_at_other_gates_is_that_of_the_divergence(make, loss):
    toy = make()
    protocol = Protocol(F.cross_entropy, micro_batch_size=2)
    row, criterion = _somewhere(toy), CurvatureMeasure(protocol, loss)
    at = by_group(toy.groups, row)
    found = criterion.measure(toy.model, toy.groups, [toy.batch], at)
    leaf = row.clone().requires_grad_()
    value = _distance(toy, by_group(toy.groups, leaf), loss)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert_close(found.gradient, by_group(toy.groups, gradient), relative=1e-9)
    assert found.loss == pytest.approx(value.item(), rel=1e-9)
    far = criterion.divergence(toy.model, toy.groups, [toy.batch], at)
    assert far == pytest.approx(value.item(), rel=1e-9)
    matrix = torch.zeros(len(row), len(row), dtype=torch.float64)
    for n in range(len(toy.batch[0])):
        one = toy.batch[0][n : n + 1]
        logits = lambda row, one=one: toy.model(one, by_group(toy.groups, row))[0]  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(logits, row)
        p = logits(row).detach().softmax(-1)
        curvature = torch.eye(len(p)).double() if loss == "squared" else p.diag() - p.outer(p)
        matrix += jacobian.T @ curvature @ jacobian / len(toy.batch[0])
    assert_close(found.matrix, matrix, relative=1e-9)


def test_of_a_language_model_the_tokens_count_that_have_a_label():
    (case,) = (case for case in CASES if case.name == "llama")
    model, inputs = case.model().double(), case.inputs()
    graph = sosp_hub.trace(model, inputs)
    groups = {name: g for name, g in graph.groups.items() if g.kind == "neuron"}
    at = {name: torch.rand(g.size).double() for name, g in groups.items()}
    tokens = inputs["input_ids"]
    labels = tokens.clone()
    labels[0, :3] = -100
    batch = {**inputs, "labels": labels}
    with torch.no_grad():
        dense = model(**inputs).logits.log_softmax(-1)
        with gated(model, groups) as gates:
            gates.set_(at)
            found = model(**inputs).logits.log_softmax(-1)
    total, num = 0.0, 0
    for n, row in enumerate(labels):
        for t in range(len(row) - 1):
            if row[t + 1] != -100:
                total += float((dense[n, t].exp() * (dense[n, t] - found[n, t])).sum())
                num += 1
    criterion = CurvatureMeasure(Protocol(micro_batch_size=1))
    assert criterion.divergence(model, groups, [batch], at) == pytest.approx(total / num, rel=1e-9)
    measured = criterion.measure(model, groups, [batch], at)
    assert measured.loss == pytest.approx(total / num, rel=1e-9)
    steepness = sum(float(part.square().sum()) for part in measured.gradient.values()) ** 0.5
    high, low = (
        criterion.divergence(
            model,
            groups,
            [batch],
            {name: at[name] + step / steepness * g for name, g in measured.gradient.items()},
        )
        for step in (0.02, -0.02)
    )
    assert (high - low) / 0.04 == pytest.approx(steepness, rel=1e-3)


def test_at_the_dense_model_nothing_is_far_and_the_matrix_is_the_hessian():
    toy = perceptron()
    criterion = CurvatureMeasure(Protocol(F.cross_entropy))
    ones = torch.ones(toy.num_structures).double()
    at = by_group(toy.groups, ones)
    found = criterion.measure(toy.model, toy.groups, [toy.batch], at)
    assert abs(found.loss) < 1e-12
    assert max(part.abs().max() for part in found.gradient.values()) < 1e-12
    hessian = torch.autograd.functional.hessian(
        lambda row: _distance(toy, by_group(toy.groups, row)), ones
    )
    assert_close(found.matrix, hessian, relative=1e-9)


def _plan(toy):
    groups = list(toy.groups.values())
    return PruningPlan({groups[0].name: tuple(range(1, groups[0].size))}, {groups[0].name: 5})


def test_a_step_is_the_best_damped_one_and_leaves_what_is_cut_or_fixed():
    toy = perceptron()
    criterion, seen = CurvatureMeasure(Protocol(F.cross_entropy)), []

    def measure(at):
        seen.append(criterion.measure(toy.model, toy.groups, [toy.batch], at))
        return seen[-1]

    def distance(at):
        return _distance(toy, at).item()

    plan = _plan(toy)
    for fixed in ([], ["b"]):
        found = refined(plan, toy.groups, measure, distance, 1, DAMPINGS, fixed=fixed)
        free = [1, 2, 3, 4, *([] if fixed else [5, 6, 7])]
        matrix = seen[-1].matrix
        gradient = torch.cat(list(seen[-1].gradient.values()))
        tried = []
        for damping in DAMPINGS:
            size = damping * matrix.diagonal().mean()
            damped = matrix[free][:, free] + size * torch.eye(len(free)).double()
            gates = torch.tensor([0.0, *[1.0] * 7], dtype=torch.float64)
            gates[free] -= torch.linalg.solve(damped, gradient[free])
            gates = gates.clamp(min=0)
            tried.append((distance(by_group(toy.groups, gates)), damping, gates))
        far, damping, gates = min(tried, key=lambda one: one[0])
        assert found.gates.keys() == {"a", "b"} - set(fixed)
        assert_close(torch.tensor(found.gates["a"]).double(), gates[1:5], relative=1e-6)
        told = found.provenance["compensation"]["steps"]
        assert told[0] == {"divergence": distance(by_group(toy.groups, seen_at(plan, toy)))}
        assert told[1] == {"divergence": pytest.approx(far, rel=1e-6), "damping": damping}


def seen_at(plan, toy):
    gates = torch.ones(toy.num_structures, dtype=torch.float64)
    gates[0] = 0.0
    assert plan.kept == {"a": (1, 2, 3, 4)}
    return gates


def test_steps_go_down_to_where_no_gate_has_a_gradient():
    toy = perceptron(num_samples=32)
    criterion = CurvatureMeasure(Protocol(F.cross_entropy))
    matrix = criterion.measure(toy.model, toy.groups, [toy.batch]).matrix
    plan = compensated(_plan(toy), toy.groups, matrix, 0.01)
    found = refined(
        plan,
        toy.groups,
        lambda at: criterion.measure(toy.model, toy.groups, [toy.batch], at),
        lambda at: criterion.divergence(toy.model, toy.groups, [toy.batch], at),
        50,
        DAMPINGS,
    )
    told = found.provenance["compensation"]
    far = [step["divergence"] for step in told["steps"]]
    assert far == sorted(far, reverse=True)
    assert 2 < len(far) <= 51
    assert told["damping"] == 0.01  # of the closed form
    row = torch.cat([torch.tensor([0.0, *found.gates["a"]]), torch.tensor(found.gates["b"])])
    leaf = row.double().requires_grad_()
    (gradient,) = torch.autograd.grad(_distance(toy, by_group(toy.groups, leaf)), leaf)
    inside = row > 0
    assert gradient[inside].abs().max() < 1e-3 * gradient[0].abs()


def test_gates_that_only_get_worse_stay():
    toy, matrix = perceptron(), torch.eye(8, dtype=torch.float64)

    class Found:
        pass

    Found.matrix, Found.gradient = matrix, by_group(toy.groups, torch.ones(8).double())
    plan = _plan(toy)
    values = iter([1.0, *[2.0] * len(DAMPINGS)])
    found = refined(plan, toy.groups, lambda at: Found, lambda at: next(values), 5, DAMPINGS)
    assert found.kept == plan.kept
    assert found.gates == {"a": (1.0,) * 4} or found.gates == {}
    assert found.provenance["compensation"]["steps"] == [{"divergence": 1.0}]


def test_low_rank_takes_the_steps_of_the_matrix():
    groups = {name: group(name, "neuron", 20, []) for name in "ab"}
    factor = torch.randn(5, 40, dtype=torch.float64)
    gradient = by_group(groups, torch.randn(40, dtype=torch.float64))
    plan = PruningPlan({"a": tuple(range(0, 20, 2))}, {"a": 20})
    gates = []
    for matrix in (LowRank(factor), LowRank(factor).dense()):

        class Found:
            pass

        Found.matrix, Found.gradient = matrix, gradient
        values = iter([1.0, 0.5])
        step = refined(plan, groups, lambda at, f=Found: f, lambda at, v=values: next(v), 1, [0.1])
        gates.append([*step.gates["a"], *step.gates["b"]])
    assert_close(torch.tensor(gates[0]), torch.tensor(gates[1]), relative=1e-6)


def test_steps_begin_at_the_gates_that_the_plan_has():
    """Where no step is taken, or none helps, they are what they were."""
    toy = perceptron()
    plan = PruningPlan({"a": (0, 2, 4)}, {"a": 5}, gates={"a": (0.5, 1.25, 2.0)})
    seen = []

    def divergence(gates):
        seen.append({name: row.tolist() for name, row in gates.items()})
        return 0.25

    found = refined(plan, toy.groups, lambda gates: pytest.fail("no step"), divergence, 0)
    assert seen == [{"a": [0.5, 0.0, 1.25, 0.0, 2.0], "b": [1.0, 1.0, 1.0]}]
    assert found.gates == plan.gates
