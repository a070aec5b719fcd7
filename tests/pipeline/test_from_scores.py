"""``--from-scores``: another budget from the scores of a finished run, without data."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub import scoring
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.errors import BudgetError, ModelError, OutputExistsError
from sosp_hub.hub.contents import local_files
from sosp_hub.hub.push import push_to_hub
from sosp_hub.pipeline import context
from sosp_hub.pipeline.scores import recipe_of
from sosp_hub.prune import main
from sosp_hub.report.facts import collect
from sosp_hub.structure.graph import Graph
from tests.compare import assert_close

pytestmark = pytest.mark.slow

RECIPE = """
model:
  library: timm
  id: cifar_resnet20
  task: image-classification
  pretrained: false
  train: {epochs: 1, learning_rate: 3.0e-3, batch_size: 32}
data: {id: sklearn/digits, num_train: 96, num_test: 50}
criterion: {name: taylor, num_samples: 32, batch_size: 32}
budget: {params: 0.6}
finetune: {epochs: 1, batch_size: 32}
evaluate: {latency_batch_size: 1}
output: {figures: false}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main([str(folder / "recipe.yaml"), f"output.dir={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def unreachable(*_, **__):
    raise AssertionError("the data was asked for")


def test_another_budget_needs_no_data_and_no_scoring(run, monkeypatch, capsys):
    monkeypatch.setattr(context, "open_data", unreachable)
    monkeypatch.setattr(scoring, "score", unreachable)
    assert main(["--from-scores", str(run), "budget.macs=0.3"]) == 0
    output = run.with_name("run-macs-0.3")
    said = capsys.readouterr()
    assert "nothing is measured" in said.err
    assert str(output) in said.out  # in one piece, however long
    assert "quality" not in said.out
    report = json.loads((output / "sosp_report.json").read_text())
    assert 0.2 < report["cost"]["after"]["macs"] / report["cost"]["before"]["macs"] <= 0.3
    assert report["metrics"] == {}
    assert report["calibration"] == {"data": "sklearn/digits", "num_samples": 32, "seed": 0}
    assert report["base"]["architecture"] == "cifar_resnet20"
    assert "quality of this model" in collect(report).unmeasured

    # The slow way: the dense model, its groups, the stored scores.
    dense = sosp_hub.from_pretrained(run / "dense")
    graph = sosp_hub.trace(dense, made_up_inputs(dense))
    scores = load_file(run / "saliency.safetensors")
    plan = sosp_hub.allocate(graph, scores, macs=0.3)
    assert report["plan"]["kept"] == {name: list(kept) for name, kept in plan.kept.items()}
    expected = sosp_hub.apply(dense, graph, plan).state_dict()
    found = sosp_hub.from_pretrained(output).state_dict()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, relative=0, what=name)

    # And once more from what came out.
    assert main(["--from-scores", str(output), "budget.macs=0.5"]) == 0
    again = json.loads((run.with_name("run-macs-0.3-macs-0.5") / "sosp_report.json").read_text())
    assert 0.4 < again["cost"]["after"]["macs"] / again["cost"]["before"]["macs"] <= 0.5


def test_with_its_data_it_is_measured_and_trained(run, monkeypatch):
    monkeypatch.setattr(scoring, "score", unreachable)
    given = ["--from-scores", str(run), "--with-data", "budget.macs=0.4", "evaluate.latency=false"]
    assert main(given) == 0
    report = json.loads((run.with_name("run-macs-0.4") / "sosp_report.json").read_text())
    before = json.loads((run / "sosp_report.json").read_text())
    assert report["metrics"]["dense"] == before["metrics"]["dense"]
    assert report["metrics"]["final"]["accuracy"]["n"] == 50
    assert report["history"]


# Any budget from one folder, with the rebuild ---------------------------------------------------


_REBUILT = ["finetune={epochs: 0}", "rebuild.refine_steps=4"]


@pytest.fixture(scope="module")
def any_budget(tmp_path_factory):
    """A run that keeps the inputs of its rebuild; nothing is trained after the cut."""
    folder = tmp_path_factory.mktemp("any_budget")
    (folder / "recipe.yaml").write_text(RECIPE)
    given = ["output.any_budget=true", *_REBUILT, f"output.dir={folder / 'out'}"]
    assert main([str(folder / "recipe.yaml"), *given]) == 0
    return folder / "out"


def test_any_budget_is_what_a_run_at_that_budget_makes(any_budget, tmp_path, monkeypatch, caplog):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    alone = ["budget.params=0.4", *_REBUILT, f"output.dir={tmp_path / 'alone'}"]
    assert main([str(tmp_path / "recipe.yaml"), *alone]) == 0
    expected = sosp_hub.from_pretrained(tmp_path / "alone").state_dict()
    monkeypatch.setattr(context, "open_data", unreachable)
    monkeypatch.setattr(scoring, "score", unreachable)
    state = torch.get_rng_state()
    for budget in (0.4, {"params": 0.4}):
        found = sosp_hub.from_pretrained(any_budget, budget=budget)
        assert not found.training
        assert_close(found.state_dict(), expected, relative=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert main(["--from-scores", str(any_budget), "budget.params=0.4"]) == 0
    output = any_budget.with_name("out-params-0.4")
    found = sosp_hub.from_pretrained(output).state_dict()
    assert_close(found, expected, relative=1e-4)
    report = json.loads((output / "sosp_report.json").read_text())
    assert report["rebuild"]["num_samples"] == 96
    again = sosp_hub.from_pretrained(output, budget=0.4).state_dict()  # it is as good a source
    assert_close(again, expected, relative=1e-4)


def test_any_budget_has_the_statistics_of_norms_of_a_run_at_that_budget(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, more in (("any", "output.any_budget=true"), ("alone", "budget.params=0.4")):
        given = [more, "finetune={epochs: 0}", f"output.dir={tmp_path / name}"]
        assert main([str(tmp_path / "recipe.yaml"), *given]) == 0
    found = sosp_hub.from_pretrained(tmp_path / "any", budget=0.4).state_dict()
    expected = sosp_hub.from_pretrained(tmp_path / "alone").state_dict()
    assert_close(found, expected, relative=1e-4)


def test_a_budget_whose_run_folded_biases_is_refused(any_budget, tmp_path):
    folder = shutil.copytree(any_budget, tmp_path / "folded")
    report = json.loads((folder / "sosp_report.json").read_text())
    recipe = yaml.safe_load(report["recipe"])
    recipe["criterion"]["compensate_bias"] = True
    report["recipe"] = yaml.safe_dump(recipe)
    (folder / "sosp_report.json").write_text(json.dumps(report))
    with pytest.raises(BudgetError, match="folded gates or biases"):
        sosp_hub.from_pretrained(folder, budget=0.4)


def test_kept_inputs_hold_no_labels_and_are_published(any_budget):
    inputs = load_file(any_budget / "calibration.safetensors")
    assert {name.partition(".")[2] for name in inputs} == {"0"}
    assert sum(len(tensor) for tensor in inputs.values()) == 96
    assert "calibration.safetensors" in local_files(any_budget)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (1.5, "params=1.5"),
        (0, "params=0"),
        ({"parms": 0.5}, "parms=0.5"),
        ({"threshold": 0.5}, "threshold"),
        (True, "params=True"),
        ({}, "got {}; name what is kept"),
        (0.001, "least that can be reached"),
    ],
)
def test_a_budget_that_is_none_is_refused(any_budget, budget, words):
    with pytest.raises(BudgetError, match=words):
        sosp_hub.from_pretrained(any_budget, budget=budget)


def test_a_budget_needs_what_its_run_kept(run):
    with pytest.raises(OutputExistsError, match=r"output\.any_budget=true"):
        sosp_hub.from_pretrained(run, budget=0.5)
    with pytest.raises(ModelError, match="dtype"):
        sosp_hub.from_pretrained(run, budget=0.5, dtype="float16")
    (run / "calibration.safetensors").write_bytes(b"no tensors")
    with pytest.raises(OutputExistsError, match="damaged"):
        sosp_hub.from_pretrained(run, budget=0.5)
    save_file({"x": torch.zeros(3)}, run / "calibration.safetensors")
    with pytest.raises(OutputExistsError, match="no input of a batch"):
        sosp_hub.from_pretrained(run, budget=0.5)


def test_the_dense_weights_stay_at_home(finished):
    assert (finished / "dense" / "model.safetensors").is_file()
    assert not [name for name in local_files(finished) if name.startswith("dense")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["criterion.name=random", "budget.macs=0.3"], ["criterion.name", "taylor", "run the rec"]),
        (["structure.skip=[a]", "budget.macs=0.3"], ["structure.skip: unknown key"]),
        (["recipe.yaml", "budget.macs=0.3"], ["'recipe.yaml': expected key.path=value"]),
        (["model.id=resnet18", "budget.macs=0.3"], ["model.id: the dense model", "is in", "dense"]),
        (["data.id=a/b", "budget.macs=0.3"], ["data.id: the data is not opened", "--with-data"]),
        (["finetune.epochs=3", "budget.macs=0.3"], ["finetune.epochs: the", "--with-data"]),
        (["structure.kinds=[head]"], ["structure.kinds"]),
        (["model.task=causal-lm"], ["model.task"]),
        (["budget.macs=2"], ["budget.macs", "at most 1"]),
        (["budget.macs=0.3", "output.dir=RUN"], ["holds a finished run"]),
        ([], ["budget"]),
    ],
    ids=str,
)
def test_what_the_scores_do_not_allow_is_refused(run, capsys, overrides, words):
    overrides = [each.replace("RUN", str(run)) for each in overrides]
    assert main(["--from-scores", str(run), *overrides]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_data_whose_folder_the_report_does_not_keep_is_asked_for(text_run, capsys):
    """As in a folder that was published."""
    (text_run / "recipe.private.yaml").unlink()
    given = ["--from-scores", str(text_run), "budget.structures=0.5", "--with-data"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "does not keep the folder of .../reviews.csv; write data.path=FILE_OR_FOLDER" in error


def test_the_recipe_of_another_budget_holds_that_alone(run):
    assert main(["--from-scores", str(run), "budget.macs=0.3", "evaluate.latency=false"]) == 0
    text = run.with_name("run-macs-0.3").joinpath("recipe.private.yaml").read_text()
    assert yaml.safe_load(text)["budget"] == {"macs": 0.3, "params": None}
    assert "push" not in yaml.safe_load(text)


def test_what_the_scores_were_made_with_may_be_said_again(run):
    given = ["criterion.name=taylor", "seed=0", "budget={macs: 0.3}", "evaluate.latency=false"]
    assert main(["--from-scores", str(run), *given, f"output.dir={run.with_name('a')}"]) == 0


def test_the_card_of_another_budget_says_how_its_dense_model_was_made(run, tmp_path):
    first = "was trained from random weights in the"
    assert f"{first} same run" in (run / "README.md").read_text()
    given = ["--from-scores", str(run), "budget.structures=0.5", "evaluate.latency=false"]
    assert main([*given, f"output.dir={tmp_path / 'again'}"]) == 0
    assert f"{first} run that scored it" in (tmp_path / "again" / "README.md").read_text()
    report = json.loads((tmp_path / "again" / "sosp_report.json").read_text())
    report["recipe"] = report["recipe"].replace("pretrained: false", "pretrained: true")
    words = "was first trained on the data of its calibration, in the run that scored it"
    assert words in collect(report).trained_here


@pytest.mark.parametrize("any_size", [False, True])
def test_scores_are_for_the_weights_that_were_scored(finished_text, tmp_path, capsys, any_size):
    """A model that was trained on in its folder since then, which no shape tells."""
    import transformers

    base, run = tmp_path / "bert", tmp_path / "run"
    save_bert(base)
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)
    model.save_pretrained(base)
    recipe = finished_text.with_name("recipe.yaml")
    given = [f"model.id={base}", "model.train=null", "rebuild.num_samples=8"]
    kept = f"output.any_budget={str(any_size).lower()}"
    assert main([str(recipe), *given, kept, f"output.dir={run}"]) == 0
    again = ["--from-scores", str(run), "budget.structures=0.5", f"model.id={base}", "--overwrite"]
    assert main(again) == 0
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[3, 5] += 1
    model.save_pretrained(base)
    capsys.readouterr()
    assert main(again) == 2
    assert "has other weights than those that were scored" in capsys.readouterr().err
    if any_size:
        with pytest.raises(ModelError, match="has other weights than those that were scored"):
            sosp_hub.from_pretrained(run, budget=0.5)


def without_scores(run):
    (run / "saliency.safetensors").unlink()


def with_broken_scores(run):
    (run / "saliency.safetensors").write_bytes(b"\x00" * 20)


def with_scores_of_another_model(run):
    scores = load_file(run / "saliency.safetensors")
    name = next(iter(scores))
    save_file({**scores, name: scores[name][:-1].clone()}, run / "saliency.safetensors")


def without_report(run):
    (run / "sosp_report.json").unlink()


def without_dense_weights(run):
    shutil.rmtree(run / "dense")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_scores, ["saliency.safetensors", "output folder of a run"]),
        (with_broken_scores, ["saliency.safetensors", "damaged"]),
        (with_scores_of_another_model, ["has 16 structures", "15"]),
        (without_report, ["sosp_report.json"]),
        (without_dense_weights, ["dense", "run the recipe again"]),
        (shutil.rmtree, ["no such folder"]),
    ],
)
def test_a_folder_without_usable_scores_is_refused(run, capsys, damage, words):
    damage(run)
    assert main(["--from-scores", str(run), "budget.macs=0.3"]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert "Traceback" not in error


def test_a_group_whose_cut_cannot_be_verified_stays_whole(run, monkeypatch, capsys):
    """The attribute of one group is set wrongly: the rest is cut to the same budget."""
    tensor = "layer2.0.conv1.weight"
    right = Graph.kept_positions

    def wrong(self, name, plan):
        positions = right(self, name, plan)
        if name != tensor or positions[0] is None:
            return positions
        return (np.arange(len(positions[0])), *positions[1:])

    monkeypatch.setattr(Graph, "kept_positions", wrong)
    assert main(["--from-scores", str(run), "budget.macs=0.6"]) == 0
    report = json.loads((run.with_name("run-macs-0.6") / "sosp_report.json").read_text())
    kept, provenance = report["plan"]["kept"], report["plan"]["provenance"]
    ((group, why),) = provenance["not_verified"].items()
    assert group == "layer2.0.conv1:channel"
    assert "differ from the masked model's" in why
    assert group not in kept
    assert len(kept) > 4
    assert report["cost"]["after"]["macs"] <= 0.6 * report["cost"]["before"]["macs"]
    assert f"['{group}'] cannot be verified" in capsys.readouterr().err


WORDS = ("good", "bad", "film", "the", "a", "was", "plot", "song")

TEXT_RECIPE = """
model:
  library: transformers
  id: MODEL
  task: text-classification
  num_labels: 2
  train: {epochs: 8, learning_rate: 1.0e-2, batch_size: 16}
data: {path: DATA, text: text, label: label, test: null}
criterion: {name: taylor, num_samples: 32, batch_size: 32}
budget: {structures: 0.7}
finetune: {epochs: 0}
evaluate: {metrics: [accuracy, loss], latency: false}
output: {figures: false}
"""


def write_reviews(path, flipped=False):
    """Texts of which ``good`` or ``bad`` is the only word that tells the class."""
    rows = ["text,label"]
    for i in range(120):
        words = [WORDS[2 + (i * step) % 6] for step in (1, 2, 3, 5)]
        words.insert(i % 4, WORDS[i % 2])
        rows.append(f"{' '.join(words)},{('yes', 'no')[i % 2 ^ flipped]}")
    path.write_text("\n".join(rows) + "\n")


def save_bert(folder):
    """A tiny BERT without a head for this task, and a tokenizer of a few words beside it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), intermediate_size=32, **size)
    transformers.BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def finished_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    save_bert(folder / "bert")
    write_reviews(folder / "reviews.csv")
    recipe = TEXT_RECIPE.replace("MODEL", str(folder / "bert"))
    (folder / "recipe.yaml").write_text(recipe.replace("DATA", str(folder / "reviews.csv")))
    assert main([str(folder / "recipe.yaml"), f"output.dir={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture
def text_run(finished_text, tmp_path):
    return shutil.copytree(finished_text, tmp_path / "run")


def measured_again(run, reviews, *overrides):
    given = ["--from-scores", str(run), "--with-data", f"data.path={reviews}", *overrides]
    return main([*given, "budget.structures=0.5"])


def test_a_trained_text_classifier_keeps_its_tokenizer(text_run, finished_text):
    import transformers

    stored = json.loads((text_run / "sosp_report.json").read_text())["metrics"]["dense"]
    assert stored["accuracy"]["value"] > 0.9  # so that other tokens would show
    assert measured_again(text_run, finished_text.with_name("reviews.csv")) == 0
    output = text_run.with_name("run-structures-0.5")
    report = json.loads((output / "sosp_report.json").read_text())
    assert report["metrics"]["dense"]["accuracy"] == stored["accuracy"]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(one) for one in (text_run, output)]
    before, after = (one("the good film was bad")["input_ids"] for one in tokenizers)
    assert before == after
    assert len(set(before)) == 5


def test_a_head_that_needed_no_training_is_that_of_the_base(text_run, finished_text, tmp_path):
    """What a model without a recipe gets: `when: new_head`, which was taken for a training."""
    base, reviews = text_run / "dense", finished_text.with_name("reviews.csv")
    given = [str(base), "--task", "text-classification", "--data", str(reviews), "--params", "0.9"]
    keys = ["data.max_length=16", "output.figures=false", "finetune.epochs=0"]
    assert main([*given, f"output.dir={tmp_path / 'made'}", *keys]) == 0
    assert not (tmp_path / "made" / "dense").exists()
    assert main(["--from-scores", str(tmp_path / "made"), "budget.params=0.88"]) == 0
    with_head = sosp_hub.from_pretrained(tmp_path / "made-params-0.88").state_dict()
    torch.testing.assert_close(
        with_head["classifier.bias"], sosp_hub.from_pretrained(base).state_dict()["classifier.bias"]
    )


def test_dense_weights_without_their_tokenizer_are_refused(text_run, capsys):
    for file in (text_run / "dense").glob("*token*"):
        file.unlink()
    assert main(["--from-scores", str(text_run), "budget.structures=0.5"]) == 2
    error = capsys.readouterr().err
    assert "tokenizer" in error, error
    assert str(text_run / "dense") in error, error


def test_dense_weights_that_measure_otherwise_are_refused(text_run, finished_text, capsys):
    reviews = text_run.with_name("reviews.csv")
    write_reviews(reviews, flipped=True)
    assert measured_again(text_run, reviews) == 2
    error = capsys.readouterr().err
    for word in ("accuracy", "dense", "stored", str(text_run)):
        assert word in error, error
    assert not text_run.with_name("run-structures-0.5").exists()


def test_other_data_may_measure_otherwise(text_run, capsys):
    other = text_run.with_name("others.csv")
    write_reviews(other, flipped=True)
    assert measured_again(text_run, other) == 0
    assert "this data differs" in capsys.readouterr().err


def each(change):
    """A damage that changes the tensors of saliency.safetensors."""

    def damage(run):
        scores = load_file(run / "saliency.safetensors")
        save_file(change(scores), run / "saliency.safetensors")

    return damage


def first_is(make):
    def change(scores):
        name = next(iter(scores))
        return {**scores, name: make(scores[name])}

    return each(change)


def report_is(*path_and_value):
    *path, value = path_and_value

    def damage(run):
        report = json.loads((run / "sosp_report.json").read_text())
        inner = report
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (run / "sosp_report.json").write_text(json.dumps(report))

    return damage


REFUSED = {
    "not a number": first_is(lambda t: t.fill_(float("nan"))),
    "no end": first_is(lambda t: t.fill_(float("inf"))),
    "whole numbers": first_is(lambda t: t.long()),
    "truths": first_is(lambda t: t > 0),
    "a matrix": first_is(lambda t: t[:, None].contiguous()),
    "nothing": first_is(lambda t: t[:0].clone()),
    "one number": first_is(lambda t: t[0].clone()),
    "an unknown group": each(lambda scores: scores | {"x:channel": torch.ones(3)}),
    "no group": each(lambda scores: {}),
    "no recipe": report_is("recipe", None),
    "an empty recipe": report_is("recipe", ""),
    "a recipe that is none": report_is("recipe", "- a"),
    "a recipe of another kind": report_is("recipe", 5),
    "a recipe with code": report_is("recipe", "!!python/object/apply:os.system [ls]"),
    "a base that is none": report_is("base", [1]),
    "a plan that is none": report_is("plan", 5),
    "damping that is none": report_is("plan", "provenance", {"compensation": {"damping": "x"}}),
    "calibration that is none": report_is("calibration", "x"),
    "metrics that are none": report_is("metrics", "dense", {"accuracy": 5}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scores_and_reports_that_are_none_are_refused(run, capsys, name):
    REFUSED[name](run)
    assert main(["--from-scores", str(run), "budget.macs=0.3"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error) < 5000
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_half_precision_scores_are_read(run):
    each(lambda scores: {name: t.bfloat16() for name, t in scores.items()})(run)
    assert main(["--from-scores", str(run), "budget.macs=0.3"]) == 0


def test_flipped_bytes_are_a_typed_error_or_scores(run):
    from sosp_hub.errors import SospHubError
    from sosp_hub.pipeline.scores import read_scores

    files = [run / "saliency.safetensors", run / "sosp_report.json"]
    whole = {file: file.read_bytes() for file in files}
    rng, refused = np.random.default_rng(0), 0
    for number in range(300):
        file = files[number % 2]
        raw = bytearray(whole[file])
        for place in rng.integers(0, min(len(raw), 3000), int(rng.integers(1, 4))):
            raw[place] = int(rng.integers(0, 256))
        cut = int(rng.integers(0, len(raw))) if number % 5 == 0 else len(raw)
        file.write_bytes(bytes(raw[:cut]))
        try:
            scores = read_scores(run, ["budget.macs=0.3"])
            assert all(t.ndim == 1 for t in scores.saliency.values())
        except SospHubError as error:
            refused += len(str(error)) < 12_000
        file.write_bytes(whole[file])
    assert refused > 100


def test_paths_of_this_machine_are_known_to_the_next_run_and_to_nobody_else(tmp_path, capsys):
    """A published recipe has them without their folders."""
    data = tmp_path / "somebody" / "digits"
    data.mkdir(parents=True)
    for name in ("zero", "one"):
        (data / name).mkdir()
        for i in range(24):
            color = (10 * i, 0, 255) if name == "one" else (0, 10 * i, 0)
            Image.new("RGB", (32, 32), color).save(data / name / f"{i}.png")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    keys = ["data.id=null", f"data.path={data}", "data.num_train=null", "data.num_test=null"]
    output = tmp_path / "out"
    assert main([str(file), *keys, f"output.dir={output}"]) == 0
    assert str(data) not in (output / "sosp_report.json").read_text()
    assert str(data) in (output / "recipe.private.yaml").read_text()
    assert main(["--from-scores", str(output), "--with-data", "budget.params=0.7"]) == 0
    assert "recipe.private.yaml" not in push_to_hub(output, "me/mine", dry_run=True).added
    (output / "recipe.private.yaml").write_text("model: {id: another}")  # not of this report
    assert main(["--from-scores", str(output), "budget.params=0.88"]) == 0
    (output / "recipe.private.yaml").unlink()
    capsys.readouterr()
    assert main(["--from-scores", str(output), "--with-data", "budget.params=0.9"]) == 2
    assert "data.path" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", "criterion: {mode: exact}\n"])
def test_the_criterion_of_a_run_is_the_one_that_scored(tmp_path, given):
    """Its recipe names none, and what its task takes today is another one."""
    recipe = "model: {library: transformers, id: a/b, task: causal-lm}\ndata: {id: c/d}\n" + given
    report = {"recipe": recipe, "criterion": {"name": "sosp_h", "options": {}}}
    (tmp_path / "sosp_report.json").write_text(json.dumps(report))
    save_file({"a": torch.ones(2)}, tmp_path / "saliency.safetensors")
    assert recipe_of(tmp_path).criterion.name == "sosp_h"
