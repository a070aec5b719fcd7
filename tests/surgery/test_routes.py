"""A cut model is right in every way that the model can be run, not only as it was traced."""

import copy
import dataclasses
import functools
import itertools
import logging
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers as tf
from torch import nn

import sosp_hub
from sosp_hub.errors import VerificationError
from sosp_hub.structure import routes
from sosp_hub.structure.trace import trace
from sosp_hub.surgery import apply as surgery
from sosp_hub.surgery.apply import apply, cut
from sosp_hub.surgery.carry import carrying
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, half, plan_of, run

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96,
}  # fmt: skip
LANGUAGE = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16)
    ),
}


SHORT = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(samples=2, length=9):
    return torch.randint(0, 96, (samples, length), generator=torch.Generator().manual_seed(0))


def padded():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids(), "attention_mask": mask}


@pytest.mark.parametrize("verify", ["thorough", "fast"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_fewer_heads_for_each_key_head_are_right_in_every_use(name, verify):
    torch.manual_seed(0)
    model = fill(LANGUAGE[name]().eval())
    graph = trace(model, {"input_ids": ids()}, outputs="logits")
    heads = [name for name, group in graph.groups.items() if group.kind == "head"]
    plan = plan_of(graph, dict.fromkeys(heads, (0, 3)))
    pruned = apply(model, graph, plan, verify=verify)
    assert pruned.model.layers[0].self_attn.num_key_value_groups == 2
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        pruned.set_attn_implementation(attention)
        for inputs in (padded(), {"input_ids": ids(3, 7)}, {"input_ids": ids(1, 2)}):
            other = dataclasses.replace(graph, example_inputs=inputs)
            found, expected = run(pruned, other)[0], gated(model, other, plan)[0]
            told = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            assert_close(found[told], expected[told])
    texts = [pruned.generate(**padded(), use_cache=cache, **SHORT) for cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("name", LANGUAGE)
def test_fast_runs_a_small_model_no_more_often_than_thorough(name, layers, monkeypatch):
    model = fill(LANGUAGE[name]().eval())
    calls, forward = itertools.count(), type(model).forward  # a list would be set back

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        next(calls)
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    number = {}
    for verify in ("thorough", "fast"):
        graph = trace(model, {"input_ids": ids()}, outputs="logits")
        plan = half(graph, lambda group: layers or group.kind != "layer")
        before = next(calls)
        apply(model, graph, plan, verify=verify, strict=True)
        number[verify] = next(calls) - before
    assert 1 < number["fast"] <= number["thorough"]


class Heads(nn.Module):
    """What is fused reads the width of a head; what is not, their number, and for one sample."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
        self.dim, self.heads = 4, 12 // 4
        self.fused_attn = True

    def forward(self, x):
        h = self.up(x)
        if self.fused_attn and len(x) > 1:
            h = h.view(*x.shape[:-1], -1, self.dim)
        else:
            h = h.view(*x.shape[:-1], self.heads, -1)
        return self.down(h.softmax(1).flatten(-2))


class Literal(Heads):
    """Not fused, it has its sizes written into the code."""

    def forward(self, x):
        if self.fused_attn:
            return super().forward(x)
        return self.down(self.up(x).view(2, 4, 3, 4).softmax(1).flatten(-2))


class OnlyTwo(Heads):
    def forward(self, x):
        if len(x) != 2:
            raise ValueError("two samples, no more, no less")
        return super().forward(x)


class NoNumbers(Heads):
    """What is not fused divides by nothing, as a softmax over masked places alone does."""

    def forward(self, x):
        return super().forward(x) if self.fused_attn else super().forward(x) * float("nan")


class Masked(Heads):
    """Some outputs are masked by infinity, some are no numbers."""

    def forward(self, x):
        out = super().forward(x)
        out[..., 0], out[..., 1] = -float("inf"), float("nan")
        return out


class Nothing(Heads):
    def forward(self, x):
        return super().forward(x) * float("nan")


def heads_of(graph):
    return next(name for name, group in graph.groups.items() if group.size == 3)


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_an_attribute_that_only_another_way_reads_follows(verify):
    model, x = fill(Heads().eval()), torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    plan = plan_of(graph, {heads_of(graph): (0, 2)})
    pruned = apply(model, graph, plan, verify=verify)
    expected = gated(model, graph, plan)[0]
    assert_close(pruned(x), expected)
    assert_close(pruned(x[:1]), expected[:1])
    pruned.fused_attn = False
    assert_close(pruned(x), expected)
    assert pruned.heads == 2
    assert model.heads == 3


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_way_that_a_cut_breaks_is_told(verify):
    model, x = fill(Literal().eval()), torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    with pytest.raises(VerificationError, match="with eager attention") as caught:
        apply(model, graph, plan_of(graph, {heads_of(graph): (0, 2)}), verify=verify, strict=True)
    assert caught.value.groups == (heads_of(graph),)


def test_what_a_model_does_not_do_is_told_and_the_rest_checked(caplog):
    model, x = fill(OnlyTwo().eval()), torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    with caplog.at_level(logging.INFO, logger="sosp_hub"):
        pruned = apply(model, graph, plan_of(graph, {heads_of(graph): (0, 2)}))
    assert "two samples" in graph.routes.unchecked["another batch size"]
    assert "another batch size is not checked" in caplog.text
    assert [route.name for route in graph.routes.known] == ["eager attention"]
    pruned.fused_attn = False
    assert pruned(x).shape == x.shape


class Auxiliary(nn.Module):
    """A second head that runs in training only, and a layer that nothing runs."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.aux, self.aux_head = nn.Linear(8, 6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.5)
        self.left_over = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.body(x).relu())
        if not self.training:
            return self.head(x)
        return self.head(x), self.aux_head(self.aux(self.dropout(x)).relu())


def test_a_way_in_which_the_model_gives_no_numbers_is_told():
    model, x = fill(NoNumbers().eval()), torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    plan = plan_of(graph, {heads_of(graph): (0, 2)})
    assert_close(apply(model, graph, plan, strict=True)(x), gated(model, graph, plan)[0])
    told = {way: why for way, why in graph.routes.unchecked.items() if "eager" in way}
    assert [*told.values()] == ["the model itself gives no finite number"]


@pytest.mark.parametrize("wrong", ["", "a number", "what is infinite", "what is no number"])
def test_finite_outputs_beside_infinite_ones_are_compared(wrong, monkeypatch):
    model, x = fill(Masked().eval()), torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    plan = plan_of(graph, {heads_of(graph): (0, 2)})
    if not wrong:
        found = apply(model, graph, plan, strict=True)(x)
        return assert_close(found[..., 2:], gated(model, graph, plan)[0][..., 2:])

    def cut_wrongly(*args):
        pruned = cut(*args)
        if wrong != "a number":
            odd = torch.isinf if wrong == "what is infinite" else torch.isnan
            pruned.register_forward_hook(lambda *run: run[-1].masked_fill(odd(run[-1]), 0.0))
            return pruned
        bias = pruned.down.bias.detach().clone()
        bias[2] += 1
        pruned.down.bias = nn.Parameter(bias)
        return pruned

    monkeypatch.setattr(surgery, "cut", cut_wrongly)
    with pytest.raises(VerificationError, match="differ from the masked model's"):
        apply(model, graph, plan, strict=True)
    return None


def test_a_model_that_gives_no_numbers_at_all_is_told_apart_from_a_wrong_cut():
    model, x = fill(Nothing().eval()), torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    with pytest.raises(VerificationError, match="Nothing itself returns no finite number"):
        apply(model, graph, plan_of(graph, {heads_of(graph): (0, 2)}))


def test_heads_of_training_are_cut_with_what_they_read():
    torch.manual_seed(0)
    model, x = fill(Auxiliary().eval()), torch.randn(6, 5)
    graph = trace(model, (x,))
    assert graph.only_in_training == ("aux", "aux_head")
    assert graph.never_used == ("left_over",)
    assert "only training uses: aux, aux_head\nnothing uses: left_over" in graph.describe()
    assert sorted(group.size for group in graph.groups.values()) == [6, 8]
    pruned = apply(model, graph, half(graph))
    assert pruned.left_over.weight.shape == (2, 8)
    kept, inner = (half(graph).kept[name] for name in graph.groups)
    masked = copy.deepcopy(model).train()
    for layer, mask in ((masked.head, kept), (masked.aux, kept), (masked.aux_head, inner)):
        gone = [i for i in range(layer.weight.shape[1]) if i not in mask]
        layer.weight.data[:, gone] = 0
    masked.dropout.p = pruned.dropout.p = 0.0
    assert_close(pruned.train()(x), masked(x))


class Dropping(nn.Module):
    """A layer that drops by a number of its own, as attention does."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(6, 8), nn.Linear(8, 6), 0.5

    def forward(self, x):
        inner = nn.functional.dropout(self.up(x).relu(), self.dropout, self.training)
        return x + self.down(inner)


class Masking(nn.Module):
    """In training an embedding stands where something is hidden, as in Wav2Vec2."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.Sequential(*(Dropping() for _ in range(3))), nn.Linear(6, 2)
        self.hidden = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = torch.cat([self.hidden.expand_as(x[:, :1]), x[:, 1:]], 1) if self.training else x
        return self.head(self.layers(x))


def test_what_fewer_layers_drop_in_training_is_no_fault():
    model = fill(Masking().eval())
    graph = trace(model, (torch.randn(2, 4, 6),))
    assert graph.only_in_training
    apply(model, graph, plan_of(graph, {"layers:layer": (1, 2)}), strict=True)


def test_a_wrong_head_of_training_is_noticed(monkeypatch):
    from sosp_hub.surgery import apply as surgery

    model, x = fill(Auxiliary().eval()), torch.randn(6, 5)
    graph = trace(model, (x,))
    name = next(name for name, group in graph.groups.items() if group.size == 8)
    plan = plan_of(graph, {name: (4, 5, 6, 7)})
    apply(model, graph, plan)
    right = surgery.rewrite

    def wrong(pruned, *args):
        right(pruned, *args)
        pruned.aux.weight.data = pruned.aux.weight.data.flip(1)

    monkeypatch.setattr(surgery, "rewrite", wrong)
    with pytest.raises(VerificationError, match="training"):
        apply(model, graph, plan, strict=True)


def set_fused(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def narrow_heads(model, x):
    """The graph, and a plan with half of the width of all heads."""
    graph = trace(model, (x,))
    names = {name for name, group in graph.groups.items() if group.kind == "head_dim"}
    names = names.union(*(tie for tie in graph.ties if names & {*tie}))
    assert names
    return graph, plan_of(graph, {name: range(0, graph.groups[name].size, 2) for name in names})


IMAGE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
"""Heads of 12: 1/sqrt(12) is like no other number in these models."""
WINDOWS = {
    "img_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 24, "num_heads": (2, 4),
    "depths": (2, 2),
}  # fmt: skip
FUSED = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, **IMAGE),
    "deit3": lambda: timm.create_model("deit3_small_patch16_224", num_classes=5, **IMAGE),
    "beit": lambda: timm.create_model("beitv2_base_patch16_224", num_classes=5, **IMAGE),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **WINDOWS),
    "cait": lambda: timm.create_model("cait_xxs24_224", num_classes=5, **IMAGE),
}


