"""A new criterion is one file and one test: recipes, help, score and card read it there."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from sosp_hub import prune
from sosp_hub.errors import CriterionError, RecipeError
from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.describe import describe_recipe
from sosp_hub.recipe.load import parse_recipe
from sosp_hub.scoring import score
from tests.gates.toys import perceptron

RECIPE = """
model: {library: timm, id: cifar_resnet20, task: image-classification, pretrained: false}
data: {id: sklearn/digits, num_train: 40, num_test: 20}
criterion: {name: toy, slope: 2.0}
finetune: {epochs: 0}
evaluate: {latency: false}
output: {figures: false, keep_dense: false}
"""


@pytest.fixture
def toy():
    CRITERIA.known()
    importlib.import_module("tests.criteria.toy")
    yield
    CRITERIA.forget("toy")
    del sys.modules["tests.criteria.toy"]


@pytest.mark.slow  # runs a recipe
@pytest.mark.usefixtures("toy")
def test_a_file_is_all_that_a_criterion_needs(tmp_path):
    path, output = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(RECIPE)
    assert prune.main([str(path), f"output.dir={output}"]) == 0
    report = json.loads((output / "sosp_report.json").read_text())
    assert report["criterion"] == {"name": "toy", "options": {"slope": 2.0}}
    for name, kept in report["plan"]["kept"].items():
        size = report["plan"]["sizes"][name]
        assert kept == list(range(size - len(kept), size))
    card = (output / "README.md").read_text()
    assert "saliency(s) = the place of s in its group" in card
    assert "Neither weights nor data are looked at." in card
    help_text = describe_recipe()
    assert "name: toy   (The place of a structure in its group, so that the last ones stay)" in (
        help_text
    )
    assert "how much a place counts (number; default: 1)" in help_text


@pytest.mark.usefixtures("toy")
def test_its_options_are_checked_everywhere():
    toys = perceptron()
    found = score(toys.model, toys.graph, [], "toy", slope=3.0)
    assert found["a"].tolist() == [0, 3, 6, 9, 12]
    with pytest.raises(CriterionError, match="slope: got 'steep'; expected a number"):
        score(toys.model, toys.graph, [], "toy", slope="steep")
    with pytest.raises(CriterionError, match=r"no option 'slop' \(did you mean 'slope'\?\)"):
        score(toys.model, toys.graph, [], "toy", slop=1.0)
    with pytest.raises(CriterionError, match="no option 'num_samples'"):  # of a run
        score(toys.model, toys.graph, [], "toy", num_samples=3)
    with pytest.raises(RecipeError, match=r"criterion\.slope: got 'steep'; expected a number"):
        parse_recipe(RECIPE, "here", ["criterion.slope=steep"])
    with pytest.raises(RecipeError, match="slope: an option of toy, which taylor does not have"):
        parse_recipe(RECIPE.replace("name: toy", "name: taylor"), "here")


def test_without_its_file_it_is_not_known():
    with pytest.raises(RecipeError, match=r"criterion.name: got 'toy'; known criteria: activation"):
        parse_recipe(RECIPE, "here")


def test_all_criteria_are_declared_without_torch():
    code = (
        "import sys\nfrom sosp_hub.recipe.criteria import CRITERIA\n"
        "assert len(CRITERIA.known()) > 15\n"
        "print(*{'torch', 'transformers', 'timm', 'accelerate', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_scores_do_not_depend_on_the_way_they_are_asked_for():
    """By name with options, or as the section of a recipe."""
    toys = perceptron()
    section = parse_recipe(
        RECIPE.replace("toy, slope: 2.0", "taylor, form: squared"), "here"
    ).criterion
    of_section = score(toys.model, toys.graph, [toys.batch], section)
    of_name = score(toys.model, toys.graph, [toys.batch], "taylor", form="squared")
    assert all(torch.equal(of_section[name], of_name[name]) for name in of_name)
    with pytest.raises(CriterionError, match="options"):
        score(toys.model, toys.graph, [toys.batch], section, form="abs")
