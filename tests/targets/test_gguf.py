"""GGUF: one width per layer, read again by gguf's own reader and run by llama.cpp."""

import contextlib

import pytest
import torch
import transformers

from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.errors import CheckpointError, ModelError
from sosp_hub.targets.writers.gguf import filling, to_gguf, with_whole_blocks
from tests.checkpoint import cuts
from tests.checkpoint.test_families import output
from tests.compare import assert_close

gguf = pytest.importorskip("gguf")
TOKENS = torch.arange(3, 13)[None]


def llama(**settings):
    cls, _, cut = cuts.FAMILIES["llama"]
    torch.manual_seed(0)
    model = cls(transformers.LlamaConfig(**{**cuts.GQA, **settings})).eval()
    cut(model)
    return model


def with_llama3_positions():
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    return llama(rope_parameters=rope)


def with_linear_positions():
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
    return llama(rope_parameters=rope, rms_norm_eps=0.05)


def without_attention():
    model = cuts.pruned("llama")
    model.model.layers[1].self_attn = RemovedAttention(layer_idx=1)
    return model


def without_parts_that_llama_cpp_needs(family):
    """The first attention, from which it reads the size of a head, and an MLP beside attention."""
    model = cuts.pruned(family)
    model.model.layers[0].self_attn = RemovedAttention(layer_idx=0)
    model.model.layers[2].mlp = RemovedMlp()
    return model


def without_a_layer():
    """Which llama.cpp leaves out, as it does the first where that has neither."""
    model = without_attention()
    model.model.layers[1].mlp = RemovedMlp()
    return model


