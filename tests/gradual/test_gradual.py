"""Cuts in rounds in a training loop: shares, state that is carried, a killed schedule."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import sosp_hub
from sosp_hub.compat.accelerate import process_state_kept
from sosp_hub.cost import cost
from sosp_hub.errors import BudgetError, PlanError, VerificationError
from sosp_hub.gradual import GradualPruning
from sosp_hub.recipe.schedule import kept_after
from tests.compare import assert_close

pytestmark = pytest.mark.slow


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
BATCHES = [(X[:32], Y[:32]), (X[32:], Y[32:])]


def pruning(model, optimizer=None, averages=(), **keys):
    keys = {"rounds": 3, "every": 4, "macs": 0.4, **keys}
    return GradualPruning(model, (X[:2],), BATCHES, optimizer=optimizer, averages=averages, **keys)


def train_step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def whole_cost(model):
    return cost(sosp_hub.trace(model, (X[:2],))).macs


@pytest.mark.parametrize("share", ["cubic", "linear"])
def test_each_round_leaves_its_share_of_the_dense_model(share):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    dense, found = whole_cost(model), pruning(model, optimizer, share=share)
    sizes = []
    for _ in range(12):
        if found.step():
            sizes.append(whole_cost(model) / dense)
        train_step(model, optimizer)
    expected = [kept_after(0.4, number, 3, share) for number in (1, 2, 3)]
    for size, most in zip(sizes, expected, strict=True):
        assert most - 0.1 < size <= most
    assert found.rounds_done == 3
    with pytest.raises(BudgetError, match="all 3 rounds are done"):
        found.cut()


@pytest.mark.parametrize("at", ["apply_", "rebuilt_weights"])
def test_a_cut_that_fails_leaves_the_model_as_it_was(at, monkeypatch):
    model, inputs = net(), X.clone()
    parameters, expected = list(model.parameters()), model(inputs).detach()

    def fails(*given, **keys):
        raise VerificationError("no")

    found = pruning(model)
    with monkeypatch.context() as patch:
        patch.setattr(f"sosp_hub.gradual.{at}", fails)
        with pytest.raises(VerificationError):
            found.cut()
    assert_close(model(inputs), expected, relative=0)
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert found.rounds_done == 0
    found.cut()
    assert found.rounds_done == 1


def test_what_cannot_follow_a_cut_is_told_before_it():
    """The model would be cut, its optimizer would not, and the round would count as not done."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(X), Y).backward() or torch.tensor(1.0))
    parameters, expected = list(model.parameters()), model(X).detach()
    for keys in ({"optimizer": optimizer}, {"averages": [nn.Linear(2, 2)]}):
        with pytest.raises(PlanError, match=r"how to cut it|nothing in this Linear is a copy"):
            pruning(model, **keys).step()
        assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
        assert_close(model(X), expected, relative=0)


def test_optimizer_and_averages_follow_every_cut():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    found = pruning(model, optimizer, [average], rebuild=False)
    for _ in range(12):
        before = {p: optimizer.state[p]["exp_avg"].clone() for p in optimizer.state}
        moments = sorted(m.abs().sum().item() for m in before.values())
        if found.step() and moments:  # what is left of them, none begun anew
            for parameter in model.parameters():
                state = optimizer.state[parameter]
                assert state["exp_avg"].shape == parameter.shape
                assert state["step"] > 0
        train_step(model, optimizer)
        average.update_parameters(model)
    shapes = [parameter.shape for parameter in model.parameters()]
    assert [parameter.shape for parameter in average.module.parameters()] == shapes
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }


def test_a_rebuilt_cut_loses_less():
    losses = {}
    for rebuild in (True, False):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(100):
            train_step(model, optimizer)
        pruning(model, optimizer, rounds=1, rebuild=rebuild).step()
        losses[rebuild] = F.cross_entropy(model(X), Y).item()
    assert losses[True] < losses[False]


def test_limits_hold_in_each_round():
    found = pruning(net(), limits={"round_to": 8})
    counts = [count for _ in range(3) for count in found.cut().num_kept().values()]
    assert {count % 8 for count in counts} == {0}


def test_a_loss_of_ones_own_scores_too():
    def own_loss(outputs, targets):
        del targets
        return outputs[:, 0].square().mean()

    graph = sosp_hub.trace(net(), (X[:2],))
    scores = [
        sosp_hub.score(net(), graph, BATCHES, criterion="taylor", loss_fn=loss)
        for loss in (own_loss, None)
    ]
    plans = [sosp_hub.allocate(graph, each, macs=0.4) for each in scores]
    assert plans[0].kept != plans[1].kept
    assert pruning(net(), rounds=1, loss_fn=own_loss).cut().kept == plans[0].kept


