"""Teachers in recipes: told in the report, refused where they do not fit."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from torch import nn

from sosp_hub.data.source import DataInfo
from sosp_hub.errors import ModelError
from sosp_hub.pipeline import teaching
from sosp_hub.prune import main
from sosp_hub.recipe.schema import Recipe

pytestmark = pytest.mark.slow


def test_what_is_followed_is_told(recipe):
    given = [
        "finetune.epochs=1",
        "finetune.distill=0.5",
        "finetune.top_k=3",
        "finetune.probe_steps=1",
    ]
    assert main([str(recipe), *given, "finetune.batch_size=16"]) == 0
    folder = recipe.parent / "out"
    report = json.loads((folder / "sosp_report.json").read_text())
    assert report["recovery"]["teacher"] == {
        **{"id": None, "distill": 0.5, "hidden": 0.0, "relations": 0.0, "top_k": 3},
    }
    assert len(report["recovery"]["rates"]) == 5
    card = " ".join((folder / "README.md").read_text().split())
    assert "following the outputs (its 3 most probable) with weight 0.5 of the dense model" in card
    assert "after a short probe on the same" in card
    assert not (folder / "teacher_logs.npy").exists()


def test_another_teacher_teaches_the_same_classes(recipe):
    first = ["model.train={epochs: 1}", f"output.dir={recipe.parent / 'teacher'}"]
    assert main([str(recipe), *first]) == 0
    dense = recipe.parent / "teacher" / "dense"
    given = ["finetune.epochs=1", "finetune.hidden=1.0", f"finetune.teacher={{id: {dense}}}"]
    given += ["finetune.relations=2.0"]
    assert main([str(recipe), *given]) == 0
    report = json.loads((recipe.parent / "out" / "sosp_report.json").read_text())
    assert report["recovery"]["teacher"]["id"] == ".../dense"
    card = " ".join((recipe.parent / "out" / "README.md").read_text().split())
    assert "cosines between hidden states with weight 2 of another model" in card


@pytest.mark.parametrize(
    ("theirs", "mine", "same"),
    [
        ((1, 0), None, False),
        ((1, 0), (1, 0), True),
        ((0, 1), None, True),
        (None, (1, 0), False),
        ((0, 2), (0, 1), False),  # of three outputs, of which the data has two
    ],
)
def test_a_teacher_of_the_same_classes_in_another_order_is_refused(monkeypatch, theirs, mine, same):
    """Its outputs would teach each class as another."""

    def model(order):
        loaded = SimpleNamespace(model=nn.Linear(2, 2), new_head=False, tokenizer=None)
        return SimpleNamespace(**vars(loaded), processor=SimpleNamespace(label_order=order))

    sections = {
        "model": {"library": "timm", "id": "resnet18", "task": "image-classification"},
        "data": {"id": "sklearn/digits"},
        "finetune": {"distill": 0.5, "teacher": {"id": "resnet34"}},
    }
    data = SimpleNamespace(info=DataInfo(class_names=("cat", "dog")))
    context = SimpleNamespace(recipe=Recipe.model_validate(sections), data=data, loaded=model(mine))
    monkeypatch.setattr(teaching, "load_model", lambda *_, **__: model(theirs))
    told = r"resnet34 has the classes at other outputs \(cat = \d, .*\) than the model \(cat = \d, "
    with nullcontext() if same else pytest.raises(ModelError, match=told):
        assert isinstance(teaching._other(context), nn.Linear)


def test_a_teacher_without_a_head_for_the_data_is_refused(recipe, capsys):
    given = ["finetune.epochs=1", "finetune.distill=0.5", "finetune.teacher={id: nothing_like_it}"]
    assert main([str(recipe), *given]) == 2
    told = capsys.readouterr().err
    assert "nothing_like_it" in told
    assert "error: finetune.teacher: " in told