@pytest.mark.parametrize("traced_fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("verify", ["thorough", "fast"])
@pytest.mark.parametrize("name", FUSED)
def test_narrower_heads_are_scaled_alike_fused_or_not(name, verify, traced_fused, tmp_path):
    torch.manual_seed(0)
    model, x = set_fused(fill(FUSED[name]().eval()), True), torch.randn(2, 3, 16, 16)
    assert_close(set_fused(copy.deepcopy(model), False)(x), model(x))
    graph, plan = narrow_heads(set_fused(model, traced_fused), x)
    assert not all(graph.groups[name].exact for name in plan.kept)  # gates do not scale
    pruned = apply(model, graph, plan, verify=verify, strict=True)
    expected = set_fused(copy.deepcopy(pruned), True)(x)  # by 1/sqrt of the width that is left
    assert_close(set_fused(copy.deepcopy(pruned), False)(x), expected)
    sosp_hub.save_pretrained(pruned, tmp_path)
    loaded = sosp_hub.from_pretrained(tmp_path)
    for fused in (True, False):
        assert_close(set_fused(loaded, fused)(x), expected)


def test_an_average_that_follows_the_cut_is_scaled_as_the_cut_model():
    """Schedules prepare what follows a cut before they cut."""
    model, x = set_fused(fill(FUSED["vit"]().eval()), False), torch.randn(2, 3, 16, 16)
    graph, plan = narrow_heads(model, x)
    average = copy.deepcopy(model)
    follow = carrying(average, graph, plan)
    pruned = apply(model, graph, plan, verify="fast")
    follow(pruned)
    assert_close(average(x), pruned(x))
    assert average.blocks[0].attn.scale == pruned.blocks[0].attn.scale == 6**-0.5


class Mean(nn.Module):
    """What is not fused keeps a width as a number that no trace can follow."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
        self.fused_attn, self.width = True, 12.0

    def forward(self, x):
        h = self.up(x)
        mean = h.mean(-1) if self.fused_attn else h.sum(-1) / self.width
        return self.down(h - mean[:, None])


def test_outputs_that_come_to_depend_on_the_way_are_told():
    model, x = fill(Mean().eval()), torch.randn(2, 5)
    graph = trace(model, (x,))
    (name,) = graph.groups
    assert not graph.groups[name].exact
    with pytest.raises(VerificationError, match="with eager attention") as caught:
        apply(model, graph, plan_of(graph, {name: range(6)}), strict=True)
    assert caught.value.groups == (name,)


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
BERT = tf.BertConfig(**SMALL, intermediate_size=16)
TRACES = {
    "llama": (LANGUAGE["llama"], 1),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, bos_token_id=1)), 0),
    "bert": (lambda: tf.BertForSequenceClassification(BERT), 0),
}


class Rounded(tf.LlamaForCausalLM):
    """In its outputs the last digits of float32 are the first."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = (3000 * out.logits).sin()
        return out


def test_ways_that_differ_by_rounding_are_compared_in_double_precision():
    torch.manual_seed(0)
    model = fill(Rounded(tf.LlamaConfig(**SIZES)).eval())
    graph = trace(model, {"input_ids": ids()}, outputs="logits")
    outputs = []
    with torch.no_grad():
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            outputs.append(model(ids()).logits)
    model.set_attn_implementation("sdpa")
    apart = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    assert 1e-4 < apart < 1e-2
    neurons = [name for name, group in graph.groups.items() if group.kind == "neuron"]
    pruned = apply(model, graph, plan_of(graph, dict.fromkeys(neurons, tuple(range(7)))))
    assert pruned.model.layers[0].mlp.up_proj.out_features == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACES)
