"""One command for everything, recipes by name, and a model without a recipe."""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from sosp_hub.__main__ import COMMANDS, main
from sosp_hub.errors import ModelError, RecipeError
from sosp_hub.pipeline.command import run_shown
from sosp_hub.pipeline.context import Context
from sosp_hub.recipe.load import load_recipe
from sosp_hub.recipe.quick import quick_recipe, write_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.shipped import find_recipe, shipped_recipes
from sosp_hub.recipe.tasks import find_task, tasks
from sosp_hub.recipe.training import DenseTrainSection
from sosp_hub.zoo.library import library_of_id

ROOT = Path(__file__).parent.parent


def called(capsys, *arguments):
    """Exit code, standard output and standard error."""
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_that_names_how_it_was_called(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sosp"])
    code, out, _ = called(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: sosp {name}")


def test_the_first_screen_is_short_and_has_an_example(capsys):
    code, out, _ = called(capsys)
    assert code == 2
    assert "sosp prune quickstart" in out
    assert all(name in out for name in COMMANDS)
    assert len(out.splitlines()) <= 36


@pytest.mark.parametrize("arguments", [["prun"], ["quickstart"]])
def test_an_unknown_command_lists_the_known_ones(arguments, capsys):
    code, _, err = called(capsys, *arguments)
    assert code == 2
    assert "prune" in err
    assert "inspect" in err


def test_help_of_one_section_holds_its_keys_alone(capsys):
    _, whole, _ = called(capsys, "prune", "--help", "all")
    _, one, _ = called(capsys, "prune", "--help", "budget")
    _, none, _ = called(capsys, "prune", "--help")
    assert all(key in whole for key in ("keep_at_least", "num_workers", "name: sosp_i"))
    assert "keep_at_least" in one
    assert "num_workers" not in one
    assert "keep_at_least" not in none
    assert all(f"  {name} " in none for name in Recipe.model_fields)
    assert len(none.splitlines()) < 60
    _, wrong, _ = called(capsys, "prune", "--help", "budgets")
    assert "no section 'budgets'" in wrong


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_option(shell, capsys):
    code, out, _ = called(capsys, "completion", shell)
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert all(option in out for option in ("from-scores", "dry-run", "verify", "task"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_recipes_go_by_name_where_no_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").output.dir == "runs/quickstart"
    for given in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert find_recipe(given) == ROOT / "recipes/quickstart.yaml"
    assert find_recipe("studies/vit_fashion_mnist").is_file()
    (tmp_path / "quickstart").write_text("mine")
    assert find_recipe("quickstart").read_text() == "mine"
    with pytest.raises(RecipeError, match=r"no recipe of that name.*quickstart.*--task and --data"):
        load_recipe("quick start")


def test_the_wheel_holds_every_recipe():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        place.removeprefix("share/sosp_hub/recipes").strip("/"): set(ROOT.glob(globs[0]))
        for place, globs in patterns["data-files"].items()
    }
    names = {
        f"{folder}/{path.stem}".strip("/") for folder, paths in shipped.items() for path in paths
    }
    assert names == set(shipped_recipes())
    assert len(names) > 15


def test_recipes_are_listed_and_copied_but_nothing_is_overwritten(tmp_path, capsys):
    _, listed, _ = called(capsys, "recipes")
    said = dict(line.split(maxsplit=1) for line in listed.splitlines() if line[0] != " ")
    assert all(said.get(name, "").strip() for name in shipped_recipes())
    code, _, _ = called(capsys, "recipes", "copy", "studies/vit_fashion_mnist", str(tmp_path))
    copied = tmp_path / "vit_fashion_mnist.yaml"
    assert code == 0
    assert copied.read_text() == (ROOT / "recipes/studies/vit_fashion_mnist.yaml").read_text()
    copied.write_text("changed")
    code, _, err = called(capsys, "recipes", "copy", "studies/vit_fashion_mnist", str(tmp_path))
    assert code == 2
    assert "is there already" in err
    assert copied.read_text() == "changed"
    code, _, err = called(
        capsys, "recipes", "copy", "quickstart", str(tmp_path / "no" / "one.yaml")
    )
    assert code == 2
    assert "one.yaml: cannot be written (No such file or directory)" in err
    code, _, err = called(capsys, "recipes", "copy", "nothing", str(tmp_path))
    assert code == 2
    assert "quickstart" in err


def test_a_model_without_a_recipe_gets_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text("text,label\n")
    made = {"library": "transformers", "task": "text-classification", "data": "train.csv"}
    recipe = quick_recipe(
        "me/a model", **made, budget={"params": 0.8}, overrides=["seed=3", "data.max_length=64"]
    )
    assert (recipe.data.path, recipe.data.id) == ("train.csv", None)
    assert recipe.budget.targets() == {"params": 0.8}
    assert recipe.output.dir == "runs/a-model"
    for training in (recipe.model.train, recipe.finetune):  # 200 samples are 36 steps and more
        assert 200 / training.batch_size * training.epochs >= 36
    path = write_recipe(recipe)
    assert path == Path("runs/a-model.yaml")
    assert load_recipe(path) == recipe  # the same run, also without the options
    assert write_recipe(recipe) == path
    other = recipe.model_copy(update={"seed": 4})
    with pytest.raises(RecipeError, match="holds another recipe"):
        write_recipe(other)
    assert load_recipe(write_recipe(other, overwrite=True)) == other


@pytest.mark.parametrize(
    ("task", "data", "words"),
    [
        (None, "x/y", "--task is missing; write one of"),
        ("text-generation", None, "--data is missing"),
        ("text-generaton", "x/y", "did you mean 'text-generation'"),
    ],
)
def test_what_the_options_lack_is_said(task, data, words):
    with pytest.raises(RecipeError, match=words):
        quick_recipe("a/b", library="transformers", task=task, data=data, budget={})


@pytest.mark.parametrize("task", tasks())
def test_every_task_goes_without_a_recipe(task):
    """Those without labels have no dense training, which was asked for all the same."""
    library = "timm" if task == "image-classification" else "transformers"
    recipe = quick_recipe("a/b", library=library, task=task, data="x/y", budget={"params": 0.8})
    assert (recipe.model.train is not None) == find_task(task).learns


@pytest.mark.parametrize(
    ("model", "library"),
    [
        ("timm/resnet18.a1_in1k", "timm"),
        ("resnet18.a1_in1k", "timm"),
        ("resnet18", "timm"),
        ("gpt2", "transformers"),
        ("org/resnet18", "transformers"),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "timm"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "transformers"),
    ],
)
def test_the_library_follows_from_the_name_or_the_folder(model, library, tmp_path):
    if isinstance(model, dict):
        (tmp_path / "config.json").write_text(json.dumps(model))
        model = str(tmp_path)
    assert library_of_id(model) == library


@pytest.mark.parametrize(
    ("option", "expected"), [("json", '{"macs": 1}\n'), ("quiet", "a library's\n"), (None, None)]
)
def test_with_json_standard_output_holds_the_report_alone(capsys, option, expected):
    def table(report, _):
        sys.stdout.write(f"a table of {report}\n")

    def work(recipe, *, show=table, overwrite):
        sys.stdout.write("a library's\n")
        assert (recipe, overwrite, show is None) == ("a recipe", True, option == "quiet")
        if show:
            show({"macs": 1}, Path("out"))

    options = argparse.Namespace(json=option == "json", quiet=option == "quiet")
    run_shown(work, "a recipe", options, overwrite=True)
    said = capsys.readouterr()
    assert said.out == (expected or "a library's\na table of {'macs': 1}\n")
    assert said.err == ("a library's\n" if option == "json" else "")


@pytest.mark.parametrize("text", [None, "{", "[" * 100_000])
def test_a_folder_that_tells_nothing_is_an_error_in_words(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        library_of_id(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "new_head", "trains"),
    [
        (None, True, False),
        ({"when": "new_head"}, True, True),
        ({"when": "new_head"}, False, False),
        ({"when": "always"}, False, True),
        ({}, False, True),
    ],
)
def test_a_trained_head_is_not_trained_again_unasked(train, new_head, trains):
    given = {"library": "transformers", "task": "text-classification", "data": "x/y", "budget": {}}
    recipe = quick_recipe("a/b", **given)
    assert recipe.model.train.when == "new_head"
    train = train if train is None else DenseTrainSection(**train)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"train": train})})
    context = SimpleNamespace(recipe=recipe, has_random_weights=new_head)
    assert (Context.dense_training.fget(context) is not None) == trains


