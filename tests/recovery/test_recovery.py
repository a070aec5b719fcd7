"""Fine-tuning never ends worse than it began, on samples that it was not trained with."""

import contextlib
import copy
import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sosp_hub.compat.accelerate import process_state_kept
from sosp_hub.data.loading import calibration_batches
from sosp_hub.data.split import Split
from sosp_hub.errors import DataError, ModelError
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.best import BestState, hold_out
from sosp_hub.recovery.probe import best_rate, probe_rates
from sosp_hub.recovery.recover import recover
from tests.compare import assert_close

pytestmark = pytest.mark.slow


class Points(Split):
    """Points of two classes in the plane; the seen ones are remembered."""

    def __init__(self, num, stop_after=None):
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.arange(num) % 2
        self.points = torch.randn(num, 2, generator=generator) + 1.5 * self.labels[:, None]
        self.num_labels, self.class_names = 2, ("a", "b")
        self.seen, self.stop_after = [], stop_after

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise KeyboardInterrupt
        self.seen += list(indices)
        return self.points[indices], self.labels[indices]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def config(**keys):
    return FinetuneSection(**{"epochs": 3, "batch_size": 16, "learning_rate": 0.01, **keys})


def held_out_loss(model, points, seed=0, share=0.25):
    part, _ = hold_out(points, points, share, seed, key="share")
    batch = points.points[part.indices], points.labels[part.indices]
    return evaluate(model, [batch], ["loss"])["loss"].value


def test_a_rate_that_ruins_the_model_leaves_it_as_it_was(caplog):
    points = Points(160)
    model = net()
    recover(model, points, config(held_out=0.25, epochs=8))  # one that is good already
    before = copy.deepcopy(model.state_dict())
    found = recover(model, points, config(held_out=0.25, learning_rate=30.0, optimizer="sgd"))
    assert found.selected.epoch == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "finetune.learning_rate (now 30)" in caplog.text
    assert "finetune.epochs" not in caplog.text  # 21 steps are not few
    assert not model.training


def test_few_steps_are_named_where_they_taught_nothing(caplog):
    settings = config(held_out=0.25, batch_size=64, learning_rate=30.0, epochs=1, optimizer="sgd")
    assert recover(net(), Points(160), settings).selected.epoch == 0
    told = "raise finetune.epochs (now 1) or lower finetune.batch_size (now 64) for more than 1 st"
    assert told in caplog.text
    assert "lower finetune.learning_rate (now 30)" in caplog.text


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.0, 10.0])
def test_it_is_never_worse_than_it_began_and_the_best_that_it_saw(rate, seed):
    points, model = Points(160), net()
    start = held_out_loss(model.eval(), points, seed)
    found = recover(model, points, config(held_out=0.25, learning_rate=rate), seed=seed)
    end = held_out_loss(model, points, seed)
    assert end <= start
    losses = [loss for _, loss in found.selected.losses]
    assert_close(end, min(losses), relative=1e-5)
    assert_close(losses[0], start, relative=1e-5)
    assert found.num_held_out == 40


def test_held_out_samples_are_not_trained_with():
    points, augmented = Points(80), Points(80)
    recover(net(), points, config(held_out=0.25, most_held_out=10), augmented=augmented)
    part, _ = hold_out(points, points, 0.25, 0, most=10, key="share")
    assert set(points.seen) == set(part.indices)
    assert len(part.indices) == 10
    assert set(augmented.seen) == set(range(80)) - set(part.indices)


def test_without_held_out_samples_the_last_state_stays():
    points, model = Points(80), net()
    found = recover(model, points, config(held_out=0, learning_rate=30.0, optimizer="sgd"))
    assert found.selected is None
    assert held_out_loss(model, points) > held_out_loss(net().eval(), points)


@pytest.mark.parametrize(("epochs", "evaluations"), [(1, 4), (3, 6), (4, 4), (6, 6)])
def test_a_short_training_is_looked_at_within_its_epochs(epochs, evaluations):
    found = recover(net(), Points(160), config(epochs=epochs, held_out=0.25, batch_size=8))
    times = [epoch for epoch, _ in found.selected.losses]
    assert times[0] == 0
    assert times[-1] == epochs
    assert len(times) == 1 + evaluations
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) - min(gaps) <= 1 / 15 + 1e-9  # a step


