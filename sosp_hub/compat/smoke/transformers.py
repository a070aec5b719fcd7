"""Smoke tests of `sosp_hub.compat.transformers`, on models of a few thousand parameters."""

import inspect
import tempfile
from typing import Any

import torch
import transformers
from torch import nn

from sosp_hub.compat import transformers as compat
from sosp_hub.compat.smoke import expect, smoke

_SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def _llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**_SIZES, **changes})
    return transformers.LlamaForCausalLM(config).eval()


@smoke("models from which attention was removed: wrong text with padding")
def cache_of_a_model() -> None:
    model, tokens, seen = _llama(), torch.arange(3, 8)[None], []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(compat.find_cache((*args, *kwargs.values())))

    model.model.layers[0].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        whole = model(tokens, use_cache=True)
        first = model(tokens[:, :-1], use_cache=True)
        held = compat.cache_in(first)
        expect(len(held) == 1, f"an output of {sorted(first)} holds the caches {sorted(held)}")
        (cache,) = held.values()
        expect(seen[-1] is cache, "its attention is not handed the cache of the output")
        last = model(tokens[:, -1:], **held, use_cache=True)
    expect(cache.get_seq_length() == 5, f"{cache.get_seq_length()} of 5 tokens in the cache")
    error = (last.logits[:, -1] - whole.logits[:, -1]).abs().max()
    expect(error < 1e-5, f"a cached step is off by {error:.1e}")


@smoke("memory while serving of models with sliding windows")
def windows_of_a_cache() -> None:
    config = transformers.MistralConfig(**_SIZES, sliding_window=4)
    model = transformers.MistralForCausalLM(config).eval()
    for length in (2, 8):
        with torch.no_grad():
            (cache,) = compat.cache_in(model(torch.arange(length)[None], use_cache=True)).values()
        for layer in cache.layers:
            held, told = layer.keys.shape[2], compat.cached_tokens(layer, length)
            expect(held == told, f"of {length} tokens {held} are held, {told} told")


@smoke("loading weights that code fills by the numbers of a config")
def modules_that_are_filled() -> None:
    model = _llama()
    mlp = model.model.layers[0].mlp
    for module in (mlp.up_proj, mlp.down_proj):
        for each in (module, module.weight):
            vars(each).pop(compat.FILLED, None)
        module.weight.data.zero_()
    setattr(mlp.down_proj, compat.FILLED, True)
    model.init_weights()
    expect(bool(mlp.up_proj.weight.any()), "a module that nothing marks is not filled")
    expect(not mlp.down_proj.weight.any(), "a module that is marked is filled anew")


