import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import log_softmax

from sosp_hub.errors import DataError
from sosp_hub.tasks.loss import batch_loss
from tests.compare import assert_close


def surprise(logits, labels):
    """Oracle: minus the log-probability of each label that counts."""
    pairs = zip(logits, labels.tolist(), strict=True)
    return [-log_softmax(row.double(), -1)[label] for row, label in pairs if label != -100]


@pytest.fixture
def llama(save):
    return save("LlamaForCausalLM")[1]


def test_images_and_labels():
    model, images, labels = nn.Linear(6, 4), torch.randn(5, 6), torch.tensor([0, 3, 1, 1, 2])
    loss = batch_loss(model, (images, labels))
    assert_close(loss.value, torch.stack(surprise(model(images), labels)).mean())
    assert loss.weight == 5
    assert_close(loss.outputs, model(images))
    assert_close(loss.predictions.value(), loss.value)
    assert batch_loss(model, ((images,), labels)).value == loss.value


def test_a_loss_is_as_precise_as_its_logits_and_at_least_float32():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = torch.nn.Linear(4, 3).to(dtype)
        loss = batch_loss(model, (torch.randn(5, 4, dtype=dtype), torch.arange(5) % 3))
        assert loss.value.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("ignored", [0, 3])
def test_tokens_of_a_language_model(llama, ignored):
    tokens = torch.randint(10, (2, 7))
    labels = tokens.clone()
    labels[0, :ignored] = -100
    loss = batch_loss(llama, {"input_ids": tokens, "labels": labels})
    logits = llama(input_ids=tokens).logits
    parts = [part for i in range(2) for part in surprise(logits[i, :-1], labels[i, 1:])]
    assert_close(loss.value, torch.stack(parts).mean())
    assert loss.weight == len(parts) == 12 - max(ignored - 1, 0)


def test_weighted_batches_give_the_loss_of_the_whole(llama):
    tokens = torch.randint(10, (5, 7))
    whole = batch_loss(llama, {"input_ids": tokens, "labels": tokens})
    parts = [
        batch_loss(llama, {"input_ids": part, "labels": part}) for part in tokens.split([2, 3])
    ]
    mean = sum(part.value * part.weight for part in parts) / sum(part.weight for part in parts)
    assert_close(mean, whole.value)


def test_cache_is_off(llama):
    seen = {}
    llama.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    tokens = torch.randint(10, (2, 7))
    batch_loss(llama, {"input_ids": tokens, "labels": tokens})
    assert seen["use_cache"] is False


def test_texts_with_a_label(save):
    model = save("BertForSequenceClassification", num_labels=3)[1]
    batch = {"input_ids": torch.randint(10, (4, 6)), "labels": torch.tensor([0, 2, 1, 1])}
    loss = batch_loss(model, batch)
    logits = model(input_ids=batch["input_ids"]).logits
    assert_close(loss.value, torch.stack(surprise(logits, batch["labels"])).mean())
    assert (loss.weight, set(batch)) == (4, {"input_ids", "labels"})


def test_a_given_loss_function_gets_whole_outputs_and_whole_targets(llama):
    tokens = torch.randint(10, (2, 7))

    def squares(outputs, targets):
        assert targets["labels"] is tokens
        return outputs.logits.square().mean()

    loss = batch_loss(llama, {"input_ids": tokens, "labels": tokens}, squares)
    assert_close(loss.value, llama(input_ids=tokens).logits.square().mean())


def test_images_take_the_dtype_of_the_weights():
    model = nn.Linear(6, 4, dtype=torch.bfloat16)
    loss = batch_loss(model, (torch.randn(5, 6), torch.zeros(5, dtype=torch.int64)))
    assert loss.outputs.dtype == torch.bfloat16
    assert loss.value.dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.randn(5, 6), r"Tensor and no labels.*\(inputs, labels\)"),
        ((torch.randn(5, 6),), r"Tensor and no labels.*\(inputs, labels\)"),
        ((torch.randn(5, 6),) * 3, r"tuple of 3.*\(inputs, labels\)"),
        ({"input": torch.randn(5, 6)}, "input.*labels"),
        ((torch.randn(5, 6), 3), "labels.*int.*tensor"),
        ((torch.randn(5, 6).numpy(), torch.tensor([0] * 5)), "ndarray.*from_numpy"),
        ((torch.randn(5, 6), torch.tensor([0, 3, 1, 1])), "4 labels.*5"),
        ((torch.randn(5, 6), torch.tensor([0, 3, 1, 1, 4])), "label 4.*4 outputs"),
        ((torch.randn(5, 6), torch.tensor([0, 3, 1, 1, -1])), "label -1.*4 outputs"),
        ((torch.randn(5, 6), torch.randn(5)), r"float32.*int64"),
    ],
)
def test_a_batch_that_gives_no_loss_is_described(batch, words):
    with pytest.raises(DataError, match=words):
        batch_loss(nn.Linear(6, 4), batch)


@pytest.mark.parametrize(
    ("head", "label", "words"),
    [
        ("LlamaForCausalLM", 999, r"label 999 .* head with 10 outputs; labels go from 0 to 9"),
        ("LlamaForCausalLM", -1, "label -1 does not fit"),
        ("BertForSequenceClassification", 3, "label 3 .* 3 outputs"),
        ("BertForSequenceClassification", None, "2 labels for 4 inputs"),
    ],
)
def test_labels_are_looked_at_before_the_model_computes_its_own_loss(save, head, label, words):
    """On a GPU a wrong one ends the process; on a CPU its message names no head."""
    model = save(head, **({"num_labels": 3} if "Sequence" in head else {}))[1]
    tokens = torch.randint(10, (4, 6))
    labels = tokens.clone() if "Causal" in head else torch.tensor([0, 2, -100, 1])
    batch = {"input_ids": tokens, "labels": labels}
    assert batch_loss(model, batch).value.isfinite()
    if label is None:
        batch["labels"] = labels[:2]
    else:
        labels[1] = label
    with pytest.raises(DataError, match=words):
        batch_loss(model, batch)


def test_a_regression_has_no_classes(save):
    model = save("BertForSequenceClassification", num_labels=1)[1]
    batch = {"input_ids": torch.randint(10, (2, 6)), "labels": torch.tensor([0.5, 7.0])}
    assert batch_loss(model, batch).value.isfinite()
    assert batch_loss(model, {**batch, "labels": torch.tensor([0, 7])}).value.isfinite()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ElectraForMaskedLM"])
def test_labels_that_are_no_classes_are_left_to_the_model(name):
    """Their config has `num_labels` all the same, 2 where nobody sets it."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = getattr(transformers, name).config_class(**small, intermediate_size=16, vocab_size=40)
    model = getattr(transformers, name)(config).eval()
    labels = torch.tensor([[7, 30, 12], [5, 9, 39]])
    with torch.no_grad():
        assert batch_loss(model, {"input_ids": labels, "labels": labels}).value.isfinite()


def test_a_batch_without_a_label_trains_nothing():
    """transformers' own loss of it is 0 / 0."""
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model, tokens = transformers.LlamaForCausalLM(config), torch.randint(0, 20, (2, 5))
    loss = batch_loss(model, {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})
    loss.value.backward()
    assert (loss.value.item(), loss.weight) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