@pytest.mark.parametrize("stop_after", [3, 9, 12, 17, 20])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(stop_after, tmp_path):
    keys = {"held_out": 0.25, "learning_rate": 0.3, "save_every_steps": 3}
    whole, model = net(), net()
    expected = recover(whole, Points(160), config(**keys))
    (tmp_path / "state").mkdir()
    with pytest.raises(KeyboardInterrupt):
        recover(
            model,
            Points(160),
            config(**keys),
            augmented=Points(160, stop_after),
            checkpoint_dir=tmp_path / "state",
        )
    model = net()
    found = recover(model, Points(160), config(**keys), checkpoint_dir=tmp_path / "state")
    assert found == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_best_state_survives_a_kill(tmp_path):
    model = nn.Linear(1, 1)

    def offer(*pairs):
        for epoch, loss in pairs:
            model.weight.data.fill_(float(epoch))
            BestState(model, tmp_path).offer(epoch, loss)
        selected = BestState(model, tmp_path).load()
        assert model.weight.item() == selected.epoch
        return selected.epoch

    assert offer((5, 2.0), (6, 1.0), (7, 3.0)) == 6
    assert offer((7, 3.0), (8, 0.9)) == 8  # epoch 7 again, after a kill
    assert offer((6, 5.0), (7, 4.0), (8, 4.5)) == 7  # begun again from before what was known
    assert BestState(model, tmp_path).selected.losses == ((5, 2.0), (6, 5.0), (7, 4.0), (8, 4.5))
    assert offer((9, math.nan)) == 7
    assert offer((4, math.nan), (5, 1.0)) == 5


