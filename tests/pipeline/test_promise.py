"""``budget.max_drop`` in recipes: from the search to the card, killed and continued."""

import json

import pytest
import timm

import sosp_hub
from sosp_hub.pipeline import planning
from sosp_hub.prune import main

pytestmark = pytest.mark.slow

PROMISE = [
    "data.num_train=300", "data.num_held_out=150", "budget.structures=null",
    "budget.max_drop={divergence: 0.5}", "budget.probes=2", "model.train={epochs: 1}",
]  # fmt: skip


@pytest.fixture
def pretrained(recipe, tmp_path):
    """The recipe with weights that no run made."""
    sosp_hub.save_pretrained(timm.create_model("test_resnet", num_classes=10), tmp_path / "dense")
    model = f"model: {{library: timm, id: {tmp_path / 'dense'}, task: image-classification}}"
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join(model if row.startswith("model:") else row for row in lines))
    return recipe


def report_of(recipe, name="out"):
    return json.loads((recipe.parent / name / "sosp_report.json").read_text())


def test_what_is_promised_measured_and_tried_is_told(recipe, capsys):
    assert main([str(recipe), *PROMISE, "finetune.epochs=1"]) == 0
    report = report_of(recipe)
    promise = report["promise"]
    assert (promise["num_search"], promise["num_proof"]) == (50, 100)
    chosen = promise["curve"][promise["chosen"]]
    assert chosen["proof"]["divergence"]["upper"] <= 0.5
    assert report["cost"]["after"]["macs"] / report["cost"]["before"]["macs"] <= chosen["macs"]
    assert report["recovery"]["promise"]["lost"]["divergence"]["upper"] > 0
    card = (recipe.parent / "out" / "README.md").read_text()
    assert "## What was promised" in card
    assert "at most divergence by 0.5 worse, with 95 % confidence, measured on 100" in card
    assert "Measured after the cut: divergence" in card
    assert card.count(" | yes |") == promise["chosen"] + 1
    assert "chosen" in card
    assert "Promised: compared with" in capsys.readouterr().out


def test_a_search_that_was_killed_goes_on(recipe, monkeypatch):
    assert main([str(recipe), *PROMISE]) == 0
    expected = report_of(recipe)["promise"]
    tried, calls = planning.tried, []

    def dying(context, plan):
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tried(context, plan)

    monkeypatch.setattr(planning, "tried", dying)
    again = [str(recipe), *PROMISE, f"output.dir={recipe.parent / 'again'}"]
    assert main(again) == 130
    assert main(again) == 0
    assert len(calls) == 3 + 3  # five in all, two of them before the kill
    assert report_of(recipe, "again")["promise"] == expected


def test_a_training_that_breaks_the_promise_is_undone(recipe, monkeypatch, caplog):
    monkeypatch.setattr("sosp_hub.pipeline.after_cut.keeps", lambda lost: False)
    assert main([str(recipe), *PROMISE, "finetune.epochs=1"]) == 0
    report = report_of(recipe)
    assert report["metrics"]["final"] == report["metrics"]["cut"]
    assert "loses more than budget.max_drop allows" in caplog.text
    assert "undone because of that" in (recipe.parent / "out" / "README.md").read_text()


def test_nothing_is_fitted_to_what_is_held_out(recipe, monkeypatch):
    seen = {}

    def check(context):
        seen["held_out"] = set(context.held_out.indices)
        seen["train"] = set(context.train.indices)
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "check_promise", check)
    assert main([str(recipe), *PROMISE]) == 130
    assert len(seen["held_out"]) == 150
    assert seen["held_out"] | seen["train"] == set(range(300))
    assert not seen["held_out"] & seen["train"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["budget.max_drop={acuracy: 1}"], "did you mean 'accuracy'"),
        (["budget.max_drop={accuracy: -1}"], "budget.max_drop.accuracy"),
        (["data.num_held_out=100"], "needs 150 held-out samples at least; there are 100"),
        (["data.num_held_out=300"], "data.num_held_out: 300 of 300"),
        (["criterion={name: sosp_i, damping: auto}"], "criterion.damping: auto"),
        (["compare={criteria: [random]}"], "budget.max_drop: goes with `prune` alone"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_promised_is_refused(given, told, recipe, capsys):
    assert main([str(recipe), *PROMISE, *given]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["model.train={epochs: 1}"], "the dense model was trained in that run with samples that"),
        (["model.train={epochs: 1, when: new_head}"], "the scores were made in that run with"),
        ([], "the scores were made in that run with"),
        (["criterion={name: magnitude}"], "is measured, and there is no data"),
    ],
)
def test_scores_of_what_saw_the_samples_are_refused(keys, told, pretrained, capsys):
    assert main([str(pretrained), *keys, "data.num_train=300"]) == 0
    given = ["--from-scores", str(pretrained.parent / "out")]
    assert main([*given, "budget.max_drop={divergence: 0.5}"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
