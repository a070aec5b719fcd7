"""Every task end to end: trained, cut, measured, its card written, loaded and verified."""

import json
import random

import pytest
import torch
import transformers

import sosp_hub
from sosp_hub.errors import DataError
from sosp_hub.evaluate import evaluate
from sosp_hub.hub.verify import verify
from sosp_hub.prune import main
from sosp_hub.recipe.metrics import is_share, lower_is_better
from sosp_hub.recipe.tasks import find_task, known_task, register, tasks
from sosp_hub.tasks import metrics
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.predictions import sigmoid, softmax, squared

NAMES, PLACES, REST = ["ann", "bob", "eve"], ["rome", "paris", "oslo"], ["went", "to", "the", "big"]
WORDS = [*NAMES, *PLACES, *REST, "who", "where"]
SMALL = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny BERT trunk with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, words[word]) for word in ("[CLS]", "[SEP]")]
    both = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", both, ends)
    folder = tmp_path_factory.mktemp("base")
    names = ("pad", "unk", "cls", "sep", "mask")
    marks = {f"{name}_token": mark for name, mark in zip(names, special, strict=True)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **marks
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), **SMALL)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def sentence(chance):
    name, place = chance.choice(NAMES), chance.choice(PLACES)
    return [name, "went", "to", *["the", "big"][: chance.randrange(3)], place]


def tagged(chance):
    words = sentence(chance)
    tags = ["B-PER" if w in NAMES else "B-LOC" if w in PLACES else "O" for w in words]
    return {"tokens": words, "tags": tags}


def asked(chance):
    words = [*["the", "big"][: chance.randrange(3)], *sentence(chance)]
    name = next(word for word in words if word in NAMES)
    context = " ".join(words)
    answers = {"text": [name], "answer_start": [context.index(name)]}
    return {"question": "who", "context": context, "answers": answers}


def several(chance):
    words = sentence(chance)
    return {"text": " ".join(words), "label": [w for w in ("ann", "rome", "big") if w in words]}


def number(chance):
    words = sentence(chance)
    return {"text": " ".join(words), "label": len(words) / 2 + NAMES.index(words[0])}


def plain(chance):
    return {"text": " ".join(sentence(chance))}


# task, rows, the metrics that are asked for, what all that is trained well reaches
RUNS = {
    "token-classification": (tagged, ["accuracy", "span_f1", "loss"], "span_f1"),
    "question-answering": (asked, ["f1", "exact_match", "loss"], "f1"),
    "fill-mask": (plain, ["accuracy", "perplexity"], "perplexity"),
    "text-classification, several": (several, ["f1", "accuracy", "loss"], "f1"),
    "text-classification, a number": (
        number,
        ["mean_absolute_error", "root_mean_squared_error", "loss"],
        "mean_absolute_error",
    ),
}

RECIPE = """
model:
  library: transformers
  id: BASE
  task: TASK
  train: {epochs: 30, learning_rate: 5.0e-3, batch_size: 16}
data: {path: ROWS, test: null, max_length: 16}
criterion: {name: CRITERION, num_samples: 24, batch_size: 8}
budget: {structures: 0.7}
finetune: {epochs: 1, batch_size: 16, learning_rate: 2.0e-3, distill: 0.5, label_smoothing: 0.0}
evaluate: {metrics: METRICS, latency: false}
output: {dir: OUTPUT, figures: false}
"""


def run(base, folder, task, make, wanted, criterion="sosp_i", **rows):
    chance = random.Random(0)
    made = [make(chance) for _ in range(1200 if task == "fill-mask" else 240)]
    made = rows.get("rows", made)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in made))
    text = RECIPE.replace("BASE", str(base)).replace("ROWS", str(folder / "rows.jsonl"))
    text = text.replace("TASK", task).replace("METRICS", str(wanted)).replace("'", "")
    text = text.replace("OUTPUT", str(folder / "out")).replace("CRITERION", criterion)
    (folder / "recipe.yaml").write_text(text)
    return main([str(folder / "recipe.yaml")])


