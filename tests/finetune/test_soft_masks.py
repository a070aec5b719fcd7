"""Masks of SCP: written out once more, hard ones equal to a cut, and trained from a recipe."""

import copy
import itertools
import json
import logging
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import sosp_hub.zoo.timm
from sosp_hub.allocation import allocate
from sosp_hub.cost import CostModel
from sosp_hub.data.split import MadeSplit
from sosp_hub.distributed import make_accelerator
from sosp_hub.pipeline import masking
from sosp_hub.pipeline.masking import MaskTraining
from sosp_hub.prune import main
from sosp_hub.recipe.training import MaskTrainSection, TrainSection
from sosp_hub.scoring import score
from sosp_hub.soft_masks import PenaltyControl, SoftMasks, off_probability
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.training import train_model
from tests.compare import assert_close
from tests.criteria.test_scp_score import Dense, normal, stack
from tests.finetune.test_finetune import Points

pytestmark = pytest.mark.slow

assert sosp_hub.zoo.timm  # registers the CIFAR ResNets


def spread(model):
    """BatchNorms with many channels that are off, many that are on, and some in between."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
                module.running_var.fill_(0.02)  # so that what is off in most places is on in some
    return model


def masks_of(model, x, **options):
    return SoftMasks(model, trace(model, (x,)).groups, **options)


def test_a_training_mask_is_the_relaxed_sample_written_out():
    model, x = spread(stack(nn.BatchNorm2d(4))).double().train(), torch.randn(2, 3, 8, 8).double()
    masks = masks_of(model, x, t=0.1, c0=0.7, k=5.0, tau=0.8)
    norm = copy.deepcopy(model[1])
    with masks.installed():
        torch.manual_seed(5)
        found = model(x)
    found.square().sum().backward()
    torch.manual_seed(5)
    noise = torch.rand(4).clamp(1e-6, 1 - 1e-6).logit()
    cdf = torch.special.ndtr((0.1 - norm.bias.float()) / (norm.weight.float().abs() + 1e-8))
    p = torch.sigmoid(5.0 * (cdf - 0.7))
    logits = torch.stack([p.log(), (1 - p).log() + noise])  # the noise of the second less the first
    keep = torch.softmax(logits / 0.8, 0)[1].double().view(1, -1, 1, 1)
    expected = model[3:](keep * F.relu(norm(model[0](x))))
    assert_close(found, expected, relative=1e-6)
    expected.square().sum().backward()
    for mine, theirs in ((model[1].weight, norm.weight), (model[1].bias, norm.bias)):
        assert_close(mine.grad, theirs.grad, relative=1e-5)


def test_a_channel_is_sampled_as_often_as_its_probability_says():
    model, x = stack(nn.BatchNorm2d(4)).train(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.copy_(torch.tensor([-1.6, -1.62, -1.9, 0.5]))
    before = model[1].running_mean.clone()
    times, runs = torch.zeros(4), 2000
    with masks_of(model, x).installed(), torch.no_grad():
        for _ in range(runs):
            model[1].running_mean.copy_(before)
            model(x)
            times += model[1].running_mean != before  # moves for sampled channels alone
    p = [1 / (1 + math.exp(-20 * (normal(b, 1) - 0.95))) for b in (-1.6, -1.62, -1.9, 0.5)]
    for share, probability in zip((times / runs).tolist(), p, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / runs)
        assert abs(share - (1 - probability)) < 4 * deviation + 1e-6


def test_statistics_of_sampled_channels_move_as_ever():
    model, x = spread(stack(nn.BatchNorm2d(4))).train(), torch.randn(4, 3, 8, 8)
    model[1].bias.data = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    plain = copy.deepcopy(model)
    plain(x)
    before = copy.deepcopy(model[1])
    with masks_of(model, x, k=1000.0).installed():
        model(x)
    for name in ("running_mean", "running_var"):
        found, moved, old = (getattr(norm, name) for norm in (model[1], plain[1], before))
        assert_close(found, torch.stack([old[0], moved[1], old[2], moved[3]]), relative=0)
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


def test_the_penalty():
    model, x = spread(Dense()), torch.randn(2, 3, 8, 8)
    expected = sum(
        (norm.bias + 2 * norm.weight.abs()).sum().item() * 0.3 for norm in (model.one, model.two)
    )
    expected += 0.25 * sum(norm.weight.square().sum().item() for norm in (model.one, model.two))
    assert masks_of(model, x).penalty(0.3, 0.5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: stack(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 8),
        (Dense, 8),  # channels that are off in one of two pairs
        (lambda: timm.create_model("cifar_resnet20"), 16),
        (lambda: timm.create_model("mobilenetv2_035", num_classes=5), 32),
    ],
    ids=["plain", "dense", "resnet", "mobilenet"],
)
def test_a_physical_cut_equals_the_model_with_hard_masks(build, size):
    model, x = spread(build()).eval(), torch.randn(3, 3, size, size)
    masks, c0 = masks_of(model, x, c0=0.6), 0.6
    graph = trace(model, (x,))
    wanted = {name for name, group in graph.groups.items() if group.rectified}
    with masks.installed(), torch.no_grad():
        masked = model(x)
    with torch.no_grad():
        assert (masked - model(x)).abs().max() > 1e-3
    number = masks.harden_()
    assert number > 0
    assert masks.harden_() == number
    with torch.no_grad():
        assert_close(model(x), masked, relative=1e-6)
    saliency = score(model, graph, [], "scp", c0=c0)
    assert set(saliency) == wanted
    plan = allocate(graph, saliency, threshold=0.0, keep_at_least=1e-6)
    lost = sum(plan.sizes[name] - len(kept) for name, kept in plan.kept.items())
    assert lost > 0
    pruned = apply(model, graph, plan)
    with torch.no_grad():
        assert_close(pruned(x), masked, relative=1e-5)


def test_only_channels_that_every_reader_sees_behind_a_pair_have_masks():
    model, x = timm.create_model("cifar_resnet20").eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.zero_()
                module.bias.fill_(-1.0)
    masks_of(model, x).harden_()
    silent = {name for name, p in model.named_parameters() if name.endswith("bias") and not p.any()}
    assert {name.rpartition(".")[0] for name in silent} == {
        f"layer{i}.{j}.bn1" for i in (1, 2, 3) for j in range(3)
    }
    assert off_probability(torch.tensor(-1.0), torch.tensor(0.0), 0.05) == 1


class HalfBehindAPair(nn.Module):
    """One BatchNorm over the channels of two convolutions, of which one is read past it too."""

    def __init__(self):
        super().__init__()
        self.behind, self.past = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.head, self.side = nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x, masks=None):
        past = self.past(x)
        y = self.norm(torch.cat([self.behind(x), past], 1))
        y = y if masks is None else y * masks.view(1, -1, 1, 1)
        return (self.head(y.relu()) + self.side(past)).mean((2, 3))


@pytest.mark.parametrize("training", [False, True], ids=["hard", "sampled"])
def test_channels_beside_those_with_masks_are_left_as_they_are(training):
    model, x = HalfBehindAPair().train(training), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.norm.bias.copy_(torch.tensor([-0.2, 9.0, -9.0, 9.0, -0.2, 9.0, -0.2]))
        model.norm.running_mean.copy_(torch.randn(7))
    norm = copy.deepcopy(model.norm.state_dict())
    masks = masks_of(model, x, c0=0.55, k=1000.0)
    with torch.no_grad():
        expected = model(x, masks=torch.tensor([0.0, 1, 0, 1, 1, 1, 1]))
        model.norm.load_state_dict(norm)
        with masks.installed():
            masked = model(x)
    assert_close(masked, expected, relative=1e-6)
    assert masks.harden_() == 2
    assert model.norm.bias.tolist() == pytest.approx([0, 9, 0, 9, -0.2, 9, -0.2])
    assert (model.norm.weight == 0).tolist() == [True, False, True, *[False] * 4]


def resnet_without_a_layer():
    """ResNet-20 one of whose blocks has no channel that is on; its branch still adds a constant."""
    model = spread(timm.create_model("cifar_resnet20"))
    with torch.no_grad():
        model.layer2[1].bn1.bias.fill_(-9.0)
        model.layer2[1].bn2.bias.fill_(0.5)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["hard", "sampled"])
def test_a_layer_without_channels_hands_on_its_input(training):
    model, x = resnet_without_a_layer().train(training), torch.randn(3, 3, 16, 16)
    seen = {}
    with masks_of(model, x, c0=0.6, k=1000.0).installed():
        for name in ("layer2.0", "layer2.1", "layer2.2"):
            model.get_submodule(name).register_forward_hook(
                lambda *call, name=name: seen.update({name: call[2].detach()})
            )
        model(x)
    assert_close(seen["layer2.1"], seen["layer2.0"], relative=0)
    assert not torch.equal(seen["layer2.2"], seen["layer2.1"])


def test_a_plan_without_silent_layers_equals_the_model_with_masks():
    model, x = resnet_without_a_layer().eval(), torch.randn(3, 3, 16, 16)
    masks, graph = masks_of(model, x, c0=0.6), trace(model, (x,))
    with masks.installed(), torch.no_grad():
        masked = model(x)
    masks.harden_()
    with torch.no_grad():
        assert (model(x) - masked).abs().max() > 1e-3  # the constant of the silent branch
    kinds = ["channel", "layer"]
    saliency = score(model, graph, [], "scp", c0=0.6, kinds=kinds)
    assert (saliency["layer2:layer"] < 0).tolist() == [True, False]
    plan = allocate(graph, saliency, threshold=0.0, keep_at_least=0, kinds=kinds)
    assert plan.kept["layer2:layer"] == (1,)
    with torch.no_grad():
        assert_close(apply(model, graph, plan)(x), masked, relative=1e-5)


def test_the_penalty_is_on_while_the_budget_is_missed():
    model, x = spread(timm.create_model("cifar_resnet20")), torch.randn(1, 3, 16, 16)
    masks, graph = masks_of(model, x, c0=0.6), trace(model, (x,))
    control = PenaltyControl(masks, graph, {"macs": 0.5}, 0.1)
    left = control.shares()["macs"]
    assert 0.5 < left < 1
    assert [control() for _ in range(20)] == [0.1] * 20
    for norm in (model.layer1[0].bn1, model.layer1[1].bn1, model.layer1[2].bn1):
        norm.bias.data.fill_(-9.0)
    assert control.shares()["macs"] < 0.5
    assert [control() for _ in range(11)] == [0.0] * 11
    for norm in (model.layer1[0].bn1, model.layer1[1].bn1, model.layer1[2].bn1):
        norm.bias.data.fill_(9.0)
    assert [control() for _ in range(10)] == [0.0] * 9 + [0.1]  # looks every tenth step
    assert (control.num_steps, control.num_penalized) == (41, 21)


def test_a_training_with_a_penalty_that_was_cut_off_ends_like_one_that_was_not(tmp_path):
    """Between two looks at the masks, once while the penalty is on and once while it is off."""
    net, x = spread(timm.create_model("cifar_resnet20")), torch.randn(1, 3, 16, 16)
    masks, graph = masks_of(net, x, c0=0.6), trace(net, (x,))
    settings = TrainSection(
        epochs=6, batch_size=8, learning_rate=0.02, optimizer="sgd", save_every_steps=3
    )

    def trained(points, folder):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        control = PenaltyControl(masks, graph, {"macs": 0.5}, 5.0)
        control.holds = lambda: float(model.bias.detach().square().sum()) < 0.05
        train_model(
            model, points, settings, seed=7, checkpoint_dir=folder, also=control,
            penalty=lambda: control() * model.bias.square().sum(),
        )  # fmt: skip
        return model.state_dict(), control.num_steps, control.num_penalized

    whole = trained(Points(64, 1.0), None)
    assert whole[1] == 48
    assert 0 < whole[2] < 48
    for stop_after in (5, 10, 12):
        with pytest.raises(KeyboardInterrupt):
            trained(Points(64, 1.0, stop_after), tmp_path)
    resumed = trained(Points(64, 1.0), tmp_path)
    assert_close(resumed[0], whole[0], relative=0)
    assert resumed[1:] == whole[1:]


def test_a_training_with_masks_that_was_killed_in_an_epoch_tells_all_its_steps(tmp_path):
    images, labels = torch.randn(60, 3, 8, 8), torch.arange(60) % 10

    def trained(folder, stop_after=None):
        left = [stop_after]

        def make(indices):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return images[list(indices)], labels[list(indices)]

        torch.manual_seed(0)
        model, split = timm.create_model("cifar_resnet20", num_classes=10), MadeSplit(60, make)
        section = MaskTrainSection(
            epochs=2, batch_size=8, learning_rate=0.01, save_every_steps=2, held_out=0.2
        )
        accelerator = make_accelerator(seed=0)
        training = MaskTraining(
            masks_of(model, images[:1], c0=0.6), split, split, section, None, folder, accelerator,
            seed=0, num_workers=0,
        )  # fmt: skip
        told = training.run(trace(model, (images[:1],)), {"macs": 0.9})
        return told, model.state_dict()

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", stop_after=5)
    resumed = trained(tmp_path / "killed")
    assert whole[0]["num_steps"] == 12
    assert resumed[0] == whole[0]
    assert_close(resumed[1], whole[1], relative=0)


def test_what_masks_leave_is_what_a_cut_costs():
    model, x = resnet_without_a_layer().eval(), torch.randn(1, 3, 16, 16)
    masks, graph = masks_of(model, x, c0=0.6), trace(model, (x,))
    shares = PenaltyControl(masks, graph, {}, 0.1).shares()
    kinds = ["channel", "layer"]
    saliency = score(model, graph, [], "scp", c0=0.6, kinds=kinds)
    plan = allocate(graph, saliency, threshold=0.0, keep_at_least=0, kinds=kinds)
    dense = CostModel(graph)()
    for quantity, name in (("macs", "macs"), ("params", "params"), ("bytes", "memory_bytes")):
        expected = plan.provenance["predicted"][quantity] / getattr(dense, quantity)
        assert shares[name] == pytest.approx(expected)


# ------------------------------------------------------------------------------------ training
def test_the_penalty_is_trained_and_epochs_are_told():
    torch.manual_seed(0)
    model, told = nn.Linear(2, 2), []
    config = TrainSection(epochs=3, batch_size=8, learning_rate=0.1, optimizer="sgd")
    history = train_model(
        model, Points(16), config,
        penalty=lambda: 50 * model.bias.square().sum(),
        after_part=lambda epoch: told.append((epoch, model.training)) or model.eval(),
    )  # fmt: skip
    assert told == [(1, True), (2, True), (3, True)]
    assert history[0]["loss"] < 5  # without the penalty
    torch.manual_seed(0)
    plain = nn.Linear(2, 2)
    train_model(plain, Points(16), config)
    assert (plain.bias - model.bias).abs().max() > 1e-3


RECIPE = """
model:
  library: timm
  id: cifar_resnet20
  task: image-classification
  pretrained: false
  train: {epochs: 1, learning_rate: 3.0e-3, batch_size: 32}
