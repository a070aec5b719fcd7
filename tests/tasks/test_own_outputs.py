"""Without labels: what counts is what the dense model makes of the same inputs."""

import json
import logging

import pytest
import timm
import torch
import transformers
from torch import nn

import sosp_hub
from sosp_hub.derivatives import Protocol, gauss_newton
from sosp_hub.errors import CriterionError, DataError, ModelError, RecipeError
from sosp_hub.evaluate import evaluate
from sosp_hub.hub.verify import verify
from sosp_hub.prune import main
from sosp_hub.recipe.load import parse_recipe
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.recipe.tasks import find_task, tasks
from sosp_hub.tasks import OwnOutputs, batch_loss, metrics
from sosp_hub.tasks.embeddings import OwnEmbedding, spearman
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.predictions import softmax, squared
from sosp_hub.zoo.load import load_model
from tests.compare import assert_close

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def bert(cls, seed=0):
    torch.manual_seed(seed)
    return cls(transformers.BertConfig(**TINY)).eval()


def padded():
    tokens = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 4:], mask[2, 2:] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def of_each(model, batch, output):
    """Outputs of each text by itself, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [model(input_ids=text[mask][None])[output][0] for text, mask in rows]


@torch.no_grad()
def test_the_divergence_from_a_dense_model_is_that_of_each_token_without_padding():
    dense, model = (bert(transformers.BertForMaskedLM, seed) for seed in (0, 1))
    batch = padded()
    loss = batch_loss(model, batch, OwnOutputs(None, dense=dense))
    mine, aim = (torch.cat(of_each(each, batch, "logits")).double() for each in (model, dense))
    aim, mine = aim.log_softmax(-1), mine.log_softmax(-1)
    expected = (aim.exp() * (aim - mine)).sum(-1).mean()
    found, weights = metrics.divergence(loss, batch)
    assert_close(found.sum() / weights.sum(), expected, relative=1e-5)
    same, weights = metrics.agreement(loss, batch)
    assert same.sum() / weights.sum() == (aim.argmax(-1) == mine.argmax(-1)).double().mean()
    own = batch_loss(dense, batch, OwnOutputs(None, dense=dense))
    assert metrics.divergence(own, batch)[0].abs().max() < 1e-5


@torch.no_grad()
def test_numbers_are_compared_by_their_squared_distance_without_padding():
    dense, model = (bert(transformers.BertModel, seed) for seed in (0, 1))
    batch = padded()
    loss = batch_loss(model, batch, OwnOutputs(None, dense=dense))
    both = [of_each(each, batch, "last_hidden_state") for each in (model, dense)]
    each = [(mine - aim).square().mean() for mine, aim in zip(*both, strict=True)]
    assert_close(loss.value, torch.stack(each).mean(), relative=1e-5)


@torch.no_grad()
def test_the_loss_of_an_embedding_is_one_minus_the_cosine():
    dense, model = (bert(transformers.BertModel, seed) for seed in (0, 1))
    batch = padded()
    means = [
        torch.stack([text.mean(0) for text in of_each(each, batch, "last_hidden_state")])
        for each in (model, dense)
    ]
    expected = 1 - torch.cosine_similarity(*means).mean()
    assert_close(
        batch_loss(model, batch, OwnEmbedding("mean", dense)).value, expected, relative=1e-5
    )
    measured = evaluate(model, [batch], ("loss",), loss_fn=OwnEmbedding("mean", dense))["loss"]
    assert measured.value == pytest.approx(float(expected), rel=1e-5)
    pooled = [each(**batch).pooler_output for each in (model, dense)]
    expected = 1 - torch.cosine_similarity(*pooled).mean()
    found = batch_loss(model, batch, OwnEmbedding("pooler", dense))
    assert_close(found.value, expected, relative=1e-5)
    with pytest.raises(DataError, match=r"made of last_hidden_state.*task: self"):
        batch_loss(bert(transformers.BertForMaskedLM), batch, OwnEmbedding("mean"))


def test_at_the_minimum_the_gauss_newton_matrix_of_an_embedding_is_the_hessian():
    model, batch = bert(transformers.BertModel).double(), padded()
    graph = sosp_hub.trace(model, batch)
    groups = {name: group for name, group in graph.groups.items() if group.kind == "neuron"}
    loss_fn = OwnEmbedding("mean")
    measured = gauss_newton(model, groups, [batch], Protocol(loss_fn=loss_fn), max_classes=64)
    assert (measured.form, measured.exact) == ("squared", True)
    saliency = sosp_hub.score(
        model, graph, [batch], "sosp_h", kinds=["neuron"], mode="exact", loss_fn=loss_fn
    )
    rows = torch.as_tensor(measured.matrix @ torch.ones(len(measured.matrix)).double())
    assert_close(torch.cat(list(saliency.values())), rows.abs() / 2, relative=1e-6)


def test_a_pair_of_images_and_themselves_needs_no_names():
    dense, model = nn.Linear(3, 4), nn.Linear(3, 4)
    images = torch.randn(5, 3)
    loss = batch_loss(model, (images, images), OwnOutputs("squared", dense=dense))
    assert_close(loss.value, (model(images) - dense(images)).square().mean(), relative=1e-6)


def test_inputs_alone_are_compared_with_the_models_own_outputs(caplog):
    model, batch = bert(transformers.BertForMaskedLM), padded()
    graph = sosp_hub.trace(model, batch, outputs="logits")
    expected = sosp_hub.score(model, graph, [batch], "sosp_h", loss_fn=OwnOutputs())
    for batches in ([batch], iter([batch])):
        with caplog.at_level(logging.INFO, "sosp_hub"):
            found = sosp_hub.score(model, graph, batches, "sosp_h")
        assert "no labels (input_ids, attention_mask)" in caplog.text
        assert_close(found, expected, relative=1e-6)
    with pytest.raises(CriterionError, match=r"gradient, which is zero.*use sosp_h, sosp_i or hap"):
        sosp_hub.score(model, graph, [batch], "taylor")
    caplog.clear()
    labelled = {**batch, "labels": batch["input_ids"]}
    other = sosp_hub.score(model, graph, [labelled], "sosp_h")
    assert "no labels" not in caplog.text
    assert any((other[name] - found[name]).abs().max() > 0 for name in found)


WITHOUT_LABELS = sorted(name for name, task in tasks().items() if not task.learns)


def test_there_are_tasks_without_labels():
    assert WITHOUT_LABELS == [
        "feature-extraction",
        "image-feature-extraction",
        "self",
        "sentence-similarity",
    ]


@pytest.mark.parametrize("task", WITHOUT_LABELS)
@pytest.mark.parametrize(
    ("key", "asked"), [("model.train", "model.train.epochs=1"), ("criterion", "criterion.name=scp")]
)
def test_nothing_trains_a_dense_model_without_labels(task, key, asked):
    text = f"model: {{library: transformers, id: a/b, task: {task}}}\ndata: {{id: a/c}}\n"
    with pytest.raises(RecipeError, match=f"{key}.*{task} has no labels to train"):
        parse_recipe(text, "test", [asked])


def test_a_recipe_without_a_task_needs_no_labels():
    text = "model: {library: transformers, id: a/b}\ndata: {id: a/c}\n"
    assert parse_recipe(text, "test", []).model.task == "self"


def test_agreement_of_numbers_is_refused():
    numbers = squared(torch.randn(3, 4), torch.randn(3, 4))
    loss = Loss(numbers.value(), 3, None, numbers)
    with pytest.raises(DataError, match=r"agreement counts classes.*write divergence"):
        metrics.agreement(loss, None)


def test_a_rank_correlation_is_scipys_over_whole_pairs():
    from scipy.stats import spearmanr

    vectors = nn.functional.normalize(torch.randn(24, 5), dim=-1)
    scores = torch.rand(12).repeat_interleave(2)
    texts = [
        (i // 2, score.item(), vector)
        for i, (score, vector) in enumerate(zip(scores, vectors, strict=True))
    ]
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    expected = spearmanr(cosines, scores[::2]).statistic
    assert spearman.value(texts) == pytest.approx(expected)
    assert spearman.value(texts[:-1]) == pytest.approx(
        spearmanr(cosines[:-1], scores[:-2:2]).statistic
    )


def test_a_metric_of_all_samples_has_the_error_of_a_jackknife():
    """For a mean the jackknife is the textbook's standard error."""
    model, images = nn.Linear(3, 2), torch.randn(20, 3)
    labels = torch.randint(2, (20,))

    def collect(model, loss, batch):
        return loss.predictions.losses()[:, 0].tolist()

    meter = metrics.OfAll(collect, lambda losses: sum(losses) / len(losses))
    batches = [(images[:13], labels[:13]), (images[13:], labels[13:])]
    found = evaluate(model, batches, ("of_all", "loss"), meters={"of_all": meter})
    assert found["of_all"].value == pytest.approx(found["loss"].value)
    assert found["of_all"].n == 20
    assert found["of_all"].stderr == pytest.approx(found["loss"].stderr)
    one = evaluate(model, [(images[:1], labels[:1])], ("of_all",), meters={"of_all": meter})
    assert one["of_all"].stderr is None


