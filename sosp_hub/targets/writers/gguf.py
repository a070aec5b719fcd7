"""A pruned Llama-like model as a GGUF file, which llama.cpp runs without this package.

The architecture ``deci`` of llama.cpp takes one number of heads, KV heads and neurons for each
layer (``llama`` takes one for all); otherwise it computes what ``llama`` does. What it does not
compute, such as a norm of the queries, has an architecture with one size for all layers: zeros fill
up the narrow ones.
"""

import copy
import importlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.compat.transformers import name_of
from sosp_hub.errors import CheckpointError, ModelError
from sosp_hub.targets.writers.padded import filling as fill_up
from sosp_hub.targets.writers.padded import padded

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class _Form:
    """What llama.cpp computes for a family (``src/models/*.cpp``, ``conversion/*.py``, v0.5.0).

    Attributes:
        architecture: Its name there.
        activation: Of the gated MLP.
        in_pairs: Whether a rotation turns neighbours, instead of the two halves of a head.
        norms_add_one: Whether the model adds 1 to the weights of its norms, and llama.cpp does not.
    """

    architecture: str = "deci"
    activation: str = "silu"
    in_pairs: bool = True
    norms_add_one: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether each layer has sizes of its own."""
        return self.architecture == "deci"


_FORMS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3"), _Form()),
    "qwen3": _Form("qwen3", in_pairs=False),
    "gemma": _Form("gemma", "gelu_pytorch_tanh", in_pairs=False, norms_add_one=True),
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
"""Names that llama.cpp gives to ways of splitting a text (``llama-vocab.cpp``)."""


def to_gguf(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    *,
    quantization: str | None = None,
    fill: bool = False,
) -> Path:
    """Writes a GGUF file (needs the package ``gguf``).

    Matrices keep the model's dtype unless they are quantised, vectors are float32.

    Args:
        model: A pruned causal language model of the families Llama, Mistral, Qwen2, Qwen3, Gemma
            and Phi-3.
        path: The file, by convention ``.gguf``.
        tokenizer: The model's fast tokenizer, a byte-level BPE. Without it the file has no
            vocabulary and takes token numbers alone.
        quantization: Type of the matrices, such as ``q8_0``; one whose rows it cannot pack is
            float16. K-quants such as ``q4_k_m`` are llama.cpp's own mixtures, which its Python
            package ``llama_cpp`` makes. None = the model's own.
        fill: Zeros fill up the neurons of each layer until the type can pack their rows.

    Raises:
        ModelError: A model of another family.
        CheckpointError: The package is missing, or llama.cpp has no form for a layer or tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF: {error}; pip install gguf") from error
    form = check(model)
    if quantization is not None and "_k" in quantization:
        with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
            model = with_whole_blocks(model, 256) if fill else model
            plain = to_gguf(model, Path(folder) / "plain.gguf", tokenizer)
            return _quantised_by_llama_cpp(plain, Path(path), quantization)
    if not form.per_layer:
        model = padded(model)
    if fill and quantization is not None:
        model = with_whole_blocks(model, 32)
    arrays = dict(_tensors(model, form))
    writer = gguf.GGUFWriter(str(path), form.architecture)
    _describe(writer, model, form)
    _add_tokenizer(writer, model, tokenizer)
    for name, tensor in arrays.items():
        kind = gguf.GGMLQuantizationType.F32
        if tensor.dim() > 1:
            kind = gguf.GGMLQuantizationType[_KINDS[tensor.dtype]]
            if quantization is not None:
                kind = gguf.GGMLQuantizationType[quantization.upper()]
                block, _ = gguf.GGML_QUANT_SIZES[kind]
                kind = gguf.GGMLQuantizationType.F16 if tensor.shape[-1] % block else kind
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def with_whole_blocks(model: Any, block: int) -> Any:
    """A copy of which each MLP has a multiple of so many neurons; zeros change no output."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if not (more := -_width(layer) % block):
            continue
        for name in ("gate_proj", "up_proj", "gate_up_proj"):
            if (linear := getattr(layer.mlp, name, None)) is not None:
                parts = 2 if name == "gate_up_proj" else 1
                linear.weight = _longer(linear.weight, parts, more)
                linear.bias = None if linear.bias is None else _longer(linear.bias, parts, more)
                linear.out_features = linear.weight.shape[0]
        down = layer.mlp.down_proj
        down.weight = nn.Parameter(F.pad(down.weight, (0, more)))
        down.in_features += more
    return model


def _longer(tensor: Tensor, parts: int, more: int) -> nn.Parameter:
    """Each of the equal parts of the first axis with so many zeros at its end."""
    zeros = tensor.new_zeros(parts, more, *tensor.shape[1:])
    return nn.Parameter(torch.cat([tensor.unflatten(0, (parts, -1)), zeros], 1).flatten(0, 1))


def filling(model: Any, block: int) -> tuple[float, str]:
    """What `with_whole_blocks` adds, from shapes alone.

    Returns:
        The share of the model's parameters, and the layers that are filled up; 0 and an empty text
        where none is.
    """
    layers = list(model.model.layers)
    more = {i: -_width(layer) % block for i, layer in enumerate(layers) if -_width(layer) % block}
    added = sum(3 * model.config.hidden_size * number for number in more.values())
    shown = ", ".join(map(str, list(more)[:4])) + (", ..." if len(more) > 4 else "")
    said = f"layer{'s' if len(more) > 1 else ''} {shown}" if more else ""
    return added / sum(parameter.numel() for parameter in model.parameters()), said


_KINDS = {  # llama.cpp computes nothing wider than float32
    torch.float64: "F32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip


def _quantised_by_llama_cpp(plain: Path, path: Path, quantization: str) -> Path:
    """llama.cpp's own mixture of types, such as ``q4_k_m``."""
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise CheckpointError(
            f"GGUF: {quantization} is a mixture that llama.cpp makes ({error}): pip install "
            f"llama-cpp-python, or write the file without it, then llama-quantize FILE OUT "
            f"{quantization}; q8_0, q5_1, q5_0, q4_1 and q4_0 are written without llama.cpp"
        ) from error
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), options):
        raise CheckpointError(f"GGUF: llama.cpp could not make {quantization} of {plain}")
    return path


