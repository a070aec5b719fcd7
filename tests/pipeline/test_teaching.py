"""Teachers in recipes: told in the report, refused where they do not fit."""

import json

import pytest

from sosp_hub.prune import main

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
    assert report["recovery"]["teacher"] == {"id": None, "distill": 0.5, "hidden": 0.0, "top_k": 3}
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
    assert main([str(recipe), *given]) == 0
    report = json.loads((recipe.parent / "out" / "sosp_report.json").read_text())
    assert report["recovery"]["teacher"]["id"] == ".../dense"


def test_a_teacher_without_a_head_for_the_data_is_refused(recipe, capsys):
    given = ["finetune.epochs=1", "finetune.distill=0.5", "finetune.teacher={id: nothing_like_it}"]
    assert main([str(recipe), *given]) == 2
    assert "nothing_like_it" in capsys.readouterr().err