def test_what_a_loss_does_not_count_is_not_agreed_on():
    labels = torch.tensor([[0, 1], [1, 0]])
    read = softmax(torch.randn(2, 2, 3), nn.functional.one_hot(labels, 3).float())
    read = softmax(read.values, read.targets, weights=torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    same, weights = metrics.agreement(Loss(read.value(), 3, None, read), None)
    assert weights.tolist() == [1.0, 2.0]
    right = read.values.argmax(-1) == labels
    assert same.tolist() == [right[0, 0].item(), right[1].sum().item()]


def test_timm_does_images_with_and_without_labels():
    section = ModelSection(library="timm", id="resnet18", task="fill-mask")
    able = "do image-classification, image-feature-extraction, self, not fill-mask"
    with pytest.raises(ModelError, match=able):
        load_model(section)
    assert find_task("self").pixels


@pytest.mark.slow
def test_a_timm_model_follows_itself_on_images_alone(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {{library: timm, id: cifar_resnet20, task: self, pretrained: false, num_labels: 10}}
data: {{id: sklearn/digits, num_train: 48, num_test: 24}}
criterion: {{name: sosp_i, num_samples: 16, batch_size: 8}}
budget: {{structures: 0.8}}
rebuild: {{num_samples: 16}}
finetune: {{epochs: 1, batch_size: 16, held_out: 0}}
evaluate: {{metrics: [divergence, agreement], latency: false}}
output: {{dir: {tmp_path}/out, figures: false}}
""")
    assert main([str(recipe)]) == 0
    metrics = json.loads((tmp_path / "out" / "sosp_report.json").read_text())["metrics"]
    assert abs(metrics["dense"]["divergence"]["value"]) < 1e-6
    assert metrics["dense"]["agreement"]["value"] == 1
    assert metrics["rebuilt"]["divergence"]["value"] < metrics["cut"]["divergence"]["value"]
    assert verify(str(tmp_path / "out")).holds


@pytest.mark.slow
def test_a_timm_model_is_cut_as_an_embedder_and_does_what_it_did(tmp_path, capsys):
    """Its norms know other data than it is calibrated with: they are not to learn these."""
    torch.manual_seed(0)
    trained = timm.create_model("test_resnet", num_classes=7).eval()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    timm.models.save_for_hf(trained, tmp_path / "model", safe_serialization=True)
    (tmp_path / "recipe.yaml").write_text(TIMM.format(folder=tmp_path))
    assert main([str(tmp_path / "recipe.yaml")]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    report = json.loads((out / "sosp_report.json").read_text())
    found = {stage: values["cosine"]["value"] for stage, values in report["metrics"].items()}
    assert found["dense"] == pytest.approx(1)
    assert found["final"] >= found["rebuilt"] > found["cut"]
    small = sosp_hub.from_pretrained(out)
    with torch.no_grad():
        assert small(torch.zeros(2, 3, 32, 32)).shape == (2, trained.num_features)
    assert small.state_dict().keys() == trained.state_dict().keys() - {"fc.weight", "fc.bias"}
    assert "print(model(image))\n" in (out / "README.md").read_text()
    assert verify(str(out)).holds


TIMM = """
model: {{library: timm, id: "{folder}/model", task: image-feature-extraction}}
data: {{id: sklearn/digits, num_train: 128, num_test: 64, image_size: 32}}
criterion: {{name: sosp_h, num_samples: 64, batch_size: 16}}
budget: {{macs: 0.6}}
finetune: {{epochs: 1, batch_size: 16, held_out: 0.25}}
evaluate: {{latency: false}}
output: {{dir: "{folder}/out", figures: false}}
"""