@smoke("refusing a pruned checkpoint that is loaded with random tensors")
def loading_function() -> None:
    seen: list[Any] = []

    def loader(model: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(model, *args, **kwargs)  # pyright: ignore[reportOptionalCall]
        seen.append((compat.takes_other_sizes(args, kwargs), loaded[0]))
        return loaded

    original = compat.get_loader()
    expect(original is not None, "transformers loads weights by another function")
    model = _llama()
    with tempfile.TemporaryDirectory() as folder, _silence():
        model.save_pretrained(folder)
        compat.set_loader(loader)
        try:
            for kwargs in ({}, {"ignore_mismatched_sizes": True, "intermediate_size": 6}):
                type(model).from_pretrained(folder, **kwargs)
        finally:
            compat.set_loader(original)  # type: ignore[arg-type]
    expect(len(seen) == 2, f"it was called {len(seen)} times for two models")
    expect([each for each, _ in seen] == [False, True], "it is not told of ignore_mismatched_sizes")
    expect(not seen[0][1].missing_keys, f"{seen[0][1].missing_keys} missing")
    names = sorted(name for name, _, _ in seen[1][1].mismatched_keys)
    expect(len(names) == 3, f"three tensors of another size are {names}")


@smoke("inspect and misfits: tensors that files rightly lack")
def tied_tensors() -> None:
    names = compat.tied_names(_llama(tie_word_embeddings=True))
    expect(list(names) == ["lm_head.weight"], f"the tied tensors are {list(names)}")


@smoke("loading tiny models with tables that their class computes")
def computed_tensors() -> None:
    config = transformers.MarianConfig(
        vocab_size=8, d_model=4, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=4,
        decoder_ffn_dim=4, encoder_attention_heads=1, decoder_attention_heads=1, pad_token_id=0,
        decoder_start_token_id=0, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    names = {f"model.{side}coder.embed_positions.weight" for side in ("en", "de")}
    told = compat.unstored_names(model)
    expect(told == names, f"a Marian stores all but {sorted(told)}")
    expect(not compat.unstored_names(_llama()), "a Llama computes tensors")
    compat.store_all(model)
    with tempfile.TemporaryDirectory() as folder, _silence():
        model.model.encoder.embed_positions.weight.data.zero_()
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
    expect(not loaded.model.encoder.embed_positions.weight.any(), "stored ones are not loaded")
    expect(bool(loaded.model.decoder.embed_positions.weight.any()), "others are not stored")


@smoke("inspect and misfits of models whose files have other names")
def names_in_files() -> None:
    config = transformers.MixtralConfig(**_SIZES, num_local_experts=2)
    state = compat.as_stored(transformers.MixtralForCausalLM(config))
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    expect(name in state, f"no {name!r} among {sorted(state)}")
    expect("weight" in compat.as_stored(nn.Linear(1, 1)), "models of other libraries")


@smoke("saving: models are built to be compared")
def building_without_random_numbers() -> None:
    before = torch.get_rng_state()
    with compat.no_init_weights():
        _llama()
    expect(torch.equal(before, torch.get_rng_state()), "random numbers are drawn")


@smoke("tasks that fit a model; code that is shipped beside weights")
def auto_classes() -> None:
    auto = transformers.AutoModelForCausalLM
    given = compat.classes_for(auto, transformers.LlamaConfig)
    expect(given == (transformers.LlamaForCausalLM,), f"a Llama is {given}")
    given = compat.classes_for(auto, transformers.ViTConfig)
    expect(given == (), f"a ViT is {given} that writes text")
    names = compat.auto_classes(transformers.LlamaForCausalLM)
    expect("AutoModelForCausalLM" in names, f"a Llama is found as {names}")


@smoke("attention and experts of pruned models run as they were told; ONNX of experts")
def state_of_configs() -> None:
    config = _llama().config
    compat.set_attention(config, "eager")
    expect(compat.attention_of(config) == "eager", "a config's attention is not what was set")
    expect(vars(config).get(compat.ATTENTION_KEY) == "eager", "the choice of attention moved")
    expect(compat.takes_sdpa(_llama()), "a Llama no longer says that it takes fused attention")
    config._experts_implementation = "batched_mm"
    expect(vars(config).get(compat.EXPERTS_KEY) == "batched_mm", "the choice of experts moved")
    expect(vars(config).keys() >= compat.CONFIG_STATE, "names of both moved")


@smoke("uniform=True: numbers of heads that a plain config can say")
def numbers_of_a_config() -> None:
    config = _llama().config
    expect(compat.is_taken(config, {"num_attention_heads": 4}), "a Llama's config refuses 4 heads")
    expect(not compat.is_taken(config, {"num_attention_heads": 3}), "it takes 3 heads for width 8")
    expect(config.num_attention_heads == 2, "asking has changed it")


@smoke("static caches of models whose layers have other numbers of KV heads")
def layers_of_configs() -> None:
    config = _llama(num_key_value_heads=2).config
    if not compat.takes_layers(config):
        return  # an older library, which asks no config about single layers
    heads = [(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers
    fewer = [(1, config.head_dim), *heads[1:]]
    wrong = compat.set_layers(config, {0: {"num_key_value_heads": 1}}, heads)
    expect(not wrong and compat.takes_layers(config), "a config that says other heads is kept")
    expect(compat.set_layers(config, {0: {"num_key_value_heads": 1}}, fewer), "it does not say it")
    expect("per_layer_config" in config.to_dict(), "it is not written")
    record = config.to_dict()
    was_quiet = "per_layer_config" in vars(transformers.PreTrainedConfig)
    compat.quiet_layers()
    try:
        layers = vars(type(config).from_dict(record))["_heterogeneity_spec"]
    finally:
        compat.loud_layers()
        if was_quiet:
            compat.quiet_layers()
    expect(layers.per_layer_attributes == set(), "a config read from a file warns")
    compat.drop_layers(config)
    expect(compat.takes_layers(config), "it cannot be taken out again")
    config.per_layer_config = {0: {"num_key_value_heads": 1}}
    compat.drop_layers(config)
    expect(not compat.takes_layers(config), "entries of its own are taken out")


@smoke("the base model's name in GGUF files")
def origin_of_configs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _llama().config.save_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        expect(compat.name_of(config) == folder, f"read from {compat.name_of(config)!r}")


@smoke("saving cut models that hold adapters")
def adapters() -> None:
    model = _llama()
    expect(not compat.saves_adapters_only(model), "a model without adapters")
    model._hf_peft_config_loaded = True  # what add_adapter sets
    expect(compat.saves_adapters_only(model), "a model with adapters")
    expect("_hf_peft_config_loaded" in inspect.getsource(type(model).save_pretrained), "it moved")


def _silence() -> Any:
    """No report of what is loaded, which the test wants to be odd."""
    import contextlib

    logging = transformers.logging
    stack, before = contextlib.ExitStack(), logging.get_verbosity()
    stack.callback(logging.set_verbosity, before)
    if logging.is_progress_bar_enabled():
        stack.callback(logging.enable_progress_bar)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return stack


@smoke("recipes that begin with random weights")
def models_of_a_config() -> None:
    config = transformers.LlamaConfig(**_SIZES)
    for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        classes = compat.classes_for(cls, type(config))
        expect(classes == (transformers.LlamaForCausalLM,), f"{cls.__name__} gives {classes}")
        model = compat.build(cls, config, torch.bfloat16)
        expect(type(model) is transformers.LlamaForCausalLM, f"built a {type(model).__name__}")
        expect(model.dtype == torch.bfloat16, f"built in {model.dtype}")


@smoke("schedules in a Trainer that goes on from a checkpoint")
def callbacks_with_a_state() -> None:
    stateful: Any = compat.exportable_state()

    class Counting(transformers.TrainerCallback, stateful):
        def __init__(self, number: int = 0) -> None:
            self.number = number

        def state(self) -> dict[str, Any]:
            return {"args": {"number": self.number}, "attributes": {}}

    state = transformers.TrainerState(stateful_callbacks=[Counting(3)])
    states: Any = state.stateful_callbacks
    kept = states.get("Counting")
    expect(kept == Counting(3).state(), f"a trainer's state keeps {kept}")