data: {id: sklearn/digits, num_train: 200, num_test: 50}
criterion:
  name: scp
  c0: 0.3
  train: {epochs: 2, learning_rate: 0.05, batch_size: 30, sparsity: 2.0e-2}
finetune: {epochs: 0, recalibrate_norm: false}
evaluate: {metrics: [accuracy, loss], latency: false}
output: {dir: OUTPUT, figures: false}
"""


def test_from_a_recipe(tmp_path, monkeypatch):
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(RECIPE.replace("OUTPUT", str(output)))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sosp_hub.scoring.score", stop)
        assert main([str(path)]) != 0
    record = json.loads((tmp_path / "out.partial" / "masked.json").read_text())["made"]
    assert record["num_held_out"] == 20
    assert record["epoch"] == 2
    assert record["num_off"] > 0
    assert main([str(path)]) == 0  # goes on behind the training
    report = json.loads((output / "sosp_report.json").read_text())
    assert list(report["metrics"]) == ["dense", "cut", "rebuilt", "final"]
    assert report["plan"]["provenance"]["budget"] == {"threshold": 0.0}
    kept = {name: len(kept) for name, kept in report["plan"]["kept"].items()}
    assert sum(report["plan"]["sizes"][name] - number for name, number in kept.items()) > 0
    assert report["cost"]["after"]["macs"] < report["cost"]["before"]["macs"]


def test_an_epoch_that_leaves_more_than_the_budget_is_not_kept(tmp_path, monkeypatch):
    path, losses = tmp_path / "recipe.yaml", itertools.count()
    text = RECIPE.replace("OUTPUT", str(tmp_path / "out"))
    text = text.replace("epochs: 2", "select_from: 1.0, epochs: 4")
    path.write_text(text + "budget: {macs: 0.6}\n")

    def stop(*_, **__):
        raise KeyboardInterrupt

    # the first epoch is the best, six steps an epoch; the budget is met from the third one on
    monkeypatch.setattr(
        masking, "evaluate", lambda *_, **__: {"loss": SimpleNamespace(value=next(losses))}
    )
    monkeypatch.setattr(masking.PenaltyControl, "holds", lambda self: self.num_steps >= 18)
    monkeypatch.setattr("sosp_hub.scoring.score", stop)
    assert main([str(path)]) == 130
    record = json.loads((tmp_path / "out.partial" / "masked.json").read_text())["made"]
    assert record["num_steps"] == 24
    assert record["epoch"] == 3


def test_a_budget_from_random_weights_beside_a_control(tmp_path, caplog, monkeypatch):
    """One training meets the budget; the untrained model is no dense model to compare with."""
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"
    text = RECIPE.replace("OUTPUT", str(output))
    text = text.replace("  train: {epochs: 1, learning_rate: 3.0e-3, batch_size: 32}\n", "")
    text = text.replace("sparsity: 2.0e-2", "control: true").replace("epochs: 2", "epochs: 6")
    text = text.replace("c0: 0.3", "c0: 0.6")
    path.write_text(text + "budget: {macs: 0.6}\nstructure: {kinds: [channel, layer]}\n")
    logger = logging.getLogger("sosp_hub")
    monkeypatch.setattr(logger, "propagate", True)
    assert main([str(path)]) == 0
    report = json.loads((output / "sosp_report.json").read_text())
    assert next(iter(report["metrics"])) == "control"
    provenance = report["plan"]["provenance"]
    assert provenance["budget"] == {"macs": 0.6, "threshold": 0.0}
    assert provenance["keep_at_least"] == 0
    masks = provenance["masks"]
    assert masks["sparsity"] == pytest.approx(0.3 / (masks["num_steps"] * 0.05))
    assert masks["num_steps"] == 36
    assert 0 < masks["num_penalized"] <= masks["num_steps"]
    assert report["cost"]["after"]["macs"] <= 0.6 * report["cost"]["before"]["macs"]
    card = (output / "README.md").read_text()
    assert "trained as long without masks" in card
    assert "Masks were trained with the model" in card
    assert "not trained before it is scored" not in caplog.text


def test_what_scores_below_0_and_stays_is_told(tmp_path, caplog, monkeypatch):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("OUTPUT", str(tmp_path / "out"))
    path.write_text(text.replace("sparsity: 2.0e-2", "sparsity: 1.0"))
    monkeypatch.setattr("sosp_hub.pipeline.planning.logger.propagate", True, raising=False)
    assert main([str(path), "budget.keep_at_least=0.5"]) == 0
    assert "structures that score less than 0 are kept, by a floor" in caplog.text


def test_layers_alone_have_no_masks(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "out")))
    assert main([str(path), "structure.kinds=[layer]"]) == 2
    assert "masks on channels, and there are none of the kinds layer" in capsys.readouterr().err


def test_a_training_without_samples_is_refused(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("OUTPUT", str(tmp_path / "out"))
    path.write_text(text.replace("sparsity", "held_out: 0.999, sparsity"))
    assert main([str(path)]) == 2
    assert "criterion.train.held_out: 0.999 of 200 samples" in capsys.readouterr().err
