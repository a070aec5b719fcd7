"""``allocate_within``: one call from scores to the smallest model that keeps a promise."""

import copy

import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import BudgetError, DataError, VerificationError
from sosp_hub.evaluate import evaluate, metrics_of_samples
from sosp_hub.promise import within
from sosp_hub.surgery import apply as surgery
from tests.compare import assert_close


def points(num, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 4
    corners = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]])
    return corners[labels] + 0.5 * torch.randn(num, 2, generator=generator), labels


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    x, y = points(512, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]
    graph = sosp_hub.trace(model, (x[:2],))
    return model, graph, sosp_hub.score(model, graph, batches, criterion="fisher"), batches


@pytest.fixture
def held_out():
    x, y = points(1500, 1)
    return [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1500, 100)]


def test_the_smallest_that_loses_two_points(trained, held_out):
    model, graph, saliency, batches = trained
    before = copy.deepcopy(model.state_dict())
    found = sosp_hub.allocate_within(
        model, graph, saliency, held_out, max_drop={"accuracy": 2.0}, rebuild=batches
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    promise = found.promise
    curve = [point.macs for point in promise.curve]
    assert curve == sorted(curve, reverse=True)
    assert len(curve) == len(set(curve)) > 3
    assert all(point.holds for point in promise.curve[: promise.chosen + 1])
    assert not promise.curve[promise.chosen + 1].holds
    assert found.promise.point.cost["macs"] < 0.7
    # what is told is what the model that is returned measures
    proof = held_out[promise.num_search // 100 :]
    dense, pruned = (
        evaluate(each, proof, ["accuracy"])["accuracy"] for each in (model, found.model)
    )
    assert dense.n == promise.num_proof == 1000
    lost = dense.value - pruned.value
    assert promise.point.proof["accuracy"].value == pytest.approx((1000 * lost + 1) / 1001)
    assert promise.point.proof["accuracy"].upper <= 0.02


def test_several_bounds_must_all_hold(trained, held_out):
    model, graph, saliency, _ = trained
    alone = sosp_hub.allocate_within(model, graph, saliency, held_out, max_drop={"accuracy": 5})
    both = sosp_hub.allocate_within(
        model, graph, saliency, held_out, max_drop={"accuracy": 5, "divergence": 0.01}
    )
    assert both.promise.point.macs > alone.promise.point.macs
    assert both.promise.point.proof["divergence"].upper <= 0.01


def test_a_budget_beside_a_promise_must_hold_too(trained, held_out):
    model, graph, saliency, _ = trained
    drop = {"divergence": 0.01}
    found = sosp_hub.allocate_within(model, graph, saliency, held_out, max_drop=drop, macs=0.95)
    kept = found.promise.point.macs
    assert 0.2 < kept < 0.95
    with pytest.raises(BudgetError, match=r"(?s)together with macs=0\.2,.*smallest") as one:
        sosp_hub.allocate_within(model, graph, saliency, held_out, max_drop=drop, macs=0.2)
    assert f"{100 * found.promise.point.cost['macs']:.1f} % of the MACs" in str(one.value)


@pytest.fixture
def normed(held_out):
    """A model whose norms hold statistics of no data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    model.append(nn.Linear(8, 4)).eval()
    graph = sosp_hub.trace(model, (held_out[0][0][:2],))
    return model, graph, sosp_hub.score(model, graph, [], criterion="magnitude"), held_out[:3]


def test_norms_of_what_is_promised_are_re_estimated(normed, held_out):
    """As the dense model's: what its statistics are beside those of the data, theirs are too."""
    model, graph, saliency, batches = normed
    x = torch.cat([x for x, _ in batches])
    found = sosp_hub.allocate_within(
        model, graph, saliency, held_out, max_drop={"divergence": 9}, rebuild=batches, num_probes=1
    )
    small = found.model
    (kept,) = (
        k for n, k in found.plan.kept.items() if found.plan.sizes[n] == model[3].num_features
    )
    with torch.no_grad():
        before, after = (
            net[:4](x)[:, list(of)] for net, of in ((model, kept), (small, range(len(kept))))
        )
    assert_close(after.mean(0), before.mean(0), relative=0.02)
    assert_close(after.std(0), before.std(0), relative=0.02)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_cut_that_goes_wrong_is_no_promise(trained, held_out, monkeypatch, rebuilt):
    """A group that stays whole would make another model than the plan that is returned."""
    model, graph, saliency, batches = trained
    rewrite, wrong = surgery.rewrite, next(iter(graph.groups))

    def failing(pruned, _, part):
        rewrite(pruned, graph, part)
        if wrong in part.kept:
            raise IndexError("no")

    monkeypatch.setattr(surgery, "rewrite", failing)
    with pytest.raises(VerificationError) as caught:
        sosp_hub.allocate_within(
            model, graph, saliency, held_out, max_drop={"accuracy": 20},
            rebuild=batches if rebuilt else None,
        )  # fmt: skip
    assert caught.value.groups == (wrong,)


def test_norms_of_a_model_of_which_nothing_is_cut_are_what_they_were(normed, held_out):
    model, graph, saliency, batches = normed
    with pytest.raises(BudgetError, match=r"100.0 % of the MACs, where divergence loses 0 ") as one:
        sosp_hub.allocate_within(
            model, graph, saliency, held_out, max_drop={"divergence": 1e-9}, rebuild=batches,
            num_probes=2,
        )  # fmt: skip
    assert "only the whole model keeps it" in str(one.value)


def test_what_cannot_be_promised_says_the_best_that_can(normed, held_out, monkeypatch):
    """Also the whole model does not keep it where its norms are made worse."""
    model, graph, saliency, batches = normed

    def ruin(pruned, *_):
        for name, value in pruned.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.1)

    monkeypatch.setattr(within, "recalibrate_where_nearer", ruin)
    with pytest.raises(BudgetError, match=r"divergence by 1e-09 at most cannot be promised") as one:
        sosp_hub.allocate_within(
            model, graph, saliency, held_out, max_drop={"divergence": 1e-9}, rebuild=batches,
            num_probes=2,
        )  # fmt: skip
    assert str(one.value).count("% of the MACs") >= 3  # what was tried, and the best of it
    _, largest, *_, last = str(one.value).splitlines()
    assert f"the best of these is {largest.strip()}" in last


def test_a_model_of_which_nothing_is_cut_is_no_answer():
    """It keeps every promise; whether it was among what is tried is a matter of rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    model = nn.Sequential(*model, nn.Linear(16, 4)).eval()
    x = torch.randn(1500, 2)
    batches = list(zip(x.split(100), model(x).argmax(-1).split(100), strict=True))
    graph = sosp_hub.trace(model, (x[:2],))
    saliency = sosp_hub.score(model, graph, batches, criterion="fisher")
    with pytest.raises(BudgetError, match=r"divergence by 1e-12 at most cannot be promised") as one:
        sosp_hub.allocate_within(
            model, graph, saliency, batches, max_drop={"divergence": 1e-12}, num_probes=12
        )
    assert "only the whole model keeps it" in str(one.value)


@pytest.mark.parametrize(("drop", "needed"), [(0.1, "4,493"), (1.0, "449")])
def test_too_few_samples_say_how_many_are_needed(trained, held_out, drop, needed):
    model, graph, saliency, _ = trained
    with pytest.raises(DataError, match=f"needs {needed} held-out samples.*there are 400"):
        sosp_hub.allocate_within(model, graph, saliency, held_out[:4], max_drop={"accuracy": drop})


def test_an_unknown_metric_is_refused(trained, held_out):
    model, graph, saliency, _ = trained
    with pytest.raises(BudgetError, match=r"budget.max_drop.acuracy: .*did you mean 'accuracy'"):
        sosp_hub.allocate_within(model, graph, saliency, held_out, max_drop={"acuracy": 1})


def test_metrics_of_samples_sum_to_the_metrics(trained, held_out):
    model = trained[0]
    rows = metrics_of_samples(model, held_out, ["accuracy", "loss", "divergence"], dense=model)
    metrics = evaluate(model, held_out, ["accuracy", "loss"])
    for name, metric in metrics.items():
        x, w = rows[name].unbind(1)
        assert_close((x.sum() / w.sum()).item(), metric.value, relative=1e-9)
        assert len(x) == 1500
    assert rows["divergence"][:, 0].abs().max() < 1e-6


def _entropy(loss, batch):
    found = nn.functional.cross_entropy(loss.outputs, batch[1], reduction="none")
    return found, torch.ones_like(found)


@pytest.mark.parametrize("name", ["nll", "mse", "brier"])
def test_a_promise_of_an_own_metric_needs_to_know_which_way_is_better(trained, held_out, name):
    model, graph, saliency, _ = trained
    with pytest.raises(BudgetError, match=rf"{name}: .*less .*{name}_error .*score_{name}"):
        sosp_hub.allocate_within(
            model, graph, saliency, held_out, max_drop={name: 0.05}, meters={name: _entropy}
        )


def test_an_own_metric_of_which_less_is_better_is_bounded_from_above(trained, held_out):
    model, graph, saliency, _ = trained
    found = {
        name: sosp_hub.allocate_within(
            model, graph, saliency, held_out, max_drop={name: 0.05}, meters={name: _entropy}
        ).plan.kept
        for name in ("token_loss", "calibration_error")
    }
    own = sosp_hub.allocate_within(model, graph, saliency, held_out, max_drop={"loss": 0.05})
    assert found == dict.fromkeys(found, own.plan.kept)
