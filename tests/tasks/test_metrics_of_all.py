"""Metrics of all samples together, against slow and obvious ways to compute them."""

import itertools
import math
import random
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from recipes import make_data
from sosp_hub.errors import DataError
from sosp_hub.evaluate import evaluate
from sosp_hub.pipeline.measuring import check_measuring
from sosp_hub.tasks import maps, words
from sosp_hub.tasks.average_precision import THRESHOLDS, average_precision, matched
from sosp_hub.tasks.kinds.text2text_generation import Text2Text
from sosp_hub.tasks.loss import Loss, batch_loss
from sosp_hub.tasks.metrics import OfAll, f1_of_answers, squared_error
from sosp_hub.tasks.pairs import retrieval
from sosp_hub.tasks.predictions import softmax
from sosp_hub.tasks.series import mean_absolute_error, root_mean_squared_error
from tests.compare import assert_close

# Boxes -------------------------------------------------------------------------------------------


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return shared / (sum(areas) - shared)


def precision_by_hand(images, label, threshold):
    """Images are (detections, boxes): (score, class, box) and (class, box)."""
    num, hits = 0, []
    for detections, boxes in images:
        free = [box for c, box in boxes if c == label]
        num += len(free)
        for score, c, box in sorted(detections, key=lambda d: -d[0]):
            if c != label:
                continue
            best = max(free, key=lambda other: overlap(box, other), default=None)
            right = best is not None and overlap(box, best) >= threshold
            if right:
                free.remove(best)
            hits.append((score, right))
    if not num:
        return None
    hits.sort(key=lambda hit: -hit[0])
    points = []
    for last in range(1, len(hits) + 1):
        right = sum(hit for _, hit in hits[:last])
        points.append((right / num, right / last))
    steps = np.linspace(0, 1, 101).tolist()
    return sum(max((p for r, p in points if r >= at), default=0.0) for at in steps) / 101


def boxes_of(chance, num):
    for _ in range(num):
        left, top = chance.uniform(0, 0.6), chance.uniform(0, 0.6)
        yield [left, top, left + chance.uniform(0.1, 0.4), top + chance.uniform(0.1, 0.4)]


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_counting_by_hand(seed):
    chance = random.Random(seed)
    images = []
    for _ in range(6):
        truth = [(chance.randrange(3), box) for box in boxes_of(chance, chance.randrange(4))]
        near = [(c, [x + chance.gauss(0, 0.03) for x in box]) for c, box in truth * 2]
        wild = [(chance.randrange(4), box) for box in boxes_of(chance, 3)]
        images.append(([(chance.random(), c, box) for c, box in near + wild], truth))
    expected = [
        value
        for label, threshold in itertools.product(range(3), THRESHOLDS)
        if (value := precision_by_hand(images, label, threshold)) is not None
    ]
    entries = []
    for detections, truth in images:
        scores, classes, boxes = zip(*detections, strict=True)
        true_boxes = torch.tensor([box for _, box in truth]).view(-1, 4)
        entries.append(
            matched(
                torch.tensor(scores),
                torch.tensor(classes),
                torch.tensor(boxes),
                torch.tensor([c for c, _ in truth], dtype=torch.int64),
                true_boxes,
            )
        )
    assert average_precision(entries) == pytest.approx(sum(expected) / len(expected), abs=1e-9)
    at_half = [
        value for label in range(3) if (value := precision_by_hand(images, label, 0.5)) is not None
    ]
    assert average_precision(entries, slice(1)) == pytest.approx(sum(at_half) / len(at_half))


def test_perfect_boxes_are_worth_one_and_none_zero():
    box, label = torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([2])
    none = torch.zeros(0)
    perfect = matched(torch.tensor([0.9]), label, box, label, box)
    missed = matched(none, none.long(), none.view(0, 4), label, box)
    assert average_precision([perfect]) == 1
    assert average_precision([missed]) == 0
    empty = matched(torch.tensor([0.9]), label, box, none.long(), none.view(0, 4))
    assert math.isnan(average_precision([empty]))
    assert average_precision([perfect, empty]) == 1  # of equal scores the first counts first


