"""DeciLM: read by the rules of its readers, and computed with plain matrices."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.errors import CheckpointError, ModelError
from sosp_hub.targets.writers.deci import filling, read_width, to_deci
from tests.checkpoint import cuts
from tests.compare import assert_close

TOKENS = torch.arange(3, 13)[None]


def without_attention(*layers):
    model = cuts.pruned("llama")
    for i in layers:
        model.model.layers[i].self_attn = RemovedAttention(layer_idx=i)
    return model


def without_mlp(*layers):
    model = cuts.pruned("llama")
    for i in layers:
        model.model.layers[i].mlp = RemovedMlp()
    return model


def without_a_layer():
    model = without_attention(1)
    model.model.layers[1].mlp = RemovedMlp()
    return model


def with_biases():
    cls, _, cut = cuts.FAMILIES["llama"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**cuts.GQA, attention_bias=True, mlp_bias=True)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    cut(model)
    return model


def fewer_heads(num_heads, num_kv, layers):
    """Layers that keep these KV heads, with the query heads that read them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**cuts.TEXT, "hidden_size": 8 * num_heads, "num_attention_heads": num_heads},
        num_key_value_heads=num_kv,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    shared = num_heads // num_kv
    for i, kept in enumerate(layers):
        attention = model.model.layers[i].self_attn
        kv, query = (
            torch.cat([torch.arange(size * k, size * (k + 1)) for k in kept])
            for size in (8, 8 * shared)
        )
        for name, rows in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
            cuts.keep(getattr(attention, name), out=rows)
        cuts.keep(attention.o_proj, inp=query)
        counts = {"num_attention_heads": shared * len(kept), "num_key_value_heads": len(kept)}
        cuts.own_config(attention, **counts)
        attention.num_key_value_groups = shared
    return model


MODELS = {
    "llama": lambda: cuts.pruned("llama"),
    "biases": with_biases,
    "no attention": lambda: without_attention(1),
    "no attention in layer 0": lambda: without_attention(0),
    "no mlp": lambda: without_mlp(0, 2),
    "a layer of nothing": without_a_layer,
    "KV heads that do not divide": lambda: fewer_heads(9, 3, [[0, 1, 2], [0, 2], [1]]),
    "heads of their own KV": lambda: fewer_heads(4, 4, [[0, 1, 3], [1, 2], [3]]),
    "mistral": cuts.mistral_without_window,
}


def run(folder, tokens):
    """Logits of one text, from the config and the tensors alone, as the readers build them."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = hidden // heads
    x = w["model.embed_tokens.weight"][tokens]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * w[name]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    angles = torch.outer(
        torch.arange(len(tokens)).double(),
        config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size),
    )
    cos, sin = (torch.cat([part, part], -1)[:, None] for part in (angles.cos(), angles.sin()))

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for i, block in enumerate(config["block_configs"]):
        ahead = f"model.layers.{i}"
        if not block["attention"]["no_op"]:
            shared = block["attention"]["n_heads_in_group"]
            assert heads % shared == 0
            h = norm(x, f"{ahead}.input_layernorm.weight")
            q, k, v = (
                linear(h, f"{ahead}.self_attn.{name}_proj").unflatten(-1, (-1, size))
                for name in "qkv"
            )
            assert q.shape[1] == heads
            assert k.shape[1] == heads // shared
            k, v = (part.repeat_interleave(shared, 1) for part in (rotate(k), v))
            scores = torch.einsum("thd,shd->hts", rotate(q), k) / size**0.5
            share = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            mixed = torch.einsum("hts,shd->thd", share, v).flatten(1)
            x = x + linear(mixed, f"{ahead}.self_attn.o_proj")
        if not block["ffn"]["no_op"]:
            h = norm(x, f"{ahead}.post_attention_layernorm.weight")
            gate, up = (linear(h, f"{ahead}.mlp.{name}_proj") for name in ("gate", "up"))
            assert gate.shape[1] == read_width(round(block["ffn"]["ffn_mult"], 6), hidden)
            x = x + linear(F.silu(gate) * up, f"{ahead}.mlp.down_proj")
    x = norm(x, "model.norm.weight")
    return (
        x @ w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T
    )


@pytest.mark.parametrize("name", MODELS)
def test_readers_compute_what_the_model_does(name, tmp_path):
    model = MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folder = to_deci(model, tmp_path / "deci")
    expected = model(input_ids=TOKENS, use_cache=False).logits[0]
    assert_close(run(folder, TOKENS[0]), expected.double(), relative=1e-5)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", MODELS)
def test_mlx_lm_computes_what_the_model_does(name, tmp_path):
    """By its own runtime: ``pip install 'mlx-lm[cpu]'`` where there is none of Apple's chips."""
    core = pytest.importorskip("mlx.core")
    load = pytest.importorskip("mlx_lm.utils").load_model
    model = MODELS[name]()
    folder = sosp_hub.export(model, "mlx", tmp_path / "mlx")
    read, _ = load(folder)
    found = torch.from_numpy(np.array(read(core.array(TOKENS.tolist()))))
    assert_close(found, model(TOKENS).logits, relative=1e-5)


@pytest.mark.parametrize("hidden", [32, 72, 576, 2048, 4096, 8192])
def test_every_width_survives_the_factor(hidden):
    """For widths up to four times the hidden size."""
    from sosp_hub.targets.writers.deci import _block, _Layer

    for width in range(256, 4 * hidden + 256, 256):
        factor = _block(_Layer(0, 0, 0, width, width), 1, hidden)["ffn"]["ffn_mult"]
        read = int(2 * round(factor, 6) * hidden / 3)
        assert -(-read // 256) * 256 == width


def test_a_reader_that_takes_the_config_class_from_the_folder_finds_each_layer(tmp_path):
    folder = to_deci(cuts.pruned("llama"), tmp_path / "deci")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, 4, 2]
    assert [block.ffn.ffn_mult for block in config.block_configs] == [12.0] * 3
    assert not any(block.ffn.no_op for block in config.block_configs)
    config.save_pretrained(tmp_path / "again")
    record = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (
        record["block_configs"] == json.loads((folder / "config.json").read_text())["block_configs"]
    )


def with_a_sliding_window():
    return cuts.pruned("mistral")


def with_heads_of_another_size():
    config = transformers.LlamaConfig(**{**cuts.GQA, "head_dim": 16})
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (with_a_sliding_window, CheckpointError, "attend to everything"),
        (with_heads_of_another_size, CheckpointError, "4 heads of 16 do not fit"),
        (lambda: cuts.pruned("qwen2"), ModelError, "not qwen2"),
        (lambda: cuts.pruned_timm("test_vit"), ModelError, "VisionTransformer; .*onnx"),
    ],
)
def test_what_readers_would_compute_otherwise_is_refused(make, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        to_deci(make(), tmp_path / "deci")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something"):
        to_deci(cuts.pruned("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", MODELS)
def test_what_zeros_add_is_told_before_anything_is_written(name, tmp_path):
    """Without biases, which are left out of the count."""
    model = MODELS[name]()
    share, first = filling(model)
    written = load_file(to_deci(model, tmp_path / "deci") / "model.safetensors")
    numbers = sum(tensor.numel() for key, tensor in written.items() if key.endswith("weight"))
    held = sum(p.numel() for key, p in model.named_parameters() if key.endswith("weight"))
    whole = sum(p.numel() for p in model.parameters())
    gone = "no attention" in name or "nothing" in name  # their norms are not written
    assert abs(numbers - held - share * whole) <= (64 if gone else 1e-6)
    assert first.startswith("layer 0: width 38 to 256") or name not in ("llama", "mistral")