def test_other_ways_are_traced_only_where_they_read_what_was_not_read(name, monkeypatch):
    """Each trace costs more than all passes of a small model together."""
    build, expected = TRACES[name]
    model, traced = fill(build().eval()), []
    graph = trace(model, {"input_ids": ids()}, outputs="logits")
    monkeypatch.setattr(routes, "trace", lambda *a, **k: traced.append(a) or trace(*a, **k))
    apply(model, graph, half(graph))
    apply(model, graph, half(graph))
    assert len(traced) == expected
    assert not graph.routes.unchecked


def test_inputs_too_short_for_a_way_are_told(caplog):
    model = fill(LANGUAGE["llama"]().eval())
    graph = trace(model, {"input_ids": ids(2, 4)}, outputs="logits")
    with caplog.at_level(logging.INFO, logger="sosp_hub"):
        apply(model, graph, half(graph))
    told = ["another length", "a padded batch", "a cached step"]
    assert list(graph.routes.unchecked) == told
    for name in told:
        assert f"{name} is not checked: inputs of 4 tokens; 5 are needed" in caplog.text


class Loss(nn.Module):
    """One number for all samples; what is not fused reads the number of heads."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 16), nn.Linear(16, 5)
        self.dim, self.heads, self.fused_attn = 4, 4, True

    def forward(self, x):
        sizes = (-1, self.dim) if self.fused_attn else (self.heads, -1)
        h = self.up(x).view(len(x), *sizes).softmax(1).flatten(1)
        return (self.down(h) - x).square().mean()


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_model_that_gives_no_number_per_sample_is_right_in_every_use(verify):
    """A loss with another batch is another loss, so outputs tell nothing of other ways."""
    model, x = fill(Loss().eval()), torch.randn(3, 5)
    graph = trace(model, (x,))
    name = next(name for name, group in graph.groups.items() if group.size == 4)
    assert not graph.groups[name].exact
    pruned = apply(model, graph, plan_of(graph, {name: (0, 2)}), verify=verify)
    expected = pruned(x)
    pruned.fused_attn = False
    assert_close(pruned(x), expected)
    assert pruned.heads == 2


class Padding(nn.Module):
    """Where a token is padding it reads the number of heads, else their width."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(96, 5)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
        self.dim, self.heads = 4, 12 // 4

    def forward(self, input_ids, attention_mask):
        h = self.up(self.words(input_ids))
        sizes = (-1, self.dim) if attention_mask.all() else (self.heads, -1)
        return self.down(h.view(*h.shape[:-1], *sizes).softmax(-1).flatten(-2))