@pytest.mark.parametrize("at", ["safetensors.torch.save_file", "pathlib.Path.replace"])
@pytest.mark.parametrize("half", [False, True])
def test_a_kill_while_the_best_state_is_written_leaves_the_one_before(
    at, half, tmp_path, monkeypatch
):
    model = nn.Linear(1, 1)

    def offer(epoch, loss):
        model.weight.data.fill_(float(epoch))
        BestState(model, tmp_path).offer(epoch, loss)

    def killed(tensors, name, *rest, **more):
        if half and at.endswith("save_file"):
            Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    offer(1, 3.0)
    offer(2, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(at, killed)
        with pytest.raises(KeyboardInterrupt):
            offer(3, 1.0)
    assert BestState(model, tmp_path).load().losses == ((1, 3.0), (2, 2.0))
    assert model.weight.item() == 2
    offer(3, 1.0)
    assert BestState(model, tmp_path).load().epoch == 3
    assert model.weight.item() == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_training_that_ends_with_an_error_leaves_the_best_state():
    for stop_after, keys, error in (
        (12, {}, KeyboardInterrupt),
        (None, {"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": None}, ModelError),
    ):
        model, points = net(), Points(160)
        start = held_out_loss(model.eval(), points)
        with pytest.raises(error):
            recover(
                model,
                points,
                config(held_out=0.25, **keys),
                augmented=Points(160, stop_after),
            )
        assert held_out_loss(model, points) <= start


def test_after_a_training_another_accelerator_prepares_the_model(monkeypatch):
    """One that is marked is handed back as it is: no mixed precision, and no averaged gradients."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for points in (Points(64), Points(64, stop_after=2)):
        model = net()
        before = [set(vars(module)) for module in model.modules()]
        with process_state_kept():
            with contextlib.suppress(KeyboardInterrupt):
                recover(model, Points(64), config(held_out=0.25), augmented=points)
            assert [set(vars(module)) for module in model.modules()] == before
            assert model(points.points).dtype == torch.float32
            prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
            assert "forward" in vars(prepared)


class Decorated(nn.Sequential):
    """As the models of transformers: what the caller gets is what the decorator makes."""

    @staticmethod
    def _doubled(forward):
        @functools.wraps(forward)
        def run(self, x):
            return 2 * forward(self, x)

        return run

    forward = _doubled(nn.Sequential.forward)


def test_after_a_training_in_mixed_precision_forward_is_decorated_as_it_was(monkeypatch):
    """Accelerate, which unwraps it, goes on through the decorators of the class."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model, points = Decorated(*net()), Points(64)
    with process_state_kept():
        recover(model, points, config(held_out=0.25))
    assert "forward" not in vars(model)
    assert_close(model(points.points), 2 * nn.Sequential(*model)(points.points), relative=0)


def test_a_model_that_the_caller_has_prepared_is_so_afterwards():
    with process_state_kept():
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(net())
        before = dict(vars(model))
        recover(model, Points(64), config(held_out=0.25))
        assert vars(model).keys() == before.keys()
        assert all(vars(model)[name] is before[name] for name in ("forward", "_original_forward"))


def test_a_forward_of_the_models_own_is_there_after_a_training():
    model, points = net(), Points(64)
    model.forward = functools.partial(nn.Sequential.forward, model)
    own = model.forward
    recover(model, points, config(held_out=0.25))
    assert model.forward is own


def test_too_few_samples_are_refused():
    with pytest.raises(DataError, match=r"finetune.held_out: 0.9 of 5 samples leaves none"):
        recover(net(), Points(5), config(held_out=0.9))
    part, rest = hold_out(Points(5), Points(5), 0.1, 0, key="share")  # one, and not none or all
    assert (len(part), len(rest)) == (1, 4)
    without = recover(net(), Points(5), config(held_out=0.9, epochs=0))
    assert (without.selected, without.history) == (None, [])


def test_a_probe_finds_the_rate_and_leaves_no_trace(caplog):
    points, probed = Points(160), net()
    keys = {"held_out": 0.25, "learning_rate": 1e-4, "probe_steps": 5}
    with caplog.at_level("INFO"):
        found = recover(probed, points, config(**keys))
    rates = [rate for rate, _ in found.rates]
    assert rates == pytest.approx([1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    assert min(found.rates, key=lambda pair: pair[1])[0] == pytest.approx(1e-3)
    assert "learning rate 0.001, the best of 1e-05" in caplog.text
    direct = net()
    expected = recover(direct, Points(160), config(held_out=0.25, learning_rate=rates[-1]))
    assert found.history == expected.history
    for name, tensor in direct.state_dict().items():
        assert torch.equal(probed.state_dict()[name], tensor)
    part, _ = hold_out(points, points, 0.25, 0, key="share")
    assert_close(expected.selected.losses[0][1], found.selected.losses[0][1], relative=0)
    assert len(part.indices) == 40


def test_a_rate_that_diverges_is_not_chosen():
    model = net()
    keys = {"learning_rate": 1e9, "optimizer": "sgd", "max_grad_norm": None, "probe_steps": 4}
    with torch.no_grad():
        model[0].weight.mul_(1e30)
    with pytest.raises(ModelError):
        recover(model, Points(160), config(held_out=0.25, **keys))
    found = recover(net(), Points(160), config(held_out=0.25, **{**keys, "learning_rate": 0.1}))
    assert len(found.rates) == 5


def test_a_rate_whose_loss_is_no_number_is_not_chosen(tmp_path):
    model, losses = net().train(), iter([math.nan, 2.0, 1.0, math.nan, math.inf])

    def train(short):
        model.eval()
        model[0].weight.data.zero_()

    settings = config(probe_steps=1)
    rates = probe_rates(model, settings, train, lambda: next(losses), tmp_path, batch_size=4)
    assert best_rate(rates) == settings.rate
    assert model.training
    assert model[0].weight.abs().max() > 0
    again = probe_rates(model, settings, train, lambda: next(losses), tmp_path, batch_size=4)
    assert again == rates


def test_of_rates_that_do_alike_the_smaller_is_taken():
    assert best_rate(((0.1, 2.0), (0.01, 2.0), (1.0, 2.0))) == 0.01
    assert best_rate(((0.1, math.inf), (1.0, math.inf))) == 0.1
    assert best_rate(((0.1, math.inf), (1.0, 3.0))) == 1.0


def test_a_killed_run_keeps_what_its_probe_found(tmp_path):
    keys = {"held_out": 0.25, "learning_rate": 1e-3, "probe_steps": 2, "save_every_steps": 3}
    expected = recover(net(), Points(160), config(**keys))
    with pytest.raises(KeyboardInterrupt):  # after the probe of ten batches
        recover(
            net(),
            Points(160),
            config(**keys),
            augmented=Points(160, 10 + 9),
            checkpoint_dir=tmp_path,
        )
    assert (tmp_path / "probe.json").is_file()
    points = Points(160)
    assert recover(net(), points, config(**keys), checkpoint_dir=tmp_path) == expected


def test_a_probe_needs_held_out_samples():
    with pytest.raises(ValueError, match="probe_steps: the rate is chosen on held-out samples"):
        config(held_out=0, probe_steps=3)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rate=st.floats(-5, 1).map(lambda power: 10**power),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    schedule=st.sampled_from(["cosine", "constant"]),
    distill=st.sampled_from([0.0, 0.5, 1.0]),
    epochs=st.integers(1, 2),
    lora=st.sampled_from([None, {"rank": 2}]),
    probe=st.sampled_from([None, 2]),
    seed=st.integers(0, 1000),
)
def test_no_setting_ends_worse_than_it_began(
    rate, optimizer, schedule, distill, epochs, lora, probe, seed
):
    points, model, teacher = Points(80), net(), net()
    with torch.no_grad():
        teacher[0].weight.mul_(2.0)
    start = held_out_loss(model.eval(), points, seed)
    keys = {"learning_rate": rate, "optimizer": optimizer, "schedule": schedule, "epochs": epochs}
    keys |= {"distill": distill, "lora": lora, "probe_steps": probe, "held_out": 0.25}
    with contextlib.suppress(ModelError):  # a loss that is not finite stops, and says so
        recover(model, points, config(**keys), teacher=teacher, seed=seed)
        assert held_out_loss(model, points, seed) <= start * (1 + 1e-6)


def test_what_judges_has_not_calibrated():
    """A cut is scored and rebuilt with the samples at the front of the same random order."""
    points = Points(80)
    calibration = calibration_batches(points, 60, 20, seed=5)
    list(calibration)
    seen, points.seen = set(points.seen), []
    part, rest = hold_out(points, points, 0.25, 5, key="share")
    assert len(seen) == 60
    assert not seen & set(part.indices)
    assert seen == set(rest.indices)