# Pixels ------------------------------------------------------------------------------------------


def test_mean_iou_is_that_of_the_confusion_matrix():
    from sklearn.metrics import jaccard_score

    logits, labels = torch.randn(5, 6, 6, 6), torch.randint(5, (5, 12, 12))
    logits[:, [2, 5]] -= 100  # one is there and never found, the other neither
    labels[:, :3] = 255
    loss = Loss(torch.zeros(()), 5, SimpleNamespace(logits=logits), None)
    areas = maps.mean_iou.collect(torch.nn.Identity(), loss, {"labels": labels})
    large = torch.nn.functional.interpolate(logits, (12, 12), mode="bilinear", align_corners=False)
    counted = labels != 255
    expected = jaccard_score(labels[counted], large.argmax(1)[counted], average="macro")
    assert maps.mean_iou.value(areas) == pytest.approx(expected)
    right, weights = maps.pixel_accuracy(loss, {"labels": labels})
    share = (large.argmax(1) == labels)[counted].double().mean()
    assert_close(right.sum() / weights.sum(), share, relative=1e-6)


def test_depth_counts_what_is_known():
    depth, labels = torch.rand(3, 4, 4) + 0.5, torch.rand(3, 8, 8) + 0.5
    labels[0, :4] = 0
    labels[2, :, 2:] = 0
    model = torch.nn.Identity()
    loss = batch_loss(model, ({"input": depth}, labels), maps.depth_error)
    large = torch.nn.functional.interpolate(
        depth[:, None], (8, 8), mode="bilinear", align_corners=False
    )[:, 0]
    rows = [(large[i][labels[i] > 0], labels[i][labels[i] > 0]) for i in range(3)]
    squares = [(mine - aim).square().mean() for mine, aim in rows]
    assert_close(loss.value, torch.stack(squares).mean(), relative=1e-6)
    assert_close(loss.predictions.value(), loss.value, relative=1e-6)
    counts, weights = maps.relative_error(loss, None)
    shares = [((mine - aim).abs() / aim).mean() for mine, aim in rows]
    assert_close(counts.sum() / weights.sum(), torch.stack(shares).mean(), relative=1e-6)
    counts, weights = squared_error(loss, None)
    assert_close(counts.sum() / weights.sum(), torch.stack(squares).mean(), relative=1e-6)


# Words -------------------------------------------------------------------------------------------


def edits_slowly(first, second):
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return edits_slowly(first[1:], second[1:])
    rest = (first[1:], second), (first, second[1:]), (first[1:], second[1:])
    return 1 + min(edits_slowly(*each) for each in rest)


def test_word_errors_are_the_fewest_edits():
    chance, pairs = random.Random(0), []
    for _ in range(40):
        some, others = ([chance.choice("abc") for _ in range(chance.randrange(6))] for _ in "12")
        assert words.edits(some, others) == edits_slowly(some, others)
        pairs.append((" ".join(some), " ".join(others)))
    total = sum(edits_slowly(a.split(), b.split()) for a, b in pairs)
    rate = total / sum(len(b.split()) for _, b in pairs)
    assert words.word_error_rate(pairs) == pytest.approx(rate)
    same = sum(a == b for a, b in pairs) / len(pairs)
    assert words.exact_match(pairs) == pytest.approx(same)


WRITTEN = [
    ("the cat sat on the mat", "the cat is sitting on the mat today"),
    ("a dog ran", "a dog ran over the hill and far away"),
    ("no word is right", "all of them differ here"),
    ("the same words as there", "the same words as there"),
]


def grams(units, n):
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