def test_what_only_a_padded_batch_reads_follows():
    model, whole = fill(Padding().eval()), torch.ones(2, 9, dtype=torch.long)
    graph = trace(model, {"input_ids": ids(), "attention_mask": whole})
    pruned = apply(model, graph, plan_of(graph, {heads_of(graph): (0, 2)}))
    assert "a padded batch" not in graph.routes.unchecked
    assert_close(pruned(**padded()), pruned(ids(), whole))


class Decoder(nn.Module):
    """From a cache it reads the number of heads, else their width."""

    def __init__(self, keeps=True):
        super().__init__()
        self.config = SimpleNamespace(use_cache=True, is_encoder_decoder=True)
        self.keeps = keeps
        self.words = nn.Embedding(9, 5)
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 5)
        self.dim, self.heads = 4, 12 // 4

    def forward(self, input_ids, decoder_input_ids, cache=None, use_cache=False):
        read = self.words(input_ids)
        h = self.up(self.words(decoder_input_ids) + read.mean(1, keepdim=True))
        sizes = (-1, self.dim) if cache is None else (self.heads, -1)
        logits = self.down(h.view(*h.shape[:-1], *sizes).softmax(-1).flatten(-2))
        kept = {"cache": (read,)} if use_cache and self.keeps else {}
        return {"logits": logits, "encoder_states": read, **kept}


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_decoder_continues_from_its_cache(verify):
    model = fill(Decoder().eval())
    given = {"input_ids": ids(length=3) % 9, "decoder_input_ids": ids(length=4) % 9}
    graph = trace(model, given, outputs="logits")
    pruned = apply(model, graph, plan_of(graph, {heads_of(graph): (0, 2)}), verify=verify)
    assert pruned.heads == 2
    assert "a cached step of the decoder" not in graph.routes.unchecked


