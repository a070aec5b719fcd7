"""Adapters that are merged, checkpointed gradients, training by tokens."""

import contextlib
import copy
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import LlamaConfig, LlamaForCausalLM

import sosp_hub
from sosp_hub.data.split import Split
from sosp_hub.data.texts import WindowSplit
from sosp_hub.errors import DataError, ModelError
from sosp_hub.recipe.schema import FinetuneSection, LoraSection
from sosp_hub.recovery.adapters import adapted, checkpointed
from sosp_hub.recovery.recover import recover
from tests.compare import assert_close

pytestmark = pytest.mark.slow


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def cut_llama():
    model, ids = llama(), torch.arange(16).reshape(2, 8)
    inputs = {"input_ids": ids, "use_cache": False}
    graph = sosp_hub.trace(model, inputs)
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    return sosp_hub.apply(model, graph, sosp_hub.allocate(graph, scores, params=0.8))


def windows(num=48, length=8):
    return WindowSplit((7 * torch.arange(num)[:, None] + torch.arange(length)) % 40)


def config(**keys):
    return FinetuneSection(
        **{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "held_out": 0.25, **keys}
    )


def state_of(model):
    """Attributes and hooks of all modules."""
    modules = list(model.modules())
    return [vars(each).copy() for each in modules], [dict(each._forward_hooks) for each in modules]


def test_a_model_that_computes_activations_again_goes_on_so():
    for model in (llama(), timm.create_model("resnet18")):
        for on in (False, True):
            if on and hasattr(model, "set_grad_checkpointing"):
                model.set_grad_checkpointing(True)
            elif on:
                enable = getattr(model, "activation_checkpointing_enable", None)  # from 5.24 on
                (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            before = state_of(model)
            with checkpointed(model, True):
                assert state_of(model) != before or on
            assert state_of(model) == before


def test_merged_adapters_compute_what_adapters_computed():
    model, ids = cut_llama(), torch.arange(24).reshape(3, 8)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    before = model(ids).logits
    seen = {}
    with adapted(model, LoraSection(rank=4), seed=0):
        assert_close(model(ids).logits, before, relative=1e-6)  # they begin with no effect
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
        assert not any("lm_head" in name for name in trained)  # tied to the embedding
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        seen["with"] = model(ids).logits
    assert_close(model(ids).logits, seen["with"], relative=1e-5)
    assert (seen["with"] - before).abs().max() > 1e-3
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.requires_grad for p in model.parameters())
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model, "peft_config")


def test_a_training_of_adapters_is_saved_like_any_other(tmp_path):
    model = cut_llama()
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    norm = model.model.norm.weight.clone()
    found = recover(model, windows(), config(lora=LoraSection(rank=2)))
    assert found.selected.epoch > 0
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)
    assert torch.equal(model.model.norm.weight, norm)  # only what has adapters
    sosp_hub.save_pretrained(model, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(tmp_path / "small")
    ids = torch.arange(8)[None]
    assert_close(loaded(ids).logits, model(ids).logits, relative=1e-5)


def test_after_an_exception_the_model_is_as_it_was():
    model, ids = llama(), torch.arange(8)[None]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), adapted(model, LoraSection(), seed=0):  # noqa: PT012
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        raise KeyboardInterrupt
    assert_close(model.state_dict(), before, relative=0)
    assert model(ids).logits.isfinite().all()


def test_what_was_frozen_is_so_after_adapters_too():
    for error in (False, True):
        model = llama()
        model.model.layers[0].requires_grad_(False)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert len(set(before.values())) == 2
        with contextlib.suppress(KeyboardInterrupt), adapted(model, LoraSection(), seed=0):
            if error:
                raise KeyboardInterrupt
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_rank_alpha_and_dropout_are_those_of_the_recipe():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4)
    before = model(x)
    with adapted(model, LoraSection(rank=2, alpha=6, dropout=0.5), seed=0), torch.no_grad():
        (down,) = [p for name, p in model.named_parameters() if "lora_A" in name]
        (up,) = [p for name, p in model.named_parameters() if "lora_B" in name]
        up.normal_()
        assert (down.shape, up.shape) == ((2, 4), (3, 2))
        expected = before + 6 / 2 * x @ down.T @ up.T
        assert_close(model.eval()(x), expected, relative=1e-5)
        assert not torch.equal(model.train()(x), model(x))
    assert_close(model.eval()(x), expected, relative=1e-5)