@pytest.mark.slow
@pytest.mark.parametrize("key", RUNS)
def test_a_recipe_from_rows_to_a_verified_folder(base, tmp_path, key):
    make, wanted, best = RUNS[key]
    task = key.partition(",")[0]
    assert run(base, tmp_path, task, make, wanted) == 0
    out = tmp_path / "out"
    report = json.loads((out / "sosp_report.json").read_text())
    assert report["task"] == task
    for stage in ("dense", "cut", "final"):
        assert list(report["metrics"][stage]) == wanted
        for metric in report["metrics"][stage].values():
            assert metric["stderr"] is not None
            assert metric["n"] > 0
    dense = report["metrics"]["dense"][best]["value"]
    if best == "mean_absolute_error":
        assert dense < 0.4  # of numbers from 1.5 to 5
    elif best == "perplexity":
        assert dense < 10  # of 17 tokens, of which a guess has 17
    else:
        assert dense > 0.8
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    model = sosp_hub.from_pretrained(out)
    assert type(model).__name__ == find_task(task).auto_class.replace("AutoModel", "Bert")
    found = verify(str(out), num_samples=500, overrides=[f"data.path={tmp_path / 'rows.jsonl'}"])
    checks = {check.name: check for check in found.checks}
    assert "metrics" not in checks, str(found)
    for name in wanted:
        if name != "loss":
            assert checks[f"metric {name}"].holds, checks[f"metric {name}"]


def of_one_class(chance):
    words = sentence(chance)
    return {"text": " ".join(words), "label": words[0]}


@pytest.mark.slow
def test_a_metric_that_the_labels_do_not_have_is_refused_before_a_training(base, tmp_path, capsys):
    assert run(base, tmp_path, "text-classification", of_one_class, ["accuracy", "f1"]) == 2
    told = capsys.readouterr().err
    assert "f1 needs outputs that the loss reads as sigmoid (several labels each)" in told
    assert "Write accuracy or loss" in told
    assert not list((tmp_path / "out.partial").glob("dense*"))
    assert "train dense" not in told


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "sosp_h", "magnitude", "activation"])
def test_every_kind_of_criterion_scores_spans(base, tmp_path, criterion):
    assert run(base, tmp_path, "question-answering", asked, ["f1"], criterion) == 0


BAD_ROWS = {
    "lengths": (
        "token-classification",
        [{"tokens": ["ann", "went"], "tags": ["B-PER"]}],
        "row 0 of .* has 2 words and 1 tags",
    ),
    "no list": (
        "token-classification",
        [{"tokens": "ann went", "tags": "O"}],
        "data.tokens: row 0 .*'ann went'.*expected a list of words",
    ),
    "columns": (
        "token-classification",
        [{"tokens": ["a"], "ner_tags": ["O"]}],
        "data.tags.*ner_tags",
    ),
    "span": (
        "question-answering",
        [
            {
                "question": "who",
                "context": "ann went",
                "answers": {"text": ["bob"], "answer_start": [0]},
            }
        ],
        "row 0 of .*'bob' does not stand at character 0 .*'ann'",
    ),
    "outside": (
        "question-answering",
        [
            {
                "question": "who",
                "context": "ann went",
                "answers": {"text": ["ann"], "answer_start": [70]},
            }
        ],
        "'ann' does not stand at character 70",
    ),
    "some lists": (
        "text-classification",
        [{"text": "ann", "label": ["x"]}, {"text": "bob", "label": None}],
        "data.label: row 1 .* None where others have lists",
    ),
}


