"""What a stopped run left is used again exactly where it still fits the recipe."""

import json
import shutil
from types import SimpleNamespace

import pytest

from sosp_hub.pipeline.after_cut import final
from sosp_hub.pipeline.planning import plan
from sosp_hub.pipeline.stage_cache import STEPS, StageCache, step
from sosp_hub.recipe.schema import Recipe


def recipe(**sections):
    record = {
        "model": {"library": "timm", "id": "resnet18", "task": "image-classification"},
        "data": {"id": "sklearn/digits"},
    }
    criterion = {"name": "sosp_h", **sections.pop("criterion", {})}
    return Recipe.model_validate(record | {"criterion": criterion} | sections)


@pytest.fixture
def folder(tmp_path):
    """A work folder in which every stage is done."""
    work = StageCache(tmp_path / "out.partial", recipe())
    for number, each in enumerate(STEPS.values()):
        assert work.read(each) is None
        work.training_state(each)
        work.write(each, {"number": number}, seconds=1.5)
    return work.folder


def test_nothing_is_written_before_there_is_a_result(tmp_path):
    StageCache(tmp_path / "out.partial", recipe())
    assert list(tmp_path.iterdir()) == []


def test_the_same_recipe_goes_on_with_everything(folder):
    work = StageCache(folder, recipe())
    assert work.kept == list(STEPS)
    assert not work.changes
    assert [work.read(each)["made"]["number"] for each in STEPS.values()] == list(range(len(STEPS)))
    assert work.seconds() == dict.fromkeys(STEPS, 1.5)
    assert not list(folder.glob("*.state"))  # a done stage needs no training state


@pytest.mark.parametrize(
    ("sections", "change", "kept"),
    [
        ({"seed": 1}, ("seed", (0, 1)), []),
        (
            {"criterion": {"name": "taylor"}},
            ("criterion.name", ("sosp_h", "taylor")),
            ["dense", "dense_metrics", "control", "curvature"],
        ),
        (
            {"criterion": {"per": "macs"}},
            ("criterion.per", (None, "macs")),
            ["dense", "dense_metrics", "control", "curvature"],
        ),
        (
            {"criterion": {"num_samples": 7}},
            ("criterion.num_samples", (1024, 7)),
            ["dense", "dense_metrics", "control"],
        ),
        (
            {"criterion": {"mode": "differences"}},
            ("criterion.mode", ("auto", "differences")),
            ["dense", "dense_metrics", "control", "curvature"],
        ),
        (
            {"structure": {"kinds": ["neuron"]}},
            None,
            ["dense", "dense_metrics"],
        ),
        (
            {"criterion": {"compensate": True}},
            ("criterion.compensate", (None, True)),
            ["dense", "dense_metrics", "masked", "control", "blocks", "curvature", "saliency"],
        ),
        (
            {"budget": {"macs": 0.25}},
            ("budget.macs", (0.5, 0.25)),
            ["dense", "dense_metrics", "masked", "control", "curvature", "saliency"],
        ),
        (
            {"finetune": {"epochs": 3}},
            ("finetune.epochs", (10, 3)),
            [
                "dense",
                "dense_metrics",
                "masked",
                "control",
                "blocks",
                "curvature",
                "damping",
                "promised",
                "saliency",
                "plan",
                "rebuilt",
                "cut_metrics",
                "rebuilt_metrics",
            ],
        ),
        (
            {"evaluate": {"metrics": ["loss"]}},
            ("evaluate.metrics", (None, ["loss"])),
            [
                *("dense", "masked", "blocks", "curvature", "damping", "promised", "saliency"),
                *("plan", "rebuilt", "final"),
            ],
        ),
        ({"output": {"figures": False}}, None, list(STEPS)),
    ],
    ids=[
        "seed",
        "criterion",
        "per",
        "samples",
        "option",
        "kinds",
        "compensate",
        "budget",
        "finetune",
        "evaluate",
        "output",
    ],
)
def test_a_changed_recipe_does_again_what_the_change_touches(folder, sections, change, kept):
    work = StageCache(folder, recipe(**sections))
    assert set(kept) <= set(STEPS)
    assert work.kept == [name for name in STEPS if name in kept]  # in the order of the imports
    assert work.stale == [name for name in STEPS if name not in kept]
    assert [work.read(each) is None for each in STEPS.values()] == [n not in kept for n in STEPS]
    if change is not None:
        key, values = change
        assert work.changes[key] == values


