"""A recipe is right, or every one of its faults is said at once with what to write instead."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from sosp_hub.errors import RecipeError
from sosp_hub.recipe.criteria import CRITERIA, Criterion
from sosp_hub.recipe.describe import describe_recipe
from sosp_hub.recipe.load import as_recipe, dump_recipe, load_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.section import Section
from sosp_hub.recipe.study_grid import cells_of
from sosp_hub.recipe.tasks import find_task, tasks

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = {
    "model": {"library": "timm", "id": "resnet18.a1_in1k", "task": "image-classification"},
    "data": {"id": "ethz/food101"},
}
README_EXAMPLE = """
model:     {library: timm, id: resnet18.a1_in1k, task: image-classification}
data:      {id: ethz/food101, train: train, test: validation, image: image, label: label}
structure: {kinds: [channel, head, kv_group, neuron], outputs: null}
criterion: {name: sosp_i, selection: signed, per: macs, max_classes: 1,
            num_samples: 1024, batch_size: 32}
budget:    {macs: 0.5, keep_at_least: 0.1, round_to: 1, uniform: false}
finetune:  {epochs: 10, learning_rate: null, distill: 0.0}
evaluate:  {metrics: [accuracy]}
output:    {dir: runs/resnet18-food101}
push:      null
seed:      0
"""


def write(folder, record):
    path = folder / "recipe.yaml"
    path.write_text(record if isinstance(record, str) else yaml.safe_dump(record))
    return path


def faults(folder, record, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, record), overrides)
    return caught.value.faults


def test_the_documented_example_is_what_the_defaults_say(tmp_path):
    recipe = load_recipe(write(tmp_path, README_EXAMPLE))
    minimal = load_recipe(write(tmp_path, MINIMAL))
    for section in ("structure", "criterion", "budget", "finetune"):
        assert getattr(recipe, section) == getattr(minimal, section), section
    assert recipe.output.dir == "runs/resnet18-food101"
    assert minimal.output.dir == "runs/recipe"
    assert minimal.budget.targets() == {"macs": 0.5}
    assert minimal.criterion.provenance()["per"] == "macs"
    assert minimal.criterion.options()["selection"] == "signed"


def test_a_recipe_is_frozen():
    recipe = Recipe.model_validate(MINIMAL)
    with pytest.raises(ValidationError):
        recipe.seed = 1


@pytest.mark.parametrize(
    ("task", "override", "told"),
    [
        ("text-classification", "data.second=b", "data.second: .*does not read it.*data.text_pair"),
        ("image-classification", "data.text=b", "data.text: .*data.image, data.label"),
        ("sentence-similarity", "budget.max_drop={spearman: 1}", "spearman: is of all samples"),
        ("object-detection", "budget.max_drop={mean_average_precision: 1}", "there are loss, div"),
        ("image-classification", "rebuild.method=none", "known values: ridge, null"),
        ("image-classification", "rebuild=null", "write rebuild: {method: null}"),
    ],
)
def test_what_a_task_cannot_do_is_refused_before_anything_runs(tmp_path, task, override, told):
    model = {"library": "transformers", "id": "me/model", "task": task}
    path = write(tmp_path, {"model": model, "data": {"path": "somewhere"}})
    assert load_recipe(path)
    assert load_recipe(write(tmp_path, dump_recipe(load_recipe(path), whole=True)))
    with pytest.raises(RecipeError, match=told):
        load_recipe(path, [override])


def test_a_floor_of_none_may_be_written_by_name_too(tmp_path):
    for floor in (0, {"*": 0}):
        recipe = load_recipe(write(tmp_path, {**MINIMAL, "budget": {"keep_at_least": floor}}))
        assert recipe.budget.keep_at_least == floor


def test_a_given_budget_stands_alone(tmp_path):
    recipe = load_recipe(write(tmp_path, {**MINIMAL, "budget": {"params": 0.3}}))
    assert recipe.budget.targets() == {"params": 0.3}


def test_criteria_that_decide_for_themselves_have_no_share_as_default(tmp_path):
    record = {**MINIMAL, "structure": {"kinds": ["layer"]}, "criterion": {"name": "sglp"}}
    recipe = load_recipe(write(tmp_path, record))
    assert recipe.budget.targets() == {"threshold": 0.0}
    for whole in (True, False):
        assert load_recipe(write(tmp_path, dump_recipe(recipe, whole=whole))) == recipe
    assert load_recipe(write(tmp_path, record), ["budget.macs=0.5"]).budget.targets() == {
        "macs": 0.5
    }


@pytest.mark.parametrize(
    ("task", "given", "overrides", "expected"),
    [
        ("image-classification", {}, (), ("sosp_i", 1024)),
        ("text-classification", {}, (), ("sosp_h", 1024)),
        ("text-generation", {}, (), ("fisher", 1024)),
        ("causal-lm", {"criterion": {"num_samples": 8}}, (), ("fisher", 8)),
        ("causal-lm", {}, ["criterion.num_samples=8"], ("fisher", 8)),
        ("causal-lm", {"criterion": {"name": "taylor"}}, (), ("taylor", 1024)),
        ("causal-lm", {}, ["criterion.name=sosp_h", "criterion.mode=exact"], ("sosp_h", 1024)),
        (
            "causal-lm",
            {"criterion": {"per_token": True}},
            ["criterion.name=sosp_h"],
            ("sosp_h", 1024),
        ),
    ],
)
def test_the_criterion_is_the_tasks_where_none_is_named(tmp_path, task, given, overrides, expected):
    model = {"library": "transformers", "id": "a/b", "task": task}
    recipe = load_recipe(write(tmp_path, {**MINIMAL, "model": model, **given}), overrides)
    assert (recipe.criterion.name, recipe.criterion.num_samples) == expected
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    default = find_task(task).criterion.get("name", "sosp_h")
    assert Recipe.model_validate({**MINIMAL, "model": model}).criterion.name == default


@pytest.mark.parametrize(
    ("given", "overrides", "expected"),
    [
        ({}, (), ("sosp_i", "signed", "macs")),
        ({"criterion": {"num_samples": 8}}, (), ("sosp_i", "signed", "macs")),
        ({"budget": {"params": 0.7}}, (), ("sosp_i", "signed", "params")),
        ({}, ["budget.macs=null", "budget.params=0.7"], ("sosp_i", "signed", "params")),
        ({"budget": {"memory_bytes": 0.7}}, (), ("sosp_i", "signed", "bytes")),
        ({"budget": {"params": 0.7}}, ["criterion.per=macs"], ("sosp_i", "signed", "macs")),
        ({}, ["criterion.selection=surgeon"], ("sosp_i", "surgeon", "macs")),
        ({}, ["criterion.per=null"], ("sosp_i", "signed", None)),
        ({}, ["criterion.name=fisher"], ("fisher", None, None)),
        ({"criterion": {"name": "sosp_i"}}, (), ("sosp_i", "row_sum", None)),
        ({"criterion": {"selection": "greedy"}}, ["criterion.name=fisher"], ("fisher", None, None)),
    ],
)
def test_options_of_the_tasks_criterion_give_way_to_what_is_said(
    tmp_path, given, overrides, expected
):
    model = {"library": "timm", "id": "a/b", "task": "image-classification"}
    recipe = load_recipe(write(tmp_path, {**MINIMAL, "model": model, **given}), overrides)
    found = recipe.criterion
    assert (found.name, getattr(found, "selection", None), found.per) == expected
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    assert load_recipe(write(tmp_path, dump_recipe(recipe, whole=False))) == recipe


def test_the_help_says_what_scores_where_no_criterion_is_named():
    text = describe_recipe("criterion")
    for name, task in tasks().items():
        assert (f"    {name}: {{name: " in text) == bool(task.criterion)
    assert "all other tasks: sosp_h" in text


def test_a_comparison_takes_nothing_from_the_tasks_criterion(tmp_path):
    model = {"library": "timm", "id": "a/b", "task": "image-classification"}
    compare = {"criteria": ["sosp_h", {"name": "fisher", "per": "macs"}, {"num_samples": 8}]}
    recipe = load_recipe(write(tmp_path, {**MINIMAL, "model": model, "compare": compare}))
    cells, faults = cells_of(recipe)
    assert faults == []
    made = {(cell.recipe.criterion.name, cell.recipe.criterion.per) for cell in cells}
    assert made == {("sosp_h", None), ("fisher", "macs"), ("sosp_i", "macs")}


def test_an_option_of_another_criterion_names_the_tasks_own(tmp_path):
    model = {"library": "transformers", "id": "a/b", "task": "causal-lm"}
    record = {**MINIMAL, "model": model, "criterion": {"mode": "exact"}}
    assert "which fisher does not have" in " ".join(faults(tmp_path, record))


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("criterion.per_token", {"criterion": {"name": "fisher", "per_token": True}}),
        ("finetune.tokens", {"finetune": {"tokens": "50M"}}),
    ],
)
def test_tokens_need_samples_that_have_some(key, section, tmp_path):
    """Told before anything is trained, loaded or downloaded."""
    told = set()
    for task in tasks():
        model = {"library": "transformers", "id": "a/b", "task": task}
        record = {**MINIMAL, "model": model, **section}
        try:
            load_recipe(write(tmp_path, record))
        except RecipeError as error:
            told |= {task for fault in error.faults if f"{key}: needs texts" in fault}
    assert told == {name for name, task in tasks().items() if not task.tokens}
    assert {"image-classification", "audio-classification"} < told
    assert not {"text-generation", "self", "image-text-to-text"} & told


def test_a_recipe_survives_being_written(tmp_path):
    overrides = ["finetune.mixed_precision=no", "push.repo_id=me/small", "budget.params=0.7"]
    recipe = load_recipe(write(tmp_path, README_EXAMPLE), overrides)
    for whole in (True, False):
        text = dump_recipe(recipe, whole=whole)
        assert load_recipe(write(tmp_path, text)) == recipe
    assert "warmup_share" not in text  # the short form says what was given


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("finetune.learning_rate=1e-2", ("finetune", "learning_rate", 0.01)),
        ("finetune.learning_rate=3", ("finetune", "learning_rate", 3.0)),
        ("data.test=null", ("data", "test", None)),
        ("evaluate.metrics=[loss, accuracy]", ("evaluate", "metrics", ("loss", "accuracy"))),
        ("data.path=/a b/c=d", ("data", "path", "/a b/c=d")),
        ("push.repo_id=me/x", ("push", "repo_id", "me/x")),
        ("finetune.mixed_precision=no", ("finetune", "mixed_precision", "no")),
        ("criterion.name=taylor", ("criterion", "name", "taylor")),
    ],
)
def test_overrides_are_yaml_and_go_before_the_file(tmp_path, override, expected):
    section, key, value = expected
    recipe = load_recipe(write(tmp_path, README_EXAMPLE), [override])
    assert getattr(getattr(recipe, section), key) == value


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"buget": {}}, ["buget", "unknown key", "`budget`"]),
        ({"budget": {"mac": 0.5}}, ["budget.mac", "unknown key", "`macs`"]),
        ({"criterion": {"name": "sosp_h", "mod": "exact"}}, ["criterion.mod", "`mode`"]),
        ({"criterion": {"mode": "exact"}}, ["criterion.mode", "which sosp_i does not have"]),
        (
            {"criterion": {"name": "random", "mode": "exact"}},
            ["criterion.mode", "which random does not have"],
        ),
        ({"criterion": {"name": "random", "mod": "exact"}}, ["criterion.mod", "unknown key"]),
        ({"criterion": {"name": "sosp_hh"}}, ["criterion.name", "'sosp_hh'", "`sosp_h`"]),
        ({"criterion": {"name": "block_influence"}}, ["channel", "structure.kinds: [layer]"]),
        (
            {"structure": {"kinds": ["layer"]}},
            ["sosp_i", "layer", "block_influence, random, scp or sglp"],
        ),
        ({"criterion": 3}, ["criterion", "3", "section"]),
        ({"budget": {"macs": 1.5}}, ["budget.macs", "1.5", "at most 1", "write 0.5"]),
        ({"budget": {"macs": 30}}, ["budget.macs", "30", "at most 1", "write 0.3"]),
        ({"budget": {"macs": "40%"}}, ["budget.macs", "'40%'", "a number", "write 0.4"]),
        ({"budget": {"params": 0}}, ["budget.params", "got 0", "more than 0"]),
        ({"budget": {"params": -0.5}}, ["budget.params", "-0.5", "more than 0"]),
        ({"budget": {"params": float("nan")}}, ["budget.params", "nan", "finite"]),
        ({"budget": {"round_to": True}}, ["budget.round_to", "true", "whole number"]),
        ({"budget": {"uniform": "yes"}}, ["budget.uniform", "'yes'", "true or false"]),
        ({"finetune": None}, ["finetune", "null", "epochs: 0"]),
        ({"finetune": {"epochs": 1.5}}, ["finetune.epochs", "1.5", "whole number"]),
        ({"finetune": {"epochs": 2.0}}, ["finetune.epochs", "2.0", "write 2"]),
        ({"finetune": {"epochs": "2"}}, ["finetune.epochs", "'2'", "without quotes"]),
        ({"finetune": {"epochs": -1}}, ["finetune.epochs", "-1", "at least 0"]),
        ({"finetune": {"optimizer": "adam"}}, ["finetune.optimizer", "'adam'", "`adamw`"]),
        ({"structure": {"kinds": "head"}}, ["structure.kinds", "'head'", "write [head]"]),
        ({"budget": {"keep_at_least": "two"}}, ["budget.keep_at_least: got 'two'"]),
        ({"budget": {"keep_at_least": {"a*": -1}}}, ["budget.keep_at_least.a*: got -1"]),
        ({"structure": {"kinds": ["heads"]}}, ["structure.kinds.0", "'heads'", "`head`"]),
        ({"structure": {"kinds": []}}, ["structure.kinds", "at least one"]),
        ({"model": {"id": 3}}, ["model.id", "got 3", "'3' in quotes"]),
        ({"model": {"library": "jax"}}, ["model.library", "'jax'", "timm, transformers"]),
        ({"model": {"train": {"epoch": 1}}}, ["model.train.epoch", "`epochs`"]),
        ({"data": {"id": None}}, ["data", "`id`", "`path`"]),
        ({"evaluate": {"metrics": ["acc"]}}, ["evaluate.metrics.0", "'acc'", "accuracy"]),
        ({"push": {"private": True}}, ["push.repo_id", "missing"]),
        ({"rebuild": {"damping": -1}}, ["rebuild.damping: got -1; expected auto or more than 0"]),
        ({"rebuild": {"damping": "none"}}, ["rebuild.damping: got 'none'", "auto or a number"]),
        (
            {"model": {"kwargs": {"a": {"b": 1}}}},
            ["model.kwargs.a: got {'b': 1}", "true or false, a whole number,", "or a list"],
        ),
        ({"model": {"kwargs": {"a": [{"b": 1}]}}}, ["model.kwargs.a.0: got {'b': 1}", "a text"]),
        ({"budget": {"max_drop": {"loss": [1]}}}, ["max_drop.loss: got [1]", "number or a text"]),
        ({"budget": {"keep_at_least": [1]}}, ["keep_at_least: got [1]", "number or keys"]),
        ({"macs": 0.5}, ["macs: unknown key here; write budget.macs"]),
        ({"data": {"batch_size": 1}}, ["write criterion.batch_size or finetune.batch_size or"]),
        ({"budget": {"latency": 0.5}}, ["budget.latency: unknown key; did you mean `latency_s`?"]),
        ({"budget": {"flops": 0.5}}, ["budget.flops: unknown key; did you mean `macs`?"]),
        ({"finetune": {"lr": 1}}, ["finetune.lr: unknown key; did you mean `learning_rate`?"]),
        ({5: 1}, ["5: unknown key; known keys: model, data"]),
        ({"budget": 0.5}, ["budget: got 0.5", "write budget: {macs: 0.5}"]),
        ({"criterion": "taylor"}, ["criterion: got 'taylor'", "write criterion: {name: taylor}"]),
        ({"finetune": False}, ["finetune: got false", "write finetune: {epochs: 0}"]),
        ({"push": False}, ["push: got false", "write push: null"]),
        ({"structure": {"blocks": True}}, ["structure.blocks: got true", "write blocks: {}"]),
        ({"structure": "head"}, ["structure: got 'head'", "keys of its own: kinds, only, exclude"]),
        ({"data": {"calibration": "a.csv"}}, ["data.calibration", "write [{path: a.csv}]"]),
        ({"data": {"calibration": ["a.csv"]}}, ["data.calibration.0", "write {path: a.csv}"]),
        ({"seed": "x"}, ["seed", "'x'", "whole number"]),
        ({"seed": 2**32}, ["seed: got 4294967296; expected less than 4294967296"]),
        (
            {"model": {"task": "causal-lm"}, "evaluate": {"metrics": ["per_class_accuracy"]}},
            ["evaluate.metrics", "per_class_accuracy", "perplexity"],
        ),
        ({"model": {"task": "causal-lm"}, "finetune": {"augment": True}}, ["augment", "images"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_each_fault_names_key_value_and_remedy(tmp_path, record, words):
    merged = {key: dict(value) for key, value in MINIMAL.items()}
    for key, value in record.items():
        merged[key] = {**merged[key], **value} if key in merged else value
    (fault,) = faults(tmp_path, merged)
    for word in words:
        assert word in fault, fault


def test_missing_sections_are_named(tmp_path):
    found = faults(tmp_path, {"seed": 1})
    assert [fault.split(":")[0] for fault in found] == ["model", "data"]


def test_all_faults_come_at_once(tmp_path):
    record = {
        **MINIMAL,
        "budget": {"macs": 2, "round_to": 0},
        "finetune": {"epochs": "many", "lr": 1},
        "ouput": {},
    }
    found = faults(tmp_path, record, ["no_equals_sign", "model.id.deeper=1", "seed=1.5"])
    keys = [fault.split(":")[0] for fault in found]
    assert len(keys) == 8, keys
    for key in (
        "budget.macs",
        "budget.round_to",
        "finetune.epochs",
        "finetune.lr",
        "ouput",
        "seed",
    ):
        assert key in keys
    assert "'no_equals_sign'" in found[0]
    assert "'model.id.deeper=1'" in found[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds nothing", "`model:`"]),
        ("- a\n- b\n", ["holds a list"]),
        ("model: {a: [}\n", ["not valid YAML", "line 1"]),
        ("seed: 1\nseed: 2\n", ["line 2", "`seed` is written twice"]),
        ("a: !!python/object:os.system {}\n", ["not valid YAML", "python/object"]),
        ("{[1]: 2}: 3", ["not valid YAML"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, words):
    (fault,) = faults(tmp_path, text)
    for word in words:
        assert word in fault, fault


def test_a_path_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "no_such.yaml", tmp_path):
        with pytest.raises(RecipeError, match=re.escape(str(path))):
            load_recipe(path)
    with pytest.raises(RecipeError, match=r"is a folder; .*for the folder of a model, give --task"):
        load_recipe(tmp_path)
    binary = tmp_path / "weights.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(binary)


def test_every_shipped_recipe_is_valid():
    paths = [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("made/*.yaml"))]
    assert len(paths) == 13 + 15 + 11, "a recipe came or went: change this number with it"
    outputs = {load_recipe(path).output.dir for path in paths}
    assert len(outputs) == len(paths)  # none overwrites another's
    for path in paths:
        header = path.read_text().split("model:")[0]
        for line in ("paper:", "command:", "hardware:", "time:", "measured:", "commit:"):
            assert f"# {line}" in header, f"{path.name} does not state {line}"


def test_every_study_is_valid():
    """Those of this verb; each says what it measures and the command that it was measured with."""
    paths = sorted(
        path for path in RECIPES.glob("studies/*.yaml") if "compare:" in path.read_text()
    )
    assert len(paths) == 9, "a study came or went: change this number with it"
    outputs = {load_recipe(path, (), "compare").output.dir for path in paths}
    assert len(outputs) == len(paths)
    for path in paths:
        header = path.read_text().split("model:")[0]
        for line in ("measures:", "command:", "hardware:", "time:", "measured:", "commit:"):
            assert f"# {line}" in header, f"{path.name} does not state {line}"


def test_every_claim_of_a_paper_is_stated_with_its_test_and_verdict():
    paths = sorted(RECIPES.glob("papers/*.yaml"))
    assert len(paths) == 5, "a claim came or went: change this number with it"
    listed = (RECIPES / "papers" / "README.md").read_text()
    for path in paths:
        verb = "compare" if "compare:" in path.read_text() else "prune"
        load_recipe(path, (), verb)
        header = path.read_text().split("model:\n")[0]
        for line in ("paper", "claim", "relation", "protocol", "seeds", "command", "hub"):
            assert f"# {line}:" in header, f"{path.name} does not state {line}"
        for line in ("result", "verdict", "differs", "hardware", "time", "measured", "commit"):
            assert f"# {line}:" in header, f"{path.name} does not state {line}"
        assert f"python -m sosp_hub.{verb} recipes/papers/{path.name}" in header
        assert f"]({path.name})" in listed


def test_the_claims_that_are_named_as_sources_are_there():
    """Links of the table of claims, from where it is."""
    folder = RECIPES / "papers"
    for link in re.findall(r"\]\(([^)h][^)]*)\)", (folder / "README.md").read_text()):
        assert (folder / link).exists(), link


def test_help_shows_every_key_with_its_meaning():
    text = describe_recipe()

    def keys(section: type[Section]):
        for name, field in section.model_fields.items():
            yield name
            assert field.description or name == "name" or name in Recipe.model_fields, (
                f"{section.__name__}.{name}"
            )

    for section in (
        Recipe,
        Criterion,
        *CRITERIA.known().values(),
        *(f.annotation for f in Recipe.model_fields.values()),
    ):
        if isinstance(section, type) and issubclass(section, Section):
            for name in keys(section):
                assert re.search(rf"\b{name}\b", text), name
    for name in CRITERIA.known():
        assert f"name: {name}" in text
    for key in ("alpha", "rank"):  # of sections in sections
        assert re.search(rf"\n    {key} ", text), key


def test_recipes_and_help_need_no_torch():
    quickstart = str(RECIPES / "quickstart.yaml")
    code = (
        "import sys, sosp_hub, sosp_hub.prune\n"
        "try: sosp_hub.prune.main(['--help', 'all'])\n"
        "except SystemExit: pass\n"
        f"code = sosp_hub.prune.main([{quickstart!r}, 'budget.macs=7'])\n"
        "assert code == 2\n"
        "heavy = {'torch', 'transformers', 'timm', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout
    assert "budget.macs: got 7" in done.stderr


@pytest.mark.parametrize("key", ["criterion.compensate_steps", "rebuild.refine_steps"])
@pytest.mark.parametrize(
    ("steps", "asked", "expected"),
    [(0, "null", True), (0, "false", False), (2, "null", False), (2, "true", True)],
)
def test_norms_are_re_estimated_unless_steps_were_made_for_them(key, steps, asked, expected):
    keys = ["criterion.compensate=true", f"{key}={steps}"]
    keys.append(f"finetune.recalibrate_norm={asked}")
    assert load_recipe(RECIPES / "quickstart.yaml", keys).recalibrates() is expected


@pytest.mark.parametrize(
    ("task", "library", "has_none"),
    [
        ("image-feature-extraction", "timm", True),
        ("fill-mask", "transformers", True),
        ("self", "timm", False),
        ("image-classification", "timm", False),
    ],
)
def test_labels_of_a_model_without_a_head_are_refused(task, library, has_none, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{library: {library}, id: a/b, task: {task}}}\ndata: {{id: a/c}}\n")
    with pytest.raises(RecipeError, match=r"num_labels: .* no head") if has_none else nullcontext():
        load_recipe(path, ["model.num_labels=5"], "prune")


@pytest.mark.parametrize(("task", "kept"), [("image-classification", False), ("self", True)])
@pytest.mark.parametrize("asked", [None, True, False])
def test_norms_keep_their_statistics_where_the_dense_model_is_followed(task, kept, asked, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{library: timm, id: resnet18, task: {task}}}\ndata: {{id: a/c}}\n")
    keys = [] if asked is None else [f"finetune.freeze_norm={str(asked).lower()}"]
    recipe = load_recipe(path, keys, "prune")
    assert recipe.at_rate(recipe.finetune).freeze_norm is (kept if asked is None else asked)


@pytest.mark.parametrize(
    ("model", "rate"),
    [
        ("{library: transformers, id: a/b, task: text-classification}", 5e-5),
        ("{library: timm, id: resnet18, task: image-classification}", 1e-4),
        ("{library: timm, id: resnet18, task: image-classification, pretrained: false}", 1e-3),
    ],
)
def test_a_learning_rate_that_is_not_given_suits_the_weights(model, rate, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\ndata: {{id: a/c}}\n")
    recipe = load_recipe(path, [], "prune")
    assert recipe.finetune.learning_rate is None
    assert recipe.at_rate(recipe.finetune).learning_rate == rate
    recipe = load_recipe(path, ["finetune.learning_rate=0.25"], "prune")
    assert recipe.at_rate(recipe.finetune).learning_rate == 0.25


@pytest.mark.parametrize("folder", [".", "..", "/", "runs/.."])
def test_an_output_folder_has_a_name_of_its_own(folder):
    """What a run keeps is put beside it, by its name."""
    sections = {
        "model": {"library": "timm", "id": "resnet18", "task": "image-classification"},
        "data": {"id": "x/y"},
        "output": {"dir": folder},
    }
    with pytest.raises(RecipeError, match=r"output\.dir: got .*write the name of a new folder"):
        as_recipe(sections, (), "prune")
