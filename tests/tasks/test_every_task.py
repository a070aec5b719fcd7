"""Every task: its own loss, every criterion, a whole run, the card, ``verify`` and ``pipeline``."""

import json

import pytest
import torch
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

import sosp_hub
from sosp_hub.compare import main as compare
from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.errors import CriterionError
from sosp_hub.evaluate import evaluate
from sosp_hub.hub.verify import verify
from sosp_hub.prune import main
from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.load import parse_recipe
from sosp_hub.recipe.tasks import find_task, tasks
from sosp_hub.tasks.batches import num_samples
from sosp_hub.tasks.loss import batch_loss
from sosp_hub.tasks.metrics import OfAll
from sosp_hub.zoo.load import example_inputs, load_model
from tests.compare import assert_close
from tests.tasks.made import CASES

RECIPE = """
model: {{library: transformers, id: {folder}/model, task: {task}}}
data: {{path: {folder}/data, {data}}}
structure: {{kinds: [head, neuron]}}
criterion: {{name: sosp_h, num_samples: 8, batch_size: 4}}
budget: {{structures: 0.7}}
rebuild: {{num_samples: 8}}
finetune: {{epochs: 1, batch_size: 8, held_out: 0}}
evaluate: {{batch_size: 4, latency: false}}
output: {{dir: {folder}/out, figures: false}}
"""


def opened(folder, case):
    text = RECIPE.format(folder=folder, task=case.task, data=case.data or "max_length: 32")
    recipe = parse_recipe(text, "test", [])
    data = open_data(recipe.data, recipe.model.task)
    loaded = load_model(recipe.model, data=data.info)
    return recipe, data, loaded


def test_every_task_has_a_case():
    assert {case.task for case in CASES.values()} == set(tasks())
    with_pipeline = {name for name, task in tasks().items() if task.has_pipeline}
    assert with_pipeline <= PIPELINE_REGISTRY.supported_tasks.keys()


@pytest.mark.parametrize("key", CASES)
def test_metrics_of_all_samples_are_declared(folders, key):
    """A recipe is refused by what a task declares, before there is data to make meters for."""
    _, data, loaded = opened(folders(key), CASES[key])
    task = find_task(CASES[key].task)
    meters = task.meters(data.info, loaded.processor)
    of_all = {name for name, meter in meters.items() if isinstance(meter, OfAll)}
    assert {*task.of_all} == of_all


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_the_loss_is_the_models_own_and_every_criterion_scores_or_says_why_not(folders, key):
    case = CASES[key]
    _, data, loaded = opened(folders(key), case)
    task, model = find_task(case.task), loaded.model
    train = load_split(data, "train", loaded.processor)
    batches = [train.__getitems__([0, 1, 2]), train.__getitems__([3, 4, 5])]
    assert all(num_samples(batch) == 3 for batch in batches)
    if getattr(model.config, "is_encoder_decoder", False):  # the model puts the start there itself
        assert (batches[0]["labels"][:, 0] != model.config.decoder_start_token_id).all()
    loss_fn = task.loss_fn(model)
    loss = batch_loss(model, batches[0], loss_fn)
    assert loss.value.isfinite()
    if loss_fn is None:
        assert_close(loss.value, model(**batches[0]).loss, relative=1e-6)
    if loss.predictions is not None:
        assert_close(loss.predictions.value(), loss.value, relative=1e-5)
    measured = evaluate(model, [batches[0]], ("loss",), loss_fn=loss_fn)["loss"]
    assert measured.value == pytest.approx(loss.value.item(), rel=1e-5, abs=1e-7)
    with torch.no_grad():
        model(**example_inputs(loaded, 1, num_tokens=512))  # as runs ask for by default
    graph = sosp_hub.trace(model, example_inputs(loaded), outputs=task.outputs)
    scored, refused = set(), {}
    for name, criterion in CRITERIA.known().items():
        kinds = None if "layer" in criterion.kinds else ["head", "neuron"]
        try:
            saliency = sosp_hub.score(model, graph, batches, name, kinds=kinds, loss_fn=loss_fn)
        except CriterionError as error:
            refused[name] = str(error)
        else:
            assert task.learns or not criterion.first_order, name
            scored.add(name)
            assert any(values.any() for values in saliency.values()), name
    for message in refused.values():  # one line that says what to do
        assert "\n" not in message
        assert 20 < len(message) < 600
    at_least = {"magnitude", "activation", "sosp_h", "sosp_i", "hap", "wanda_sp", "random"}
    assert scored >= at_least | ({"taylor", "fisher"} if task.learns else set())


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_a_run_reloads_in_a_pipeline_and_is_verified(folders, key, capsys):
    case, folder = CASES[key], folders(key)
    text = RECIPE.format(folder=folder, task=case.task, data=case.data or "max_length: 32")
    (folder / "recipe.yaml").write_text(text)
    assert main([str(folder / "recipe.yaml")]) == 0, capsys.readouterr().err
    out, task = folder / "out", find_task(case.task)
    report = json.loads((out / "sosp_report.json").read_text())
    assert report["task"] == case.task
    before, after = (report["cost"][when]["params"] for when in ("before", "after"))
    assert after < before
    _, data, _ = opened(folder, case)
    for stage in ("dense", "cut", "rebuilt", "final"):
        assert list(report["metrics"][stage]) == list(task.default_metrics(data.info))
        for metric in report["metrics"][stage].values():
            assert metric["n"] > 0
            assert metric["stderr"] is not None
    assert f"pipeline_tag: {case.task}" in (out / "README.md").read_text()

    model = sosp_hub.from_pretrained(out)
    places = [f"data.path={folder / 'data'}", f"model.id={folder / 'model'}"]
    for words in ([], places):  # where it was made, its own recipe knows the places
        published = verify(str(out), overrides=words)
        assert published.holds, str(published)

    if not task.has_pipeline:
        return
    pipe = transformers.pipeline(case.task, str(out), device="cpu")
    _, _, loaded = opened(folder, case)
    inputs = example_inputs(loaded)
    with torch.no_grad():
        mine, other = model(**inputs), pipe.model(**inputs)
    for name in task.outputs or mine:
        if isinstance(mine[name], torch.Tensor):
            assert_close(other[name], mine[name], relative=1e-6)
    said = pipe(**case.given) if isinstance(case.given, dict) else pipe(case.given)
    assert said is not None


@pytest.mark.slow
@pytest.mark.parametrize("key", ["time-series-forecasting", "feature-extraction"])
def test_criteria_are_compared_in_any_task(folders, key, tmp_path):
    case, folder = CASES[key], folders(key)
    text = RECIPE.format(folder=folder, task=case.task, data=case.data or "max_length: 32")
    text = text.replace(f"{folder}/out", str(tmp_path / "out")).replace("epochs: 1", "epochs: 0")
    text += "compare: {criteria: [sosp_h, magnitude], seeds: [0]}\n"
    (tmp_path / "study.yaml").write_text(text)
    assert compare([str(tmp_path / "study.yaml")]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "sosp_h" in table
    assert "magnitude" in table
    assert find_task(case.task).metrics[0].replace("_", " ") in table
