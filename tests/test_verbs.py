"""The verbs of recipes in Python: what they give back, and what they leave alone."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import sosp_hub
from sosp_hub.compat.accelerate import process_state_kept
from sosp_hub.errors import RecipeError
from sosp_hub.prune import main
from sosp_hub.recipe.load import as_recipe, load_recipe
from sosp_hub.recipe.schema import Recipe

SMALL = (
    *("model.train.epochs=1", "finetune.epochs=1", "criterion.num_samples=64"),
    *("data.num_train=256", "data.num_test=64", "rebuild.num_samples=64", "output.figures=false"),
    "evaluate.latency=false",
)


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.slow
def test_prune_gives_the_report_and_leaves_the_process_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = random_states()
    with process_state_kept():  # of the tests before
        report = sosp_hub.prune("quickstart", *SMALL)
        assert random_states() == before
        assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"  # the caller's first
    assert capsys.readouterr().out == ""
    stored = json.loads((tmp_path / "runs/quickstart/sosp_report.json").read_text())
    assert stored["metrics"] == report["metrics"]
    shown = str(report)
    assert "Size and speed" in shown
    assert f"{100 * report['metrics']['final']['accuracy']['value']:.1f}" in shown
    assert len(shown.splitlines()) < 40
    with pytest.raises(RecipeError, match=r"budget\.macs"):
        sosp_hub.prune("quickstart", "budget.macs=7")
    with pytest.raises(Exception, match="finished run"):
        sosp_hub.prune("quickstart", *SMALL)
    assert random_states() == before


@pytest.mark.slow
def test_json_is_all_of_the_output_and_quiet_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *SMALL, "--json"]) == 0
    given = capsys.readouterr()
    assert json.loads(given.out)["metrics"]["final"]["accuracy"]["n"] == 64
    assert main(["quickstart", *SMALL, "--quiet", "--overwrite"]) == 0
    given = capsys.readouterr()
    assert given.out == ""
    assert "fine-tune" not in given.err


SECTIONS = {
    "model": {"library": "timm", "id": "cifar_resnet20", "task": "image-classification"},
    "data": {"id": "sklearn/digits"},
}


def test_a_recipe_is_a_name_a_path_sections_or_a_recipe(tmp_path):
    named = as_recipe("quickstart", ["seed=3"], "prune")
    assert named == load_recipe("quickstart", ["seed=3"])
    assert as_recipe(named, ["seed=4"], "prune").seed == 4
    assert named.seed == 3
    made = as_recipe(SECTIONS, [], "prune")
    assert isinstance(made, Recipe)
    assert made.output.dir == "runs/prune"
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(SECTIONS))
    assert as_recipe(file, [], "prune").model == made.model


@pytest.mark.parametrize(
    ("given", "verb", "words"),
    [
        ({"model": {}}, "prune", "data"),
        (3, "prune", "type int.*expected a path"),
        ({**SECTIONS, "data": {"id": object()}}, "prune", "no YAML file could"),
        (SECTIONS, "compare", "compare: missing"),
        ({**SECTIONS, "compare": {"criteria": ["random"]}}, "prune", "not for prune"),
    ],
)
def test_what_is_wrong_with_sections_is_said_in_words(given, verb, words):
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        as_recipe(given, [], verb)
