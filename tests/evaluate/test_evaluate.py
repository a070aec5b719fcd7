"""Metrics and their standard errors against slow, obvious sums."""

import math
import statistics

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from sosp_hub.errors import DataError
from sosp_hub.evaluate import Metric, evaluate, measure_latency, metrics_of_samples
from sosp_hub.tasks import next_token, softmax
from tests.compare import assert_close


class Table(nn.Module):
    """Looks its logits up, so that every number of the test is known."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.modes = []

    def forward(self, inputs):
        self.modes.append(self.training)
        return self.logits[inputs]


@pytest.fixture
def table():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 3, 3, 3, 3, 0])
    model = Table(torch.randn(11, 5))
    batches = [(torch.arange(i, min(i + 4, 11)), labels[i : i + 4]) for i in (0, 4, 8)]
    return model, batches, labels


def naive(values):
    return Metric(
        statistics.mean(values), len(values), statistics.stdev(values) / len(values) ** 0.5
    )


def assert_metric(metric, expected):
    assert metric.n == expected.n
    assert_close([metric.value, metric.stderr], [expected.value, expected.stderr])


def test_accuracy_loss_and_perplexity_are_means_over_samples(table):
    model, batches, labels = table
    found = evaluate(model, batches, ("accuracy", "loss", "perplexity"))
    right = (model.logits.argmax(1) == labels).float().tolist()
    losses = F.cross_entropy(model.logits, labels, reduction="none").tolist()
    assert 0 < sum(right) < 11
    assert_metric(found["accuracy"], naive(right))
    loss = naive(losses)
    assert_metric(found["loss"], loss)
    perplexity = math.exp(loss.value)
    assert_metric(found["perplexity"], Metric(perplexity, 11, perplexity * loss.stderr))


def test_each_class_that_occurs_has_its_accuracy(table):
    model, batches, labels = table
    found = evaluate(model, batches, ("per_class_accuracy",), class_names=("cat", "dog"))
    assert list(found) == ["accuracy/cat", "accuracy/dog", "accuracy/2", "accuracy/3"]
    right = (model.logits.argmax(1) == labels).float()
    assert_metric(found["accuracy/cat"], naive(right[labels == 0].tolist()))
    assert found["accuracy/2"] == Metric(right[2].item(), 1, None)  # one sample has no spread


@pytest.mark.parametrize(
    "loss_fn", [F.mse_loss, F.binary_cross_entropy_with_logits], ids=["numbers", "several labels"]
)
def test_accuracies_of_classes_are_refused_where_a_sample_has_no_class(table, loss_fn):
    """They were left out without a word."""
    batches = [(torch.arange(4), torch.rand(4, 5).round())]
    with pytest.raises(DataError, match="per_class_accuracy needs samples that are of one class"):
        evaluate(table[0], batches, ("per_class_accuracy", "loss"), loss_fn=loss_fn)


def test_a_language_model_is_measured_per_token_with_the_spread_of_its_texts():
    class Model(nn.Module):
        def forward(self, input_ids, labels=None, **_):
            return {"logits": logits[input_ids[:, 0]]}

    torch.manual_seed(0)
    logits, tokens = torch.randn(6, 9, 7), torch.randint(7, (6, 9))
    tokens[:, 0] = torch.arange(6)
    labels = tokens.clone()
    for text, length in enumerate((9, 4, 7, 2, 9, 5)):
        labels[text, length:] = -100
    batches = [{"input_ids": tokens[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4)]
    found = evaluate(Model(), batches, ("perplexity", "loss", "accuracy"), loss_fn=next_token)
    sums, counts = [], []
    for text in range(6):
        counted = [t for t in range(1, 9) if labels[text, t] != -100]
        each = [-F.log_softmax(logits[text, t - 1], 0)[labels[text, t]].item() for t in counted]
        sums.append(sum(each))
        counts.append(len(counted))
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    stderr = math.sqrt(squares * 6 / 5) / sum(counts)
    assert_metric(found["loss"], Metric(mean, sum(counts), stderr))
    assert_metric(found["perplexity"], Metric(math.exp(mean), sum(counts), math.exp(mean) * stderr))
    assert found["accuracy"].n == sum(counts)


def test_it_measures_in_eval_mode_and_restores_the_mode(table):
    model, batches, _ = table
    model.train()
    evaluate(model, batches)
    assert model.training
    assert model.modes == [False, False, False]
    with pytest.raises(IndexError):
        evaluate(model, [(torch.tensor([99]), torch.tensor([0]))])
    assert model.training


def test_the_divergence_of_each_sample_is_that_from_the_dense_model_in_evaluation():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train()
    pruned = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train()
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    (rows,) = metrics_of_samples(pruned, [(x, y)], ["divergence"], dense=dense).values()
    shares, others = (model[1](x).double().softmax(-1) for model in (dense, pruned))
    expected = (shares * (shares / others).log()).sum(-1).detach()
    assert_close(rows[:, 0], expected, relative=1e-5)
    assert dense.training and pruned.training  # noqa: PT018


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_classes_may_be_whole_numbers_of_any_size(table, dtype):
    model, batches, _ = table
    few = [(inputs, labels.clamp(max=1)) for inputs, labels in batches]
    found = evaluate(model, [(inputs, labels.to(dtype)) for inputs, labels in few], ("loss",))
    assert found == evaluate(model, few, ("loss",))


def test_a_model_that_gives_no_numbers_is_right_nowhere(table):
    model, batches, _ = table
    model.logits.data[:4] = math.nan
    found = evaluate(model, batches, ("accuracy", "loss"))
    assert (
        found["accuracy"].value
        == naive(
            [0.0] * 4 + (model.logits.argmax(1) == torch.cat([y for _, y in batches]))[4:].tolist()
        ).value
    )
    assert math.isnan(found["loss"].value)
    assert math.isnan(found["loss"].stderr)  # not 0: nothing is known that well


def test_classes_of_one_name_are_told_apart(table):
    model, batches, _ = table
    named = evaluate(model, batches, ["per_class_accuracy"], class_names=["crane", "owl", "crane"])
    numbered = evaluate(model, batches, ["per_class_accuracy"])
    names = ("crane (0)", "owl", "crane (2)", "3")
    assert named == {f"accuracy/{name}": numbered[f"accuracy/{i}"] for i, name in enumerate(names)}


@pytest.mark.parametrize("metric", ["loss", "accuracy", "perplexity"])
def test_samples_without_a_label_are_nothing_to_measure(table, metric):
    model, batches, _ = table
    unlabeled = [(inputs, torch.full_like(labels, -100)) for inputs, labels in batches]
    with pytest.raises(DataError, match=r"there is no batch, or none with a label that counts"):
        evaluate(model, unlabeled, metric)


def test_classes_are_kept_where_a_later_batch_has_several_places_a_sample(table):
    """As a text of one token before one of two."""
    model, _, labels = table
    one, two = torch.arange(4)[:, None], torch.arange(4, 8).view(2, 2)
    batches = [(one, labels[one]), (two, labels[two])]
    found = evaluate(model, batches, ["per_class_accuracy"], loss_fn=softmax)
    assert found == evaluate(model, batches[:1], ["per_class_accuracy"], loss_fn=softmax)


UNLABELED = -100


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_batch_without_a_label_changes_nothing(first):
    """As a padded language model's batch of prompts alone, or one whose classes are unknown."""
    torch.manual_seed(0)
    tokens, metrics = torch.randint(0, 20, (4, 6)), ["loss", "accuracy"]
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    classifier = transformers.BertConfig(**size, num_attention_heads=2, num_labels=3)
    generator = transformers.LlamaConfig(**size, num_attention_heads=2)
    for model, labels in (
        (transformers.BertForSequenceClassification(classifier), torch.tensor([0, 1, 2, 0])),
        (transformers.LlamaForCausalLM(generator), tokens),
    ):
        batch = {"input_ids": tokens, "labels": labels}
        if labels is not tokens:
            metrics = [*metrics, "per_class_accuracy"]
        without = {**batch, "labels": torch.full_like(labels, UNLABELED)}
        batches = [without, batch] if first else [batch, without]
        found, expected = (evaluate(model, each, metrics) for each in (batches, [batch]))
        assert found == expected
        metrics = ["loss", "accuracy"]


def test_nothing_to_measure_is_refused(table):
    with pytest.raises(DataError, match="no batch"):
        evaluate(table[0], [])


class Deep(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, input):
        for _ in range(100):
            input = super().forward(input)
        return input


def test_latency_is_the_time_of_a_pass():
    models = [nn.Linear(3, 3), Deep()]
    for inputs in ((torch.randn(2, 3),), {"input": torch.randn(2, 3)}):
        one, hundred = measure_latency(models, inputs, budget_s=0.0)
        assert 0 < one < hundred < 1