def check(model: Any) -> _Form:
    """Refuses what llama.cpp would compute otherwise, or not at all; looks at no weight.

    Returns:
        What llama.cpp computes for the family.

    Raises:
        ModelError: A model of another family.
        CheckpointError: llama.cpp has no form for a layer.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if (form := _FORMS.get(family)) is None or not hasattr(model, "lm_head"):
        raise ModelError(
            f"GGUF: written for causal language models of {', '.join(_FORMS)}, not {family}; "
            f"export to ONNX, or pad it (python -m sosp_hub.export FOLDER --to padded) and convert "
            f"it with llama.cpp's own script"
        )
    window = getattr(config, "sliding_window", None)
    window = window if getattr(config, "use_sliding_window", True) else None
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    for what, given, wanted in (
        ("hidden_act", config.hidden_act, form.activation),
        ("sliding_window", window, None),
        ("partial_rotary_factor", partial, 1.0),
        ("tie_word_embeddings", config.tie_word_embeddings or not form.norms_add_one, True),
        ("attention_bias", form.per_layer or not getattr(config, "attention_bias", False), True),
    ):
        if given != wanted:
            shown = getattr(config, what, given)
            raise CheckpointError(
                f"GGUF: {what} {shown!r} has no place in llama.cpp's {form.architecture}"
            )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"GGUF: rotary positions of type {kind!r} are not written")
    if not form.per_layer:
        fill_up(model)  # refuses a model that zeros would change
    elif all(not _heads(layer)[0] for layer in model.model.layers):
        raise CheckpointError("GGUF: the attention of every layer was taken out; keep one")
    return form


def _head_size(model: Any) -> int:
    attentions = [layer.self_attn for layer in model.model.layers if _heads(layer)[0]]
    return attentions[0].head_dim


def _in_file(model: Any) -> list[tuple[int, int, int]]:
    """Query heads, KV heads and neurons of each layer as the file has them.

    llama.cpp reads the size of a head from layer 0, and leaves out a layer without MLP, attention
    and all: zeros stand for what was taken out there.
    """
    sizes = []
    for i, layer in enumerate(model.model.layers):
        (queries, kv), width = _heads(layer), _width(layer)
        queries, kv = (1, 1) if not queries and i == 0 else (queries, kv)
        sizes.append((queries, kv, width or (256 if queries else 0)))
    return sizes


def _zeros(model: Any, i: int) -> Iterator[tuple[str, Tensor]]:
    """What stands for an attention or MLP that was taken out and has to be in the file."""
    layer, (queries, _, width) = model.model.layers[i], _in_file(model)[i]
    hidden, dtype = model.config.hidden_size, next(model.parameters()).dtype
    shapes = {}
    if queries and not _heads(layer)[0]:
        size = _head_size(model)
        shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (size, hidden))
        shapes |= {"attn_output": (hidden, size), "attn_norm": (hidden,)}
    if width and not _width(layer):
        shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (width, hidden))
        shapes |= {"ffn_down": (hidden, width), "ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        yield f"blk.{i}.{name}.weight", torch.zeros(shape, dtype=dtype)


def _heads(layer: Any) -> tuple[int, int]:
    """Query heads and KV heads of a layer."""
    if isinstance(layer.self_attn, RemovedAttention):
        return 0, 0
    attention = layer.self_attn
    queries = attention.o_proj.in_features // attention.head_dim
    if fused := getattr(attention, "qkv_proj", None):
        return queries, (fused.out_features // attention.head_dim - queries) // 2
    return queries, attention.k_proj.out_features // attention.head_dim


def _width(layer: Any) -> int:
    return 0 if isinstance(layer.mlp, RemovedMlp) else layer.mlp.down_proj.in_features


def _split(layer: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The parts of a matrix that Phi-3 has in one, under a Llama's names."""
    ahead, _, last = name.rpartition(".")
    if ahead == "self_attn.qkv_proj":
        size = layer.self_attn.head_dim
        queries, kv = _heads(layer)
        parts = zip("qkv", tensor.split([queries * size, kv * size, kv * size]), strict=True)
        return {f"self_attn.{part}_proj.{last}": each for part, each in parts}
    if ahead == "mlp.gate_up_proj":
        parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
        return {f"mlp.{part}_proj.{last}": each for part, each in parts}
    return {name: tensor}