def test_norms_of_a_round_hand_on_what_they_did_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 8), nn.BatchNorm1d(8))
    model.append(nn.Linear(8, 3)).train()
    x = torch.cat([x for x, _ in BATCHES])

    def handed_on():
        with torch.no_grad():
            values = copy.deepcopy(model[:4]).eval()(x)
        return torch.stack([values.mean(0), values.std(0)])

    before = handed_on()
    found = pruning(model, rounds=1)
    found.step()
    (plan,) = found.plans
    assert model[2].in_features < 24
    (kept,) = (kept for name, kept in plan.kept.items() if plan.sizes[name] == 8)
    assert_close(handed_on(), before[:, list(kept)], relative=0.05)  # means over batches
    assert model.training


def test_a_schedule_goes_on_with_the_model_that_it_was_saved_beside(tmp_path):
    model = net()
    found = pruning(model)
    for _ in range(6):
        found.step()
    found.save(tmp_path)
    with pytest.raises(PlanError, match="this one has 795; load the checkpoint's"):
        pruning(net()).resume(tmp_path)
    again = pruning(model)
    again.resume(tmp_path)
    assert again.rounds_done == 2
    assert [again.step() for _ in range(3)] == [False, False, True]  # at 8, from 6 on


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_killed_schedule_goes_on_in_the_middle(stop, tmp_path):
    def run(model, optimizer, found, first, last):
        for _ in range(first, last):
            found.step()
            train_step(model, optimizer)

    expected = net()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-2)
    run(expected, optimizer, pruning(expected, optimizer), 0, 12)

    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = pruning(model, optimizer)
    run(model, optimizer, found, 0, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), found.state_dict()))

    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found = pruning(model, optimizer)
    found.load_state_dict(saved[2])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, found, stop, 12)
    assert_close(model.state_dict(), expected.state_dict(), relative=0)
    with pytest.raises(PlanError, match="has cut its model already"):
        found.load_state_dict(saved[2])
    with pytest.raises(PlanError, match="no schedule that was saved"):
        found.resume(tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        *({"macs": 0}, {"macs": 1.5}, {"macs": "0.5"}, {"macs": True}, {"flops": 0.5}),
        *({"rounds": 0}, {"rounds": 2.5}, {"every": 0}, {"every": 1.5}, {"share": "cubik"}),
    ],
)
def test_a_schedule_that_is_none_is_refused(keys):
    with pytest.raises(BudgetError, match=r"GradualPruning got"):
        pruning(net(), **keys)


def test_a_compiled_model_is_looked_through():
    plain, model = net(), net()
    compiled = torch.compile(model, backend="eager")
    both = []
    for given, inside in ((plain, plain), (compiled, model)):
        optimizer = torch.optim.SGD(inside.parameters(), lr=0.1, momentum=0.9)
        rounds = pruning(given, optimizer, rounds=2, every=1)
        for _ in range(2):
            train_step(given, optimizer)
            rounds.step()
        both.append(inside.state_dict())
    assert both[0]["0.weight"].shape != net()[0].weight.shape
    assert_close(both[1], both[0], relative=1e-6)


class Texts(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.arange(8).add(index).remainder(30)
        return {"input_ids": ids, "labels": torch.tensor(index % 2)}


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


BATCH = {
    "input_ids": torch.stack([Texts()[i]["input_ids"] for i in range(8)]),
    "labels": torch.arange(8) % 2,
}


def schedule(model, optimizer):
    inputs = {"input_ids": BATCH["input_ids"][:2]}
    return GradualPruning(model, inputs, [BATCH], rounds=2, every=4, macs=0.7, optimizer=optimizer)


def test_a_transformers_trainer_cuts_while_it_trains(tmp_path):
    made = []

    def make(model, optimizer):
        made.append(schedule(model, optimizer))
        return made[-1]

    inputs = {"input_ids": BATCH["input_ids"][:2]}

    def train(model, folder, steps, resume_from_checkpoint=None, **given):
        arguments = TrainingArguments(
            str(folder), max_steps=steps, save_steps=6, per_device_train_batch_size=4,
            report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
            **given,
        )  # fmt: skip
        callback = sosp_hub.trainer_callback(make)
        trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[callback])
        trainer.train(resume_from_checkpoint)
        return trainer.model

    whole = train(bert(), tmp_path / "whole", 8)
    assert made[-1].rounds_done == 2
    dense = cost(sosp_hub.trace(bert(), inputs)).macs
    assert cost(sosp_hub.trace(whole, inputs)).macs <= 0.7 * dense
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    again = train(
        sosp_hub.from_pretrained(checkpoint),
        tmp_path / "whole",
        8,
        resume_from_checkpoint=str(checkpoint),
    )
    assert made[-1].rounds_done == 2
    assert_close(again.state_dict(), whole.state_dict(), relative=1e-5)
    elsewhere = train(
        sosp_hub.from_pretrained(checkpoint),
        tmp_path / "elsewhere",
        8,
        resume_from_checkpoint=str(checkpoint),
        restore_callback_states_from_checkpoint=True,
    )
    assert made[-1].rounds_done == 2
    assert_close(elsewhere.state_dict(), whole.state_dict(), relative=1e-5)
    with pytest.raises(PlanError, match=r"as it was cut.*sosp_hub\.from_pretrained\(checkpoint\)"):
        train(bert(), tmp_path / "whole", 8, resume_from_checkpoint=str(checkpoint))
    assert math.isfinite(whole(**BATCH).loss.item())
    with process_state_kept():  # its checkpoints hold the cut model
        mixed = train(bert(), tmp_path / "mixed", 8, bf16=True)
    saved = sosp_hub.from_pretrained(tmp_path / "mixed" / "checkpoint-8")
    assert_close(saved.state_dict(), mixed.state_dict(), relative=0)