def f_score(shared, found, there, beta=1.0):
    if not shared:
        return 0.0
    precision, recall = shared / found, shared / there
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_bleu_is_clipped_precision_of_all_texts_together():
    logs = []
    for n in range(1, 5):
        pairs = [(grams(a.split(), n), grams(b.split(), n)) for a, b in WRITTEN]
        logs.append(
            math.log(sum((a & b).total() for a, b in pairs) / sum(a.total() for a, _ in pairs))
        )
    found, there = (sum(len(pair[i].split()) for pair in WRITTEN) for i in (0, 1))
    expected = math.exp(sum(logs) / 4) * math.exp(min(0, 1 - there / found))
    assert words.bleu(WRITTEN) == pytest.approx(expected)
    assert words.bleu([WRITTEN[3]]) == pytest.approx(1)


def test_chrf_is_the_mean_over_lengths_of_letters_without_spaces():
    totals = []
    for n in range(1, 7):
        pairs = [[grams(text.replace(" ", ""), n) for text in pair] for pair in WRITTEN]
        totals.append([sum(x.total() for x in column) for column in zip(*pairs, strict=True)])
        totals[-1].append(sum((a & b).total() for a, b in pairs))
    precision = sum(shared / found for found, _, shared in totals) / 6
    recall = sum(shared / there for _, there, shared in totals) / 6
    assert words.chrf(WRITTEN) == pytest.approx(5 * precision * recall / (4 * precision + recall))


def longest(first, second):
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + longest(first[1:], second[1:])
    return max(longest(first[1:], second), longest(first, second[1:]))


@pytest.mark.parametrize("kind", ["1", "2", "L"])
def test_rouge_is_the_mean_of_what_texts_share(kind):
    scores = []
    for pair in WRITTEN:
        a, b = (text.split() for text in pair)
        if kind == "L":
            scores.append(f_score(longest(a, b), len(a), len(b)))
        else:
            n = int(kind)
            one, other = grams(a, n), grams(b, n)
            scores.append(f_score((one & other).total(), one.total(), other.total()))
    assert words.rouge(kind, WRITTEN) == pytest.approx(sum(scores) / len(scores))


def test_metrics_of_what_is_written_ask_for_it_once():
    meters, asked = words.word_metrics(None, Text2Text.of_all), []

    def collect(model, loss, batch):
        asked.append(batch)
        return [("a b c d", "a b c d"), ("a", "b")]

    shared = {name: OfAll(collect, meter.value) for name, meter in meters.items()}
    assert len({meter.collect for meter in meters.values()}) == 1
    batches = [(torch.randn(2, 3), torch.tensor([0, 1]))] * 3
    found = evaluate(torch.nn.Linear(3, 2), batches, list(shared), meters=shared)
    assert len(asked) == 3
    assert found["exact_match"].value == found["rouge_l"].value == 0.5
    assert {metric.n for metric in found.values()} == {6}


@pytest.mark.parametrize(("metric", "module"), [("bleu", "sacrebleu"), ("rouge_l", "torchmetrics")])
def test_a_library_that_is_not_installed_is_named(metric, module, monkeypatch):
    for name in (module, f"{module}.functional.text"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"{metric} needs {module}; pip install 'sosp_hub"):
        words.word_metrics(None, [metric])[metric].value([("not seen yet", "not seen")])
    recipe = SimpleNamespace(evaluate=SimpleNamespace(harness=(), metrics=("loss", metric)))
    with pytest.raises(DataError, match=f"{metric} needs {module}"):  # before anything long
        check_measuring(SimpleNamespace(recipe=recipe, data=None))