def test_adapters_begin_as_their_seed_says_and_leave_the_random_numbers():
    starts = []
    for noise, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(noise)
        model, before = nn.Sequential(nn.Linear(4, 3)), torch.get_rng_state()
        with adapted(model, LoraSection(rank=2), seed=seed):
            assert torch.equal(torch.get_rng_state(), before)
            (start,) = [p for name, p in model.named_parameters() if "lora_A" in name]
            starts.append(start.detach().clone())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm], ids=["weight", "spectral"])
def test_weights_that_are_computed_have_none(norm):
    """There is nothing that an adapter could be merged into."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), norm(nn.Linear(5, 2))).eval()
    with adapted(model, LoraSection(rank=2), seed=0):
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".lora_")[0] for name in trained} == {"0"}


NESTED = {
    "an activation": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 2))
    ),
    "a depthwise convolution": lambda: nn.Sequential(
        nn.Conv2d(4, 9, 1), nn.Sequential(nn.Conv2d(9, 9, 1, groups=9), nn.Conv2d(9, 2, 1))
    ),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(("modules", "expected"), [(None, {"0", "1.1"}), (("0",), {"0"})])
def test_a_layer_that_ends_like_one_with_an_adapter_has_none(kind, modules, expected):
    """Its name is another one: 1.0 is not 0."""
    model = NESTED[kind]().eval()
    with adapted(model, LoraSection(rank=2, modules=modules), seed=0):
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".lora_")[0] for name in trained} == expected


def test_convolutions_have_adapters_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).eval()
    x = torch.randn(2, 3, 12, 12)
    before = model(x)
    with adapted(model, LoraSection(modules=("2",)), seed=0), torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        expected = model(x)
    assert (expected - before).abs().max() > 0.05
    assert_close(model(x), expected, relative=1e-4)


@pytest.mark.parametrize("name", ["nothing", "proj"])
def test_names_that_fit_nothing_are_refused(name):
    """What is only the end of a word is no name."""
    with (
        pytest.raises(ModelError, match=rf"\['{name}'\] fits no linear layer.*q_proj"),
        adapted(llama(), LoraSection(modules=(name,)), seed=0),
    ):
        pass


@pytest.mark.parametrize("make", [cut_llama, lambda: timm.create_model("test_resnet")])
def test_checkpointed_gradients_are_the_same(make):
    torch.manual_seed(0)
    models = make().train(), make().train()
    models[1].load_state_dict(models[0].state_dict())
    is_text = isinstance(models[0], LlamaForCausalLM)
    x = torch.arange(16).reshape(2, 8) if is_text else torch.randn(2, 3, 64, 64)
    for model, wanted in zip(models, (False, True), strict=True):
        with checkpointed(model, wanted):
            output = model(x)
            (output.logits if is_text else output).square().mean().backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        if one.grad is not None:
            assert_close(other.grad, one.grad, relative=1e-4)


def test_a_model_that_cannot_checkpoint_is_refused():
    with pytest.raises(ModelError, match="a Linear cannot"), checkpointed(nn.Linear(2, 2), True):
        pass


@pytest.mark.parametrize(("tokens", "steps"), [(64, 1), (65, 2), (320, 5), ("0.5k", 8)])
def test_a_training_by_tokens_ends_with_them(tokens, steps):
    """Windows of 8 tokens in batches of 8; an epoch of 36 windows has 4 steps."""
    found = recover(cut_llama(), windows(), config(tokens=tokens, epochs=1))
    assert found.history[-1]["step"] == steps
    assert found.num_samples == 8 * steps
    assert found.num_tokens == 64 * steps
    assert found.selected.losses[-1][0] == pytest.approx(steps / 4)


def test_images_have_no_tokens():
    class Points(Split):
        num_labels, class_names = 2, ("a", "b")

        def __len__(self):
            return 16

        def __getitems__(self, indices):
            return torch.zeros(len(indices), 2), torch.zeros(len(indices), dtype=torch.long)

    with pytest.raises(DataError, match="only texts have tokens"):
        recover(nn.Linear(2, 2), Points(), config(tokens=100))


@pytest.mark.parametrize("tokens", ["50m", "-1", 0, "many"])
def test_tokens_that_are_none(tokens):
    with pytest.raises(ValueError, match="tokens"):
        config(tokens=tokens)


def test_an_optimizer_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ModelError, match="adamw_8bit needs bitsandbytes"):
        recover(cut_llama(), windows(), config(optimizer="adamw_8bit"))


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes
def test_an_optimizer_of_8_bits_trains():
    pytest.importorskip("bitsandbytes")
    model = cut_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = recover(model, windows(), config(optimizer="adamw_8bit", epochs=4)).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