@pytest.mark.filterwarnings("ignore")  # peft asks deprecated properties
def test_a_trainer_whose_checkpoints_would_lack_the_cut_model_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True)
    callback = sosp_hub.trainer_callback(schedule)
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[callback])
    with pytest.raises(PlanError, match=r"has adapters beside its weights.*in no file"):
        trainer.train()


def test_the_best_checkpoint_of_a_trainer_is_one_since_the_last_cut(tmp_path):
    """An earlier one, of a larger model, was loaded into the cut one: raw errors of sizes."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, save_steps=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="step", greater_is_better=False,
    )  # fmt: skip
    callback = sosp_hub.trainer_callback(schedule)
    trainer = Trainer(
        bert(), arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[callback],
        compute_metrics=lambda _: {"step": trainer.state.global_step},
    )  # fmt: skip
    trainer.train()
    assert callback.pruning.rounds_done == 2
    assert trainer.state.best_global_step == 6  # the second cut comes after four steps
    best = sosp_hub.from_pretrained(tmp_path / "checkpoint-6")
    assert_close(trainer.model.state_dict(), best.state_dict(), relative=0)


def test_a_model_that_was_prepared_in_mixed_precision_is_scored_cut_trained_and_saved(tmp_path):
    """Its pass casts by itself, which second derivatives do not go through and files do not do."""

    class Net(nn.Sequential):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    def made():
        torch.manual_seed(0)
        return Net(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))

    images, labels = torch.randn(8, 3, 4, 4), torch.arange(8) % 3
    with process_state_kept():
        plain, model = made().eval(), made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = Accelerator(cpu=True, mixed_precision="bf16").prepare(model, optimizer)
        model.eval()
        graph = sosp_hub.trace(model, (images[:2],))
        saliency = sosp_hub.score(model, graph, [(images, labels)])
        expected = sosp_hub.score(plain, graph, [(images, labels)])
        assert_close(dict(saliency), dict(expected), relative=1e-6)
        plan = sosp_hub.allocate(graph, saliency, macs=0.6)
        sosp_hub.apply_(model, graph, plan)
        sosp_hub.carry(optimizer, model, graph, plan)
        for mode in (True, False):  # its own pass is the model's, not that of a copy
            model.train(mode)
            assert torch.equal(model(images), model(images)) != mode
        model.train()
        train = F.cross_entropy(model(images), labels)
        train.backward()
        optimizer.step()
        small = sosp_hub.save_pretrained(model, tmp_path / "small")
        loaded = sosp_hub.from_pretrained(small, model=made())
        assert_close(loaded.state_dict(), model.state_dict(), relative=0)


@pytest.mark.parametrize("resumed", [False, True])
def test_floors_are_shares_of_the_groups_before_the_first_round(resumed, tmp_path):
    """Of 24 structures 12 and 3 stay, which is all that the budget leaves room for."""
    limits = {"keep_at_least": {"0:*": 0.5, "*": 0.1}}
    model = net()
    found = pruning(model, rounds=4, macs=0.13, limits=limits)
    found.cut()
    found.cut()
    if resumed:
        found.save(tmp_path)
        found = pruning(model, rounds=4, macs=0.13, limits=limits)
        found.resume(tmp_path)
    found.cut()
    found.cut()
    assert (model[0].out_features, model[2].out_features) == (12, 3)


def test_a_share_that_floors_do_not_allow_is_refused_before_the_first_cut():
    model = net()
    found = pruning(model, macs=0.3, limits={"keep_at_least": 0.6})
    with pytest.raises(BudgetError, match=r"macs=0.3 was asked, .* the least that can be reached"):
        found.cut()
    assert model[0].out_features == 24


def test_a_budget_that_is_given_twice_is_refused():
    with pytest.raises(BudgetError, match=r"macs twice.*leave it out of limits"):
        pruning(net(), limits={"macs": 0.3})
