"""Models' own losses: what they read is found by their value, and weighs as it is averaged."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import sosp_hub
from sosp_hub.criteria.sosp_i import SospI
from sosp_hub.derivatives import Protocol, gauss_newton
from sosp_hub.tasks import batch_loss, forward
from tests.compare import assert_close

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 11,
    "max_position_embeddings": 16,
}
TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 3, 1, 2, 0], [1, 2, 3, 5, 4, 1]])
TAGS = torch.tensor([[-100, 0, 1, 2, 2, -100], [-100, 1, 1, -100, 0, -100], [-100] * 5 + [2]])
ENDS = torch.tensor([1, 5, 99]), torch.tensor([2, 5, 3])  # 99: outside, which counts for nothing
YES = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
SEQ2SEQ = {
    "vocab_size": 11,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
SEGMENTS = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [1, 1],
    "hidden_sizes": [8, 8],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 1],
    "mlp_ratios": [1, 1],
    "decoder_hidden_size": 8,
}
SERIES = {
    "num_input_channels": 1,
    "context_length": 16,
    "prediction_length": 4,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "ffn_dim": 8,
}
PIXELS = torch.arange(2 * 16 * 16).view(2, 16, 16) % 4
PIXELS = PIXELS.where(PIXELS < 3, 255)

# class, config, batch, what is read, weight
OWN = {
    "classes": (
        "BertForSequenceClassification",
        {**SMALL, "num_labels": 3},
        {"input_ids": TOKENS, "labels": torch.tensor([0, 2, 1])},
        ("softmax", (3, 1, 3), 3),
    ),
    "several labels": (
        "BertForSequenceClassification",
        {**SMALL, "num_labels": 3, "problem_type": "multi_label_classification"},
        {"input_ids": TOKENS, "labels": YES},
        ("sigmoid", (3, 3), 3),
    ),
    "one number": (
        "BertForSequenceClassification",
        {**SMALL, "num_labels": 1},
        {"input_ids": TOKENS, "labels": torch.tensor([0.5, -2.0, 7.0])},
        ("squared", (3, 1), 3),
    ),
    "several numbers": (
        "BertForSequenceClassification",
        {**SMALL, "num_labels": 3, "problem_type": "regression"},
        {"input_ids": TOKENS, "labels": YES * 3 - 1},
        ("squared", (3, 3), 3),
    ),
    "tags": (
        "BertForTokenClassification",
        {**SMALL, "num_labels": 3},
        {"input_ids": TOKENS, "labels": TAGS},
        ("softmax", (3, 6, 3), 8),
    ),
    "masks": (
        "BertForMaskedLM",
        SMALL,
        {"input_ids": TOKENS, "labels": TOKENS.masked_fill(TAGS < 1, -100)},
        ("softmax", (3, 6, 11), 6),
    ),
    "spans": (
        "BertForQuestionAnswering",
        SMALL,
        {"input_ids": TOKENS, "start_positions": ENDS[0], "end_positions": ENDS[1]},
        ("softmax", (3, 2, 6), 3),
    ),
    "next token": (
        "LlamaForCausalLM",
        SMALL,
        {"input_ids": TOKENS, "labels": TOKENS.masked_fill(TAGS < 0, -100)},
        ("softmax", (3, 5, 11), 8),
    ),
    "answers": (
        "T5ForConditionalGeneration",
        SEQ2SEQ,
        {"input_ids": TOKENS, "labels": TAGS.clone()},
        ("softmax", (3, 6, 11), 8),
    ),
    "pixels": (
        "SegformerForSemanticSegmentation",
        {**SEGMENTS, "num_labels": 3},
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16), "labels": PIXELS},
        ("softmax", (2, 256, 3), 384),
    ),
    "forecast": (
        "PatchTSTForPrediction",
        SERIES,
        {
            "past_values": torch.linspace(-3, 9, 48).sin().view(3, 16, 1),
            "future_values": torch.linspace(-1, 1, 12).view(3, 4, 1),
        },
        ("squared", (3, 4), 3),
    ),
}


def make(name, config):
    torch.manual_seed(3)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    for parameter in model.parameters():  # so that logits and losses differ between places
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(("name", "config", "batch", "read"), OWN.values(), ids=OWN)
def test_what_the_own_loss_reads_has_its_value(name, config, batch, read):
    model = make(name, config)
    own = model(**batch).loss
    loss = batch_loss(model, batch)
    assert_close(loss.value, own)
    form, shape, weight = read
    assert (loss.predictions.form, tuple(loss.predictions.values.shape)) == (form, shape)
    assert loss.weight == loss.predictions.weight == weight
    assert_close(loss.predictions.value(), own, relative=1e-5)
    again = batch_loss(model, batch)  # as the first batch told
    assert_close(again.predictions.value(), own, relative=1e-5)


def test_of_two_readings_that_rounding_allows_the_nearest_is_taken():
    """In bfloat16 the next token's loss is within rounding of that of the places."""
    model = make(*OWN["masks"][:2]).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    assert batch_loss(model, OWN["masks"][2]).predictions.values.shape == (3, 6, 11)