def phi3_with_kv_groups():
    """One matrix for query, key and value: its heads stay, with two KV heads for four queries."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **cuts.TEXT, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0
    )
    model = transformers.Phi3ForCausalLM(config).eval()
    cuts.phi3(model)
    return model


MODELS = {
    "llama": lambda: cuts.pruned("llama"),
    "llama3 positions": with_llama3_positions,
    "linear positions": with_linear_positions,
    "removed attention": without_attention,
    "mistral": cuts.mistral_without_window,
    "qwen2": lambda: cuts.pruned("qwen2"),  # tied, with biases
    "phi3": phi3_with_kv_groups,
    "qwen3": lambda: cuts.pruned("qwen3"),
    "llama, parts taken out": lambda: without_parts_that_llama_cpp_needs("llama"),
    "qwen2, parts taken out": lambda: without_parts_that_llama_cpp_needs("qwen2"),
    "qwen3, parts taken out": lambda: without_parts_that_llama_cpp_needs("qwen3"),
    "a layer taken out": without_a_layer,
    "gemma": lambda: cuts.pruned("gemma"),
}
PER_LAYER = [
    "llama",
    "llama3 positions",
    "linear positions",
    "removed attention",
    "mistral",
    "qwen2",
]


def fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("name", PER_LAYER)
def test_the_reader_finds_each_layers_own_size_and_every_weight(name, tmp_path):
    model = MODELS[name]()
    reader = gguf.GGUFReader(to_gguf(model, tmp_path / "small.gguf"))
    found = fields(reader)
    assert found["general.architecture"] == "deci"
    assert found["deci.feed_forward_length"] == [38, 28, 19]
    kv = 0 if name == "removed attention" else 1
    assert found["deci.attention.head_count"] == [4, 2 * kv, 4]
    assert found["deci.attention.head_count_kv"] == [2, kv, 2]
    assert found["deci.vocab_size"] == 96
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    state = model.state_dict()
    for i in range(3):
        for part in ("gate", "up", "down"):
            expected = state[f"model.layers.{i}.mlp.{part}_proj.weight"]
            assert_close(tensors[f"blk.{i}.ffn_{part}.weight"], expected, relative=0)
    expected = state["model.layers.0.self_attn.k_proj.weight"]
    rows = [head * 8 + half * 4 + i for head in range(2) for i in range(4) for half in range(2)]
    assert_close(tensors["blk.0.attn_k.weight"], expected[rows], relative=0)
    assert ("output.weight" in tensors) == (name != "qwen2")


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma"])
def test_zeros_fill_up_rows_until_a_type_packs_them(name, tmp_path):
    """Widths 38, 28 and 19 of 32-value types; a width that is told before it is written."""
    model = MODELS[name]()
    path = to_gguf(model, tmp_path / "q8.gguf", quantization="q8_0", fill=True)
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for i in range(3):
        assert tensors[f"blk.{i}.ffn_down.weight"].tensor_type.name == "Q8_0"
    filled = with_whole_blocks(model, 32)
    tokens = {"input_ids": TOKENS}
    assert_close(output(filled, tokens), output(model, tokens), relative=1e-5)
    own, more = (sum(p.numel() for p in each.parameters()) for each in (model, filled))
    assert filling(model, 32) == (pytest.approx(more / own - 1), "layers 0, 1, 2")
    assert filling(filled, 32) == (0.0, "")


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float64, "F32")])
def test_half_precision_stays_and_double_becomes_float32(dtype, kind, tmp_path):
    model = cuts.pruned("llama").to(dtype)
    reader = gguf.GGUFReader(to_gguf(model, tmp_path / "small.gguf"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind
    assert kinds["blk.0.ffn_norm.weight"] == "F32"


def rotated(x, told, factors):
    """Pairs, turned by the position times a frequency of their own.

    ``deci`` pairs neighbours, ``qwen3`` and ``gemma`` the two halves (llama_model_rope_type).
    """
    size = x.shape[-1]
    frequency = told.get("rope.freq_base", 10000.0) ** (-torch.arange(0, size, 2) / size)
    place = torch.arange(x.shape[0])[:, None, None] / told.get("rope.scaling.factor", 1.0)
    angle = place * frequency / factors
    neighbours = told["architecture"] == "deci"
    even, odd = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)


def read_again(path, tokens):
    """Logits by llama.cpp's rules (src/models/{deci,qwen3,gemma}.cpp of v0.5.0), from the file."""
    reader = gguf.GGUFReader(path)
    told = fields(reader)
    kind = told["general.architecture"]
    told = {name.removeprefix(f"{kind}."): value for name, value in told.items()}
    told["architecture"] = kind
    held = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    if told.get("rope.scaling.type", "linear") != "linear":
        raise AssertionError("other positions than this knows")

    def norm(x, name):
        eps = told["attention.layer_norm_rms_epsilon"]
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * held[f"{name}.weight"]

    def linear(x, name):
        return x @ held[f"{name}.weight"].T + held.get(f"{name}.bias", 0)

    x = held["token_embd.weight"][tokens]
    if kind == "gemma":
        x = x * told["embedding_length"] ** 0.5
    factors = held.get("rope_freqs.weight", torch.ones(1))
    size = told["attention.key_length"]
    counts = [told[f"attention.head_count{which}"] for which in ("", "_kv")]
    assert {type(count) for count in counts} == {list if kind == "deci" else int}
    counts = [each if kind == "deci" else [each] * told["block_count"] for each in counts]
    widths = told["feed_forward_length"]
    widths = widths if kind == "deci" else [widths] * told["block_count"]
    for i, (heads, kv_heads) in enumerate(zip(*counts, strict=True)):
        block = f"blk.{i}"
        if heads and widths[i]:
            y = norm(x, f"{block}.attn_norm")
            q, k, v = (
                linear(y, f"{block}.attn_{kind}").unflatten(-1, (-1, size)) for kind in "qkv"
            )
            if kind == "qwen3":
                q, k = norm(q, f"{block}.attn_q_norm"), norm(k, f"{block}.attn_k_norm")
            q, k = rotated(q, told, factors), rotated(k, told, factors)
            assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, kv_heads, kv_heads)
            k, v = (each.repeat_interleave(heads // kv_heads, 1) for each in (k, v))
            score = torch.einsum("ihd,jhd->hij", q, k) / size**0.5
            score = score.masked_fill(torch.ones_like(score[0]).triu(1).bool(), -torch.inf)
            y = torch.einsum("hij,jhd->ihd", score.softmax(-1), v).flatten(-2)
            x = x + linear(y, f"{block}.attn_output")
        if not widths[i]:  # llama.cpp leaves out such a layer, attention and all
            continue
        y = norm(x, f"{block}.ffn_norm")
        gate, up = linear(y, f"{block}.ffn_gate"), linear(y, f"{block}.ffn_up")
        gelu = torch.nn.functional.gelu(gate, approximate="tanh")
        gated = gelu if kind == "gemma" else gate * gate.sigmoid()
        x = x + linear(gated * up, f"{block}.ffn_down")
    table = "output" if "output.weight" in held else "token_embd"
    return linear(norm(x, "output_norm"), table)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_alone_says_what_the_model_computes(name, tmp_path):
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms of a fresh model hide much
            parameter.add_(0.2 * torch.rand_like(parameter) - 0.1)
    found = read_again(to_gguf(model, tmp_path / "small.gguf"), TOKENS[0])
    expected = output(model, {"input_ids": TOKENS})[0]
    assert_close(found, expected.double(), relative=1e-5)


def test_long_wavelengths_are_stretched_and_short_ones_are_not(tmp_path):
    """Llama 3: what turns in over 16 positions is slowed by 8; under 4 positions by nothing."""
    model = with_llama3_positions()
    reader = gguf.GGUFReader(to_gguf(model, tmp_path / "small.gguf"))
    (factors,) = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    wavelengths = [2 * torch.pi * 10000 ** (2 * i / 8) for i in range(4)]  # 6, 63, 628, 6283
    assert 4 < wavelengths[0] < 16 < wavelengths[1]
    assert 1 < factors[0] < 8
    assert_close(torch.tensor(factors[1:]), torch.full((3,), 8.0))


@contextlib.contextmanager
def llama_cpp_model(path, **options):
    """A file as llama.cpp reads it, below the classes of its Python package."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama_cpp.llama_backend_init()
    chosen = llama_cpp.llama_model_default_params()
    for name, value in options.items():
        setattr(chosen, name, value)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), chosen)
    assert model
    yield llama_cpp, model
    llama_cpp.llama_model_free(model)


def llama_cpp_logits(path, tokens):
    """Logits of every position, from llama.cpp."""
    with llama_cpp_model(path) as (llama_cpp, model):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_threads, options.flash_attn_type = 64, 1, 0
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, options)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        rows = [llama_cpp.llama_get_logits_ith(context, i)[:96] for i in range(len(tokens))]
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    return torch.tensor(rows)


def llama_cpp_tokens(path, text):
    """A text's tokens, from llama.cpp."""
    with llama_cpp_model(path, vocab_only=True) as (llama_cpp, model):
        vocabulary, given = llama_cpp.llama_model_get_vocab(model), text.encode()
        found = (llama_cpp.llama_token * len(given))()
        num = llama_cpp.llama_tokenize(
            vocabulary, given, len(given), found, len(given), False, True
        )
        return found[:num]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path):
    model = MODELS[name]()
    found = llama_cpp_logits(to_gguf(model, tmp_path / "small.gguf"), TOKENS[0].tolist())
    assert_close(found, output(model, {"input_ids": TOKENS})[0], relative=1e-4)


def bpe(pre_tokenizer):
    """A byte-level BPE of 96 tokens."""
    from tokenizers import Tokenizer, decoders, models, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=92, special_tokens=["<|end|>"], show_progress=False)
    core.train_from_iterator(["the cat sat on the mat and the hat"] * 4, trainer)
    core.add_tokens(["<user>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def test_the_tokenizer_goes_along(tmp_path):
    from tokenizers import pre_tokenizers as pre

    split = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = bpe(split)
    path = to_gguf(cuts.pruned("llama"), tmp_path / "small.gguf", tokenizer)
    found = fields(gguf.GGUFReader(path))
    assert found["tokenizer.ggml.pre"] == "smollm"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 96
    for name, number in tokenizer.get_vocab().items():
        assert tokens[number] == name
    assert kinds[tokens.index("<|end|>")] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("<user>")] == gguf.TokenType.USER_DEFINED
    assert kinds[95] == gguf.TokenType.UNUSED
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.merges"]
    with pytest.raises(CheckpointError, match="Whitespace"):
        to_gguf(cuts.pruned("llama"), tmp_path / "other.gguf", bpe(pre.Whitespace()))
    text = "the cat and the hat sat<user>"
    assert llama_cpp_tokens(path, text) == tokenizer.encode(text)


SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""As in the tokenizer.json of Llama 3 and of Qwen2: numbers in threes, numbers digit by digit."""


@pytest.mark.parametrize("name", SPLITS)
def test_the_way_a_text_is_split_has_llama_cpps_name(name, tmp_path):
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    split = pre.Split(Regex(SPLITS[name]), behavior="isolated")
    tokenizer = bpe(pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]))
    path = to_gguf(cuts.pruned("llama"), tmp_path / "small.gguf", tokenizer)
    assert fields(gguf.GGUFReader(path))["tokenizer.ggml.pre"] == name


def untied(family):
    model = cuts.pruned(family)
    model.config.tie_word_embeddings = False
    return model


def partly_rotated(family):
    model = cuts.pruned(family)
    model.config.rope_parameters["partial_rotary_factor"] = 0.5
    return model


def without_any_attention():
    model = cuts.pruned("llama")
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = RemovedAttention(layer_idx=i)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (without_any_attention, CheckpointError, "every layer"),
        (lambda: cuts.pruned("mistral"), CheckpointError, "sliding_window"),
        (lambda: llama(hidden_act="gelu"), CheckpointError, "hidden_act 'gelu'"),
        (
            lambda: llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            CheckpointError,
            "positions of type 'yarn'",
        ),
        (lambda: cuts.pruned("gemma2"), ModelError, "gemma2"),
        (lambda: untied("gemma"), CheckpointError, "tie_word_embeddings False"),
        (lambda: partly_rotated("phi3"), CheckpointError, "partial_rotary_factor 0.5"),
        (lambda: cuts.pruned_timm("test_vit"), ModelError, "VisionTransformer"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(make, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        to_gguf(make(), tmp_path / "small.gguf")
    assert not list(tmp_path.iterdir())