def _tensors(model: Any, form: _Form) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in GGUF."""
    state = dict(model.state_dict())
    for name in [name for name in state if form.norms_add_one and name.endswith("norm.weight")]:
        state[name] = state[name].float() + 1
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    outer["lm_head.weight"] = "output.weight"
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"], outer["lm_head.weight"]
    for name, new in outer.items():
        yield new, state.pop(name)
    for i, layer in enumerate(model.model.layers):
        heads: dict[str, int] = dict(zip(("attn_q", "attn_k"), _heads(layer), strict=True))
        ahead = f"model.layers.{i}."
        own: dict[str, Tensor] = {}
        for name in [name for name in state if name.startswith(ahead)]:
            own |= _split(layer, name.removeprefix(ahead), state.pop(name))
        removed = {"attn_norm": not heads["attn_q"], "ffn_norm": not _width(layer)}
        yield from _zeros(model, i)
        for module, new in _LAYER.items():
            if removed.get(new):
                own.pop(f"{module}.weight", None)  # nothing reads it
                continue
            for part in ("weight", "bias"):
                if (tensor := own.pop(f"{module}.{part}", None)) is not None:
                    pairs = form.in_pairs and new in heads
                    tensor = _paired(tensor, heads[new]) if pairs else tensor
                    yield f"blk.{i}.{new}.{part}", tensor
        state |= own
    if state:
        raise CheckpointError(f"GGUF: the tensor {next(iter(state))!r} has no place in the file")
    if model.config.rope_parameters.get("rope_type") == "llama3":
        base = model.config.rope_parameters["rope_theta"]
        size = _head_size(model)
        plain = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq.float().cpu()


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in pairs, as llama.cpp rotates them, instead of in halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _describe(writer: "GGUFWriter", model: Any, form: _Form) -> None:
    config, layers = model.config, list(model.model.layers)

    def by_layer(counts: Sequence[int]) -> Any:
        return list(counts) if form.per_layer else counts[0]

    rope, size, sizes = config.rope_parameters, _head_size(model), _in_file(model)
    writer.add_name(Path(name_of(config) or type(model).__name__).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(by_layer([width for *_, width in sizes]))
    writer.add_head_count(by_layer([queries for queries, *_ in sizes]))
    writer.add_head_count_kv(by_layer([kv for _, kv, _ in sizes]))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(model.get_input_embeddings().num_embeddings)


def _add_tokenizer(writer: "GGUFWriter", model: Any, tokenizer: Any) -> None:
    """Tokens, merges and special tokens of a byte-level BPE."""
    import gguf

    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        pre = _pre_tokenizer(record)
        special = gguf.SpecialVocab(folder, load_merges=True)
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(model.get_input_embeddings().num_embeddings):
        tokens.append(names.get(number, f"[PAD{number}]"))
        if number not in names:
            kinds.append(gguf.TokenType.UNUSED)
        elif number not in added:
            kinds.append(gguf.TokenType.NORMAL)
        elif added[number].special:
            kinds.append(gguf.TokenType.CONTROL)
        else:
            kinds.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(record: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which this tokenizer splits a text."""
    first = record.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    if (record.get("model") or {}).get("type") == "BPE":
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if steps[0] == _DIGITS and kinds == ["Digits", "ByteLevel"] and steps[1].get("use_regex"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            pattern = steps[0]["pattern"].get("Regex")
            if pattern in _PRE:
                return _PRE[pattern]
    raise CheckpointError(
        f"GGUF: a tokenizer that splits texts by {', '.join(map(str, kinds))} is not written; "
        f"leave tokenizer= out, and give llama.cpp token numbers"
    )