@pytest.mark.parametrize("name", ["tags", "masks", "next token", "answers", "pixels", "one number"])
def test_batches_of_uneven_weight_give_the_loss_of_the_whole(name):
    kind, config, batch, _ = OWN[name]
    model = make(kind, config)
    whole = batch_loss(model, batch)
    cuts = [slice(0, 1), slice(1, None)]
    parts = [batch_loss(model, {key: part[cut] for key, part in batch.items()}) for cut in cuts]
    mean = sum(p.value * p.weight for p in parts if p.weight) / sum(p.weight for p in parts)
    assert_close(mean, whole.value, relative=1e-5)


def test_labels_of_which_none_counts_weigh_nothing():
    model = make("BertForTokenClassification", {**SMALL, "num_labels": 3})
    batch = {"input_ids": TOKENS, "labels": torch.full_like(TAGS, -100)}
    assert batch_loss(model, batch).weight == 0
    fine = batch_loss(model, {"input_ids": TOKENS, "labels": TAGS})  # nothing wrong is remembered
    assert fine.predictions.weight == 8


def test_an_own_loss_that_nobody_knows_weighs_its_samples(caplog):
    config = {
        "vocab_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": (8, 8),
        "conv_kernel": (4, 4),
        "conv_stride": (4, 4),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 2,
    }
    model = make("Wav2Vec2ForCTC", config)
    batch = {"input_values": torch.randn(2, 800), "labels": torch.tensor([[1, 2, 3], [4, 5, -100]])}
    loss = batch_loss(model, batch)
    assert (loss.predictions, loss.weight) == (None, 2)
    graph = sosp_hub.trace(model, {"input_values": batch["input_values"]}, outputs="logits")
    able = {name: g for name, g in graph.groups.items() if SospI.can_score(g)}
    found = gauss_newton(model, able, [batch], Protocol())
    assert found.form == "empirical"


class Table(torch.nn.Module):
    """Its own loss is a mean of squares, in a dict."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, features, target=None):
        out = self.out(torch.tanh(self.inner(features)))
        result = {"out": out}
        if target is not None:
            result["loss"] = F.mse_loss(out, target)
        return result


def test_batches_with_any_keys():
    model, batch = Table(), {"features": torch.randn(5, 3), "target": torch.randn(5, 2)}
    own = batch_loss(model, batch)
    assert (own.weight, own.predictions) == (5, None)
    given = batch_loss(
        model, {**batch, "mine": 7}, lambda out, of: F.mse_loss(out["out"], of["target"])
    )
    assert_close(given.value, own.value)
    pair = batch_loss(model, ({"features": batch["features"]}, batch["target"]), _of_out)
    assert_close(pair.value, own.value)
    assert set(forward(model, {"features": batch["features"]})) == {"out"}


def _of_out(outputs, targets):
    return F.mse_loss(outputs["out"], targets)


def test_an_encoder_decoder_gets_its_labels_beside_a_loss_function():
    kind, config, batch, _ = OWN["answers"]
    model = make(kind, config)
    loss = batch_loss(model, batch, lambda out, of: out.logits.square().mean())
    assert loss.value.isfinite()
