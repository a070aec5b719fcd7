"""Norms of a cut model hand on what those of the dense model did, whatever data these are of."""

import copy

import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import DataError
from sosp_hub.reconstruction.norms import (
    Moments,
    norm_moments,
    recalibrate_after,
    recalibrate_norm,
)
from tests.compare import assert_close

X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, None)]


def net(*, affine=True, fit=False):
    """Two norms whose statistics are of other data, or of these."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 5)
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    if fit:
        recalibrate_norm(model, BATCHES)
    return model.eval()


def cut(model):
    graph = sosp_hub.trace(model, (X[:2],))
    kept = {name: tuple(range(1, group.size, 2)) for name, group in graph.groups.items()}
    sizes = {name: group.size for name, group in graph.groups.items()}
    plan = sosp_hub.PruningPlan(kept, sizes)
    return sosp_hub.apply(model, graph, plan), graph, plan


def handed_on(model, at):
    """Mean and deviation of what a norm hands on, by channel."""
    with torch.no_grad():
        values = model[: at + 1](X).transpose(0, 1).flatten(1)
    return torch.stack([values.mean(1), values.std(1)])


@pytest.mark.parametrize("affine", [True, False])
def test_each_channel_has_the_mean_and_the_deviation_that_it_had(affine):
    dense = net(affine=affine)
    before = copy.deepcopy(dense.state_dict())
    small, graph, plan = cut(dense)
    kept = copy.deepcopy({n: p for n, p in small.state_dict().items() if "running" not in n})
    assert recalibrate_after(small, dense, graph, plan, BATCHES) == 2
    for at in (1, 4):
        its = handed_on(dense, at)[:, 1::2]
        assert_close(handed_on(small, at), its, relative=1e-4)
    assert_close(dense.state_dict(), before, relative=0)
    now = {name: small.state_dict()[name] for name in kept}
    del kept["1.num_batches_tracked"], kept["4.num_batches_tracked"]
    assert_close({name: now[name] for name in kept}, kept, relative=0)


def test_where_the_statistics_fit_it_is_a_plain_estimate():
    dense = net(fit=True)
    small, graph, plan = cut(dense)
    plain = copy.deepcopy(small)
    recalibrate_norm(plain, BATCHES)
    recalibrate_after(small, dense, graph, plan, BATCHES)
    assert_close(small.state_dict(), plain.state_dict(), relative=1e-3)


def test_without_a_dense_model_statistics_of_other_data_are_lost():
    """What `recalibrate_after` is for."""
    dense = net()
    small = cut(dense)[0]
    recalibrate_norm(small, BATCHES)
    _, deviation = handed_on(dense, 4)[:, 1::2]
    assert (handed_on(small, 4)[1] > 3 * deviation).all()


def test_a_model_that_lost_nothing_is_estimated_to_be_what_it_is():
    """Norms in train mode hand on less of what few samples and places vary by, layer by layer."""
    torch.manual_seed(0)
    layers = [(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(8)]
    model = nn.Sequential(*(each for layer in layers for each in layer), nn.Linear(16, 4))
    x = torch.randn(64, 16) * torch.rand(64, 1) ** 4  # a few samples are all of the variance
    recalibrate_norm(model, [(x, None)])
    model.eval()
    before = copy.deepcopy(model.state_dict())
    graph = sosp_hub.trace(model, (x[:2],))
    whole = sosp_hub.PruningPlan({}, {})
    assert recalibrate_after(model, model, graph, whole, [(b, None) for b in x.split(8)]) == 8
    now = {name: t for name, t in model.state_dict().items() if "num_batches" not in name}
    assert_close(now, {name: before[name] for name in now}, relative=1e-5)


class Branch(nn.Module):
    """A norm that runs in train mode alone."""

    def __init__(self):
        super().__init__()
        self.main = net()
        self.beside = nn.BatchNorm1d(5)
        self.beside.running_mean.fill_(3)

    def forward(self, x):
        x = self.main(x)
        return self.beside(x) if self.training else x


def test_a_norm_that_no_pass_reaches_keeps_its_statistics():
    model = Branch().eval()
    assert recalibrate_norm(model, BATCHES, norm_moments(model, BATCHES)) == 2
    assert_close(model.beside.running_mean, torch.full((5,), 3.0), relative=0)
    assert not model.beside.num_batches_tracked


class Ends(nn.Module):
    def forward(self, x):
        raise KeyError("no")


@pytest.mark.parametrize(
    ("last", "batches", "error"),
    [(Ends(), BATCHES, KeyError), (nn.BatchNorm1d(32), [(X[:1], None)], DataError)],
)
def test_after_an_error_all_is_as_it_was(last, batches, error):
    model = net()
    model[7] = last.eval()
    before, weight = copy.deepcopy(model.state_dict()), model[1].weight
    like = {"1.running_mean": torch.ones(8), "1.running_var": torch.ones(8)}
    with pytest.raises(error):
        recalibrate_norm(model, batches, Moments(like, like))
    assert_close(model.state_dict(), before, relative=0)
    assert model[1].weight is weight
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_samples_one_by_one_have_no_variance_and_the_rebuild_says_so(caplog):
    dense = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    batches = [(x[None], None) for x in torch.randn(16, 4)]
    graph = sosp_hub.trace(dense, (torch.randn(2, 4),))
    (name,) = graph.groups
    plan = sosp_hub.PruningPlan({name: (0, 3, 5)}, {name: 8})
    small = sosp_hub.rebuild(dense, graph, plan, batches)
    assert "norms cannot be re-estimated: " in caplog.text
    assert_close(small[1].running_var, torch.ones(3), relative=0)
    with pytest.raises(DataError, match="one sample alone"):
        sosp_hub.rebuild(dense, graph, plan, batches, norms=True)


def test_a_rebuild_asks_no_other_process_and_stays_on_the_device_of_the_model(monkeypatch):
    """One process of several may rebuild alone, and a model on the CPU beside an accelerator."""
    dense = net()
    _, graph, plan = cut(dense)
    monkeypatch.setattr("sosp_hub.distributed.process_state", None)
    small = sosp_hub.rebuild(dense, graph, plan, [(x, None) for x in X.split(16)], damping=1.0)
    for at in (1, 4):
        mean, its = handed_on(small, at)[0], handed_on(dense, at)[0, 1::2]
        assert_close(mean, its, relative=0.05)


@pytest.mark.parametrize(("given", "done"), [({}, True), ({"norms": False}, False)])
def test_a_rebuild_ends_with_it(given, done):
    dense = net()
    _, graph, plan = cut(dense)
    before = copy.deepcopy(dense.state_dict())
    batches = [(x, None) for x in X.split(16)]
    small = sosp_hub.rebuild(dense, graph, plan, iter(batches), damping=1.0, **given)
    plain = sosp_hub.rebuild(dense, graph, plan, batches, damping=1.0, norms=False)
    if done:
        recalibrate_after(plain, dense, graph, plan, batches)
    assert_close(small.state_dict(), plain.state_dict(), relative=0)
    assert_close(dense.state_dict(), before, relative=0)
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("norms", [None, True])
def test_a_rebuild_leaves_statistics_that_bring_it_farther_from_the_dense_model(
    norms, monkeypatch, caplog
):
    """A MobileNetV3 went from 0.55 to 14 of the mean square of its logits, and lost 2 points."""
    dense = net()
    _, graph, plan = cut(dense)
    batches = [(x, None) for x in X.split(16)]
    plain = sosp_hub.rebuild(dense, graph, plan, batches, norms=False)

    def ruin(pruned, *_):
        pruned[4].running_mean.add_(10)
        return 2

    for module in ("norms", "rebuild"):
        monkeypatch.setattr(f"sosp_hub.reconstruction.{module}.recalibrate_after", ruin)
    with caplog.at_level("INFO", "sosp_hub"):
        small = sosp_hub.rebuild(dense, graph, plan, batches, norms=norms)
    left = norms is None
    assert ("norms: their statistics stay as they were" in caplog.text) is left
    far = (small[4].running_mean - plain[4].running_mean).abs()
    assert_close(far, torch.full_like(far, 0.0 if left else 10.0), relative=1e-5)
