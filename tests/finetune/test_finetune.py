"""Training: what it computes, and that a run that was cut off ends like one that was not."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from sosp_hub.errors import DataError, ModelError
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recipe.training import TrainSection
from sosp_hub.reconstruction.norms import recalibrate_norm
from sosp_hub.training import train_model
from tests.compare import assert_close

pytestmark = pytest.mark.slow


class Points(Dataset):
    """Points of two classes in the plane; each time a point is asked for it is moved a little."""

    def __init__(self, num, noise=0.0, stop_after=None):
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.arange(num) % 2
        self.points = torch.randn(num, 2, generator=generator) + 3.0 * self.labels[:, None]
        self.noise, self.stop_after = noise, stop_after

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        points = self.points[indices]
        return points + self.noise * torch.randn_like(points), self.labels[indices]


def net_of(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2)]
    return nn.Sequential(*layers).to(dtype)


net = net_of


def config(**keys):
    return TrainSection(**{"epochs": 2, "batch_size": 8, "learning_rate": 0.01, **keys})


def test_it_learns_and_leaves_the_model_in_eval_mode():
    model, points = net(), Points(64)
    history = train_model(model, points, config(epochs=10))
    assert history[-1]["loss"] < 0.3 < history[0]["loss"]
    assert history[-1]["step"] == 80
    assert not model.training
    assert (model(points.points).argmax(1) == points.labels).float().mean() > 0.9


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_learn_as_those_of_32(optimizer, dtype):
    """At a small rate all steps were rounded away: a GPT-2 won a fifth of what it wins now."""
    ends = []
    for given in (torch.float32, dtype):
        model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        model.to(dtype).to(given)
        start = [parameter.detach().float().clone() for parameter in model.parameters()]
        rate = {"adamw": 5e-5, "sgd": 5e-4}[optimizer]
        keys = {"epochs": 10, "optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.0}
        history = train_model(model, Points(64), config(**keys))
        assert history[-1]["step"] == 80
        assert {parameter.dtype for parameter in model.parameters()} == {given}
        moved = [p.detach().float() - q for p, q in zip(model.parameters(), start, strict=True)]
        ends.append(torch.cat([each.flatten() for each in moved]))
    mine, theirs = ends
    along = float(mine @ theirs / (mine @ mine))  # rounding cancels out
    assert 0.9 < along < 1.1


def test_a_part_of_the_samples_is_the_same_part_in_each_epoch_and_another_for_each_seed():
    seen = {}

    class Noted(Points):
        def __getitems__(self, indices):
            seen.setdefault(seed, []).extend(indices)
            return super().__getitems__(indices)

    for seed in (0, 1):
        history = train_model(net(), Noted(64), config(num_samples=24), seed=seed)
        assert history[-1]["step"] == 2 * 3
    assert {len(set(indices)) for indices in seen.values()} == {24}
    assert set(seen[0]) != set(seen[1])
    history = train_model(net(), Points(8), config(num_samples=24))
    assert history[-1]["step"] == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "adamw", "save_every_steps": 3},
        {"optimizer": "sgd", "gradient_accumulation": 3, "save_every_steps": 2},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "save_every_steps": 3, "dtype": torch.bfloat16},
    ],
    ids=["in the middle of an epoch", "accumulated", "each epoch", "16 bits"],
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(tmp_path, keys):
    keys = dict(keys)
    net = partial(net_of, dtype=keys.pop("dtype", torch.float32))
    settings = config(epochs=4, **keys)
    whole = net(dropout=0.5)
    history = train_model(whole, Points(60, noise=1.0), settings, seed=7)
    for stop_after in (12, 10):  # twice, the second time after it went on
        broken, points = net(dropout=0.5), Points(60, 1.0, stop_after)
        with pytest.raises(KeyboardInterrupt):
            train_model(broken, points, settings, seed=7, checkpoint_dir=tmp_path)
        assert any(tmp_path.glob("step-*"))
    continued = net(dropout=0.5)
    torch.manual_seed(99)  # whatever else is drawn in between
    points = Points(60, 1.0, stop_after=28 - 6)  # fewer batches than the whole run needs
    resumed = train_model(continued, points, settings, seed=7, checkpoint_dir=tmp_path)
    assert_close(continued.state_dict(), whole.state_dict(), relative=0)
    assert resumed == history
    other = net(dropout=0.5)
    train_model(other, Points(60, noise=1.0), settings, seed=8)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_close(other.state_dict(), whole.state_dict(), relative=1e-3)


def test_state_of_a_run_of_another_length_is_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_model(net(), Points(64, stop_after=12), config(), checkpoint_dir=tmp_path)
    model, expected = net(), net()
    train_model(model, Points(64), config(epochs=3), checkpoint_dir=tmp_path)
    train_model(expected, Points(64), config(epochs=3))
    assert_close(model.state_dict(), expected.state_dict(), relative=0)


def test_accumulated_batches_are_one_large_batch():
    torch.manual_seed(0)
    large = nn.Linear(2, 2)
    small = copy.deepcopy(large)
    train_model(large, Points(64), config(batch_size=32))
    train_model(small, Points(64), config(batch_size=8, gradient_accumulation=4))
    assert_close(small.state_dict(), large.state_dict(), relative=1e-5)


def test_each_epoch_has_an_order_of_its_own():
    seen = []

    class Noted(Points):
        def __getitems__(self, indices):
            seen.extend(indices)
            return super().__getitems__(indices)

    train_model(net(), Noted(32), config(epochs=3))
    epochs = [tuple(seen[start : start + 32]) for start in (0, 32, 64)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(32))] * 3
    assert len(set(epochs)) == 3


def test_the_order_of_samples_is_the_seeds():
    orders = {}

    class Noted(Points):
        def __getitems__(self, indices):
            orders[run].extend(indices)
            return super().__getitems__(indices)

    for run in ((3, "once"), (3, "again"), (4, "once")):
        orders[run] = []
        train_model(net(), Noted(64), config(epochs=1), seed=run[0])
        assert sorted(orders[run]) == list(range(64))
    assert orders[3, "once"] == orders[3, "again"] != orders[4, "once"]


def test_dropout_is_another_one_for_another_seed():
    """All samples are alike, so that their order decides nothing."""
    weights = []
    for seed in (0, 0, 1):
        model, points = net(dropout=0.5), Points(32)
        points.points[:], points.labels[:] = points.points[0], 0
        train_model(model, points, config(), seed=seed)
        weights.append(model[4].weight.detach())
    assert_close(weights[1], weights[0], relative=0)
    assert (weights[2] - weights[0]).abs().max() > 1e-4


@pytest.mark.parametrize("parts", [1, 4])
def test_no_step_is_longer_than_the_largest_gradient_norm(parts):
    """Plain SGD with a rate of 1 moves the weights by the gradient: of a whole batch, clipped."""
    torch.manual_seed(0)
    model, points = nn.Linear(2, 2), Points(32)
    points.points *= 100
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    loss = F.cross_entropy(model(points.points), points.labels)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])
    assert wanted.norm() > 1
    settings = config(
        epochs=1, batch_size=32 // parts, gradient_accumulation=parts, optimizer="sgd", momentum=0,
        learning_rate=1.0, schedule="constant", warmup_share=0.0, weight_decay=0.0,
        max_grad_norm=0.01,
    )  # fmt: skip
    train_model(model, points, settings)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert_close(moved, -wanted * 0.01 / wanted.norm(), relative=1e-3)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = config(epochs=10, warmup_share=0.1, learning_rate=0.5, optimizer="sgd")
    rates = [point["learning_rate"] for point in train_model(net(), Points(80), settings)]
    warm = [0.5 * (i + 1) / 11 for i in range(10)]
    cosine = [0.25 * (1 + math.cos(math.pi * i / 90)) for i in range(90)]
    assert_close(rates, warm + cosine)
    flat = train_model(net(), Points(80), config(schedule="constant", warmup_share=0.0))
    assert {point["learning_rate"] for point in flat} == {0.01}


def test_weight_decay_spares_biases_and_norms():
    model = net()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)  # decay alone moves anything
    settings = config(epochs=1, weight_decay=1.0, schedule="constant", max_grad_norm=None)
    train_model(model, Points(8), settings)
    decayed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert decayed == {"0.weight", "4.weight"}


def test_label_smoothing_is_that_of_cross_entropy():
    torch.manual_seed(0)
    model, points = nn.Linear(2, 2), Points(8)
    expected = F.cross_entropy(model(points.points), points.labels, label_smoothing=0.2)
    (point,) = train_model(model, points, config(epochs=1, label_smoothing=0.2))
    assert_close(point["loss"], expected)


def test_distillation_mixes_in_the_teachers_divergence():
    torch.manual_seed(0)
    student, teacher, points = nn.Linear(2, 2), nn.Linear(2, 2), Points(8)
    frozen = copy.deepcopy(teacher.state_dict())
    logits, target = student(points.points), teacher(points.points)
    p = F.softmax(target / 3, dim=1)
    divergence = (p * (p.log() - F.log_softmax(logits / 3, dim=1))).sum(1).mean() * 9
    expected = 0.25 * F.cross_entropy(logits, points.labels) + 0.75 * divergence
    settings = FinetuneSection(epochs=1, batch_size=8, distill=0.75, temperature=3.0)
    (point,) = train_model(student, points, settings, teacher=teacher)
    assert_close(point["loss"], expected.detach())
    assert_close(teacher.state_dict(), frozen, relative=0)


def test_a_loss_that_is_not_finite_stops_and_says_what_to_do(tmp_path):
    points = Points(64)
    points.points[5] = float("nan")
    with pytest.raises(ModelError, match=r"nan at step \d+.*learning rate \(now"):
        train_model(net(), points, config(), checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())  # and no state that would continue it


def test_a_last_step_that_ruins_the_model_is_told():
    settings = config(epochs=1, learning_rate=1e30, optimizer="sgd", max_grad_norm=None)
    with pytest.raises(ModelError, match=r"training loss is (nan|inf) at step 1.*1e\+30"):
        train_model(net(), Points(8), settings)


def test_no_samples_at_all_are_refused():
    with pytest.raises(DataError, match="0 training samples"):
        train_model(net(), Points(0), config())


def test_recalibrated_statistics_are_means_over_the_batches():
    model = net().eval()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    points = Points(25)
    batches = [(points.points[i : i + 8], points.labels[i : i + 8]) for i in (0, 8, 16, 24)]
    assert len(batches[-1][1]) == 1  # no variance: left out
    assert recalibrate_norm(model, batches) == 1
    with torch.no_grad():
        hidden = [model[0](x) for x, _ in batches[:3]]
    assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert not model.training
    assert not model[1].training
    assert model[1].momentum == 0.1
    del weights["1.num_batches_tracked"]
    assert_close({k: model.state_dict()[k] for k in weights}, weights, relative=0)


def test_norms_are_estimated_without_what_a_gradient_needs():
    """Else a pass over calibration data takes the memory of a training step."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    seen = []
    model.register_forward_hook(lambda *given: seen.append(given[2].requires_grad))
    recalibrate_norm(model, [(torch.randn(4, 2), torch.zeros(4).long())])
    assert seen == [False]


@pytest.mark.parametrize("freeze", [True, False, None])
def test_norms_keep_their_statistics_where_they_are_to(freeze):
    model, points = net(), Points(64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = FinetuneSection(learning_rate=0.01, epochs=2, batch_size=8, freeze_norm=freeze)
    train_model(model, points, settings, after_part=lambda _: model.eval(), parts_per_epoch=2)
    same = {n: torch.equal(t, before[n]) for n, t in model.state_dict().items()}
    assert not same["0.weight"]
    assert all(same[n] is bool(freeze) for n in same if "running" in n or "num_batches" in n)
    assert not any(module.training for module in model.modules())


def test_a_net_without_batch_norm_has_nothing_to_recalibrate():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert recalibrate_norm(model, [(torch.randn(4, 2), torch.zeros(4).long())]) == 0