def test_f1_of_answers_is_that_of_their_tokens():
    ends = [(2, 4), (2, 2), (1, 6), (5, 3), (0, 1)]
    truth = [(2, 4), (2, 5), (3, 4), (2, 6), (4, 6)]
    logits = torch.stack([torch.nn.functional.one_hot(torch.tensor(e), 8) for e in ends]).float()
    scores = [
        f_score(len(there & found), len(found), len(there))
        for found, there in (
            (set(range(a, b + 1)), set(range(c, d + 1)))
            for (a, b), (c, d) in zip(ends, truth, strict=True)
        )
    ]
    read = softmax(logits, torch.tensor(truth))
    loss = Loss(torch.zeros(()), 1, None, read)
    counts, weights = f1_of_answers(loss, None)
    assert_close(counts / weights, torch.tensor(scores, dtype=torch.float64), relative=1e-12)


def test_an_answer_ends_at_its_last_token():
    from sosp_hub.tasks.kinds.question_answering import _tokens_of

    class Encoded:
        """One token a letter; a question of one letter and two marks stand before."""

        def char_to_token(self, row, place, sequence_index):
            assert sequence_index == 1
            return 3 + place if place < len("on monday") else None

    assert _tokens_of(Encoded(), 0, (3, 9)) == (6, 11)  # the text ends with it
    assert _tokens_of(Encoded(), 0, (0, 2)) == (3, 4)
    assert _tokens_of(Encoded(), 0, (7, 12)) == (0, 0)
    assert _tokens_of(Encoded(), 0, None) == (0, 0)


def test_ctc_reads_the_likeliest_letters_and_leaves_out_blanks_and_repeats():
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abc"]
    tokenizer = make_data.letter_tokenizer(letters)
    path = [5, 5, 0, 5, 4, 6, 6, 0]  # a a _ a | b b _
    logits = torch.nn.functional.one_hot(torch.tensor([path]), 8).float()
    loss = Loss(torch.zeros(()), 1, SimpleNamespace(logits=logits), None)
    batch = {"labels": torch.tensor([[5, 5, 4, 7, -100]])}
    meter = words.word_metrics(tokenizer, ["word_error_rate"])["word_error_rate"]
    assert list(meter.collect(torch.nn.Identity(), loss, batch)) == [("aa b", "aa c")]


# Pairs and series --------------------------------------------------------------------------------


def test_retrieval_looks_for_the_nearest_of_different_texts():
    images, texts = torch.randn(8, 5), torch.randn(3, 5)
    which = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    tokens = torch.tensor([[4, 5, 0], [4, 0, 0], [6, 7, 8]])[which]
    outputs = SimpleNamespace(image_embeds=images, text_embeds=texts[which])
    loss = Loss(torch.zeros(()), 8, outputs, None)
    pairs = retrieval.collect(torch.nn.Identity(), loss, {"input_ids": tokens})
    nearest = (images @ texts.T).argmax(1)
    assert retrieval.value(pairs) == pytest.approx((nearest == which).double().mean().item())


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_forecasts_are_compared_in_the_units_of_the_data(loss):
    torch.manual_seed(0)
    small = {"d_model": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 8}
    config = transformers.PatchTSTConfig(
        **small,
        num_input_channels=1,
        context_length=16,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        loss=loss,
        distribution_output="normal",
    )
    model = transformers.PatchTSTForPrediction(config).eval()
    batch = {"past_values": torch.randn(3, 16, 1) * 5, "future_values": torch.randn(3, 4, 1) * 5}
    with torch.no_grad():
        measured = batch_loss(model, batch)
        forecast = model.generate(batch["past_values"]).sequences.mean(1)
    assert (measured.predictions is not None) == (loss == "mse")
    windows = mean_absolute_error.collect(model, measured, batch)
    away = forecast - batch["future_values"]
    if loss == "mse":
        assert mean_absolute_error.value(windows) == pytest.approx(away.abs().mean().item())
        expected = away.square().mean().sqrt().item()
        assert root_mean_squared_error.value(windows) == pytest.approx(expected)
    else:  # the mean of a hundred draws is near that of the distribution
        assert mean_absolute_error.value(windows) == pytest.approx(
            away.abs().mean().item(), rel=0.2
        )