def test_a_record_that_was_cut_off_does_not_count(folder):
    (folder / "plan.json").write_text((folder / "plan.json").read_text()[:-3])
    assert StageCache(folder, recipe()).read(plan) is None


def test_training_state_of_another_recipe_is_emptied(tmp_path):
    work = StageCache(tmp_path / "out.partial", recipe())
    state = work.training_state(final)
    (state / "step-000000001").mkdir()
    same = StageCache(work.folder, recipe())
    assert (same.training_state(final) / "step-000000001").is_dir()
    other = StageCache(work.folder, recipe(finetune={"epochs": 3}))
    assert other.stale == ["final"]
    assert other.changes["finetune.epochs"] == (10, 3)
    assert not (other.training_state(final) / "step-000000001").exists()
    marker = json.loads((state / "made_with.json").read_text())
    assert marker["made_with"]["finetune"]["epochs"] == 3


def test_half_of_a_training_state_belongs_to_no_recipe(tmp_path):
    """As a kill leaves it that came while it was deleted, or before it was marked."""
    state = StageCache(tmp_path / "out.partial", recipe()).training_state(final)
    for marker in (None, '{"made_with": {"model"'):
        (state / "step-000000001").mkdir()
        (state / "made_with.json").unlink()
        if marker:
            (state / "made_with.json").write_text(marker)
        StageCache(state.parent, recipe()).training_state(final)
        assert [path.name for path in state.iterdir()] == ["made_with.json"]


def test_a_record_goes_before_its_tensors_are_written_anew(folder):
    """A kill between the two must not leave the record of one recipe beside tensors of another."""
    other = recipe(finetune={"epochs": 3})
    StageCache(folder, other).begin(final)
    assert StageCache(folder, recipe()).read(final) is None
    assert StageCache(folder, recipe()).read(plan) is not None


def test_what_is_half_deleted_holds_nothing(folder, monkeypatch):
    (folder / "final.state").mkdir()
    (folder / "final.state" / "made_with.json").write_text("{}")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    StageCache(folder, recipe()).remove()
    assert StageCache(folder, recipe()).kept == []
    assert not list(folder.rglob("*.json"))


def test_a_step_is_declared_where_it_is_made():
    """Its needs are its own and those of the steps it builds on; it runs where they changed."""
    calls = []
    try:

        @step("toy", plan, "evaluate")
        def toy(context, number):
            calls.append(number)
            return {"number": number}

        assert toy.needs == (*plan.needs, "evaluate")
        with pytest.raises(ValueError, match="two steps are called 'toy'"):
            step("toy", "model")
    finally:
        del STEPS["toy"]


def test_a_step_that_only_a_test_declares_is_kept_and_done_again(tmp_path):
    calls = []

    @step("toy", plan, "evaluate")
    def toy(context, number):
        calls.append(number)
        return {"number": number}

    def opened(**sections):
        made = recipe(**sections)
        return SimpleNamespace(recipe=made, cache=StageCache(tmp_path / "out.partial", made))

    try:
        assert toy.made(opened()) is None
        assert toy(opened(), 1) == {"number": 1}
        assert toy(opened(), 2) == {"number": 1}  # what is there
        assert toy(opened(finetune={"epochs": 3}), 3) == {"number": 1}  # needs no fine-tuning
        assert toy(opened(evaluate={"metrics": ["loss"]}), 4) == {"number": 4}
        assert calls == [1, 4]
    finally:
        del STEPS["toy"]