def test_few_texts_go_through_a_model_of_words_at_a_time():
    given = {"library": "transformers", "data": "x/y", "budget": {}}
    recipe = quick_recipe("a/b", task="text-generation", **given)
    assert recipe.criterion.name == "fisher"  # that of the task
    sizes = {recipe.criterion.batch_size, recipe.evaluate.batch_size, recipe.finetune.batch_size}
    assert sizes == {4}
    other = quick_recipe("a/b", task="text-classification", **given)
    steps = [r.finetune.batch_size * r.finetune.gradient_accumulation for r in (recipe, other)]
    assert steps == [16, 16]
    kept = quick_recipe("a/b", task="fill-mask", **given, overrides=["criterion.batch_size=32"])
    assert kept.criterion.batch_size == 32


TASK = ("--task", "text-classification")


@pytest.mark.parametrize(
    ("given", "write"), [("30%", "0.3"), ("30", "0.3"), ("0,3", "0.5"), ("", "0.5")]
)
def test_a_share_that_is_none_says_what_to_write(capsys, given, write):
    code, _, told = called(capsys, "prune", "a/b", *TASK, "--data", "x/y", "--params", given)
    assert code == 2
    assert "budget.params: got" in told
    assert f"the fraction that is kept, write {write}" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a/b", *TASK, "--data", "x/y", "--params", "0"), "budget.params: got 0"),
        (("a/b", *TASK, "--data", "nofile.csv"), "nofile.csv"),
        (("quickstart", "--params", "0.3"), "write keys, such as budget.params=0.8"),
        (("--from-scores", "out", "--params", "0.3"), "write keys, such as budget.params=0.8"),
    ],
)
def test_a_wrong_option_is_told_and_leaves_nothing(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = called(capsys, "prune", *arguments)
    assert code == 2
    assert words in err
    assert not list(tmp_path.glob("runs/*.yaml"))  # it would stand in the way of the next try


def test_a_misspelled_file_is_no_id_of_the_hub():
    made = {"library": "transformers", "task": "text-generation", "budget": {}}
    for name in ("nofile.csv", "./texts", "/no/texts", "~/texts"):
        assert quick_recipe("a/b", **made, data=name).data.path == name
    for name in ("org/data", "org/data-v1.0", "sklearn/digits"):
        assert quick_recipe("a/b", **made, data=name).data.id == name