def test_that_a_model_keeps_no_cache_is_said_in_words():
    model = fill(Decoder(keeps=False).eval())
    given = {"input_ids": ids(length=3) % 9, "decoder_input_ids": ids(length=4) % 9}
    graph = trace(model, given, outputs="logits")
    apply(model, graph, plan_of(graph, {heads_of(graph): (0, 2)}))
    told = graph.routes.unchecked["a cached step of the decoder"]
    assert told == "the model returns no 'cache' for use_cache=True"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_loaded_mixture_with_fewer_heads_is_right_in_every_use(name, tmp_path):
    torch.manual_seed(0)
    model = fill(LANGUAGE[name]().eval())
    graph = trace(model, {"input_ids": ids()}, outputs="logits")
    pruned = apply(model, graph, half(graph), verify="fast").eval()
    sosp_hub.save_pretrained(pruned, tmp_path)
    loaded = sosp_hub.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.num_key_value_groups == 2
    for attention in ("sdpa", "eager"):
        pruned.set_attn_implementation(attention)
        loaded.set_attn_implementation(attention)
        for inputs in (padded(), {"input_ids": ids(3, 7)}):
            assert_close(loaded(**inputs).logits, pruned(**inputs).logits, relative=1e-6)
        texts = [each.generate(**padded(), **SHORT) for each in (loaded, pruned)]
        assert torch.equal(*texts)


def test_one_run_of_all_ways_is_compared_with_the_traced_inputs():
    """Three samples of seven tokens for two of nine; the first lacks two more."""
    plain = torch.randn(2, 9, 4)
    inputs = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}
    way = routes.Run("all", nn.Identity(), inputs, samples=[0, 1, 0], padded=True, shorter=True)
    right = plain[[0, 1, 0], :7].clone()
    right[0, 5:] = 0  # what is computed for padding
    for found in (right, routes.Calls((right[:, :6], right[:, 6:]))):
        assert all(torch.equal(*pair) for pair in routes.alike([way], [found], plain))
    for place in ((0, 0), (0, 4), (1, 0), (1, 6), (2, 0), (2, 6)):
        wrong = right.clone()
        wrong[place] += 1
        assert not all(torch.equal(*pair) for pair in routes.alike([way], [wrong], plain)), place