@pytest.mark.parametrize(("task", "rows", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_right_are_named(tmp_path, task, rows, words):
    from sosp_hub.data.source import open_data
    from sosp_hub.recipe.schema import DataSection

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=words):
        open_data(DataSection(path=str(tmp_path / "rows.jsonl"), test=None), task)


def test_the_registry_knows_names_and_aliases():
    assert find_task("causal-lm") is find_task("text-generation")
    assert "causal-lm" not in tasks()
    assert known_task("nothing") is None
    with pytest.raises(ValueError, match=r"did you mean 'fill-mask'.*expected one of .*fill-mask"):
        find_task("fill-masks")
    for name, task in tasks().items():
        for auto in (task.auto_class, *task.other_auto_classes, *task.by_type.values()):
            assert hasattr(transformers, auto) or task.name == "self", name
        assert set(task.metrics) >= set(task.default_metrics(None)), name

    class Other(type(find_task("fill-mask"))):
        pass

    with pytest.raises(ValueError, match="two tasks are called 'fill-mask'"):
        register(Other)


def test_each_metric_says_which_way_is_better():
    names = {metric for task in tasks().values() for metric in task.metrics}
    assert {name for name in names if lower_is_better(name)} == {
        *("loss", "perplexity", "divergence", "word_error_rate", "relative_error"),
        *("mean_absolute_error", "root_mean_squared_error"),
    }
    assert {name for name in names if is_share(name)} == {
        *("accuracy", "f1", "exact_match", "span_f1", "agreement", "mean_iou"),
        *("mean_average_precision", "average_precision_50", "word_error_rate"),
        *("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"),
    }


def _ratio(meter, predictions):
    counts, weights = meter(Loss(predictions.value(), predictions.weight, None, predictions), None)
    assert counts.shape == weights.shape
    return (counts.sum() / weights.sum()).item()


def test_span_f1_is_that_of_seqeval():
    from seqeval.metrics import f1_score

    names = ("O", "B-PER", "I-PER", "B-LOC")
    logits, labels = torch.randn(9, 12, 4), torch.randint(4, (9, 12))
    labels[:, ::5] = -100
    counted = [row != -100 for row in labels]
    truth, found = (
        [[names[i] for i in row[mask].tolist()] for row, mask in zip(rows, counted, strict=True)]
        for rows in (labels, logits.argmax(-1))
    )
    value = _ratio(metrics.f1_of_spans(names), softmax(logits, labels))
    assert value == pytest.approx(f1_score(truth, found))


def test_label_f1_and_errors_are_those_of_sklearn():
    from sklearn.metrics import f1_score, mean_absolute_error, mean_squared_error

    logits, yes = torch.randn(20, 5), torch.randint(2, (20, 5)).float()
    value = _ratio(metrics.f1_of_labels, sigmoid(logits, yes))
    assert value == pytest.approx(f1_score(yes.numpy(), (logits > 0).numpy(), average="micro"))
    numbers = torch.randn(20, 5)
    value = _ratio(metrics.absolute_error, squared(logits, numbers))
    assert value == pytest.approx(mean_absolute_error(numbers, logits), rel=1e-6)
    value = _ratio(metrics.squared_error, squared(logits, numbers))
    assert value == pytest.approx(mean_squared_error(numbers, logits), rel=1e-6)


def test_a_metric_that_does_not_fit_the_loss_says_so():
    model, batch = torch.nn.Linear(3, 4), (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(DataError, match=r"f1 needs outputs .* as sigmoid .*; it reads softmax"):
        evaluate(model, [batch], ("f1",), meters={"f1": metrics.f1_of_labels})


def test_whole_numbers_as_fractions_are_not_guessed_at(tmp_path):
    from sosp_hub.data.source import open_data
    from sosp_hub.recipe.schema import DataSection

    rows = [{"text": "ann", "label": 1.0}, {"text": "bob", "label": 2.0}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    section = DataSection(path=str(tmp_path / "rows.jsonl"), test=None)
    with pytest.raises(DataError, match=r"label 1\.0, .* data\.problem: regression"):
        open_data(section, "text-classification")
    asked = section.model_copy(update={"problem": "regression"})
    assert open_data(asked, "text-classification").info.problem == "regression"
    wrong = section.model_copy(update={"problem": "multi_label"})
    with pytest.raises(DataError, match=r"labels of .* are no lists"):
        open_data(wrong, "text-classification")
