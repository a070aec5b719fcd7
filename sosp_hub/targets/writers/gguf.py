"""A pruned Llama-like model as a GGUF file, which llama.cpp runs without this package.

The architecture ``deci`` of llama.cpp takes one number of heads, KV heads and neurons for each
layer (``llama`` takes one for all); otherwise it computes what ``llama`` does.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.compat.transformers import name_of
from sosp_hub.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "deci"
_FAMILIES = ("llama", "mistral", "qwen2")
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
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
) -> Path:
    """Writes a GGUF file (needs the package ``gguf``).

    Matrices keep the model's dtype unless they are quantised, vectors are float32.

    Args:
        model: A pruned causal language model of the families Llama, Mistral and Qwen2.
        path: The file, by convention ``.gguf``.
        tokenizer: The model's fast tokenizer, a byte-level BPE. Without it the file has no
            vocabulary and takes token numbers alone.
        quantization: Type of the matrices, such as ``q8_0``; one whose rows it cannot pack is
            float16. None = the model's own.

    Raises:
        ModelError: A model of another family.
        CheckpointError: The package is missing, or llama.cpp has no form for a layer or tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF: {error}; pip install gguf") from error
    check(model)
    arrays = dict(_tensors(model))
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    _describe(writer, model)
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


_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check(model: Any) -> None:
    """Refuses what ``deci`` would compute otherwise, or not at all; looks at no weight.

    Raises:
        ModelError: A model of another family.
        CheckpointError: llama.cpp has no form for a layer.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in _FAMILIES or not hasattr(model, "lm_head"):
        raise ModelError(
            f"GGUF: one width per layer is written for causal language models of "
            f"{', '.join(_FAMILIES)}, not {family}; export to ONNX, or pad it "
            f"(sosp_hub.targets.writers.forms.padded) and convert it with llama.cpp's own script"
        )
    for key, wanted in (("hidden_act", ("silu",)), ("sliding_window", (None,))):
        if (given := getattr(config, key, wanted[0])) not in wanted and not (
            key == "sliding_window" and not getattr(config, "use_sliding_window", True)
        ):
            raise CheckpointError(
                f"GGUF: {key} {given!r} has no place in llama.cpp's {ARCHITECTURE}"
            )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"GGUF: rotary positions of type {kind!r} are not written")
    for i, layer in enumerate(model.model.layers):
        without_attention = not _heads(layer)[0]
        if without_attention and i == 0:
            raise CheckpointError(
                "GGUF: llama.cpp reads the size of a head from layer 0, whose attention was taken "
                "out; keep that one"
            )
        if not _width(layer) and not without_attention:
            raise CheckpointError(
                f"GGUF: llama.cpp leaves out a layer without MLP, attention and all; layer {i} has "
                f"attention alone"
            )


def _heads(layer: Any) -> tuple[int, int]:
    """Query heads and KV heads of a layer."""
    if isinstance(layer.self_attn, RemovedAttention):
        return 0, 0
    attention = layer.self_attn
    size = attention.head_dim
    return attention.q_proj.out_features // size, attention.k_proj.out_features // size


def _width(layer: Any) -> int:
    return 0 if isinstance(layer.mlp, RemovedMlp) else layer.mlp.gate_proj.out_features


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name in GGUF."""
    state = dict(model.state_dict())
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
        heads = dict(zip(("attn_q", "attn_k"), _heads(layer), strict=True))
        for module, new in _LAYER.items():
            if new == "attn_norm" and not heads["attn_q"]:
                state.pop(f"model.layers.{i}.{module}.weight", None)  # nothing reads it
                continue
            for part in ("weight", "bias"):
                if (tensor := state.pop(f"model.layers.{i}.{module}.{part}", None)) is not None:
                    tensor = _paired(tensor, heads[new]) if new in heads else tensor
                    yield f"blk.{i}.{new}.{part}", tensor
    if state:
        raise CheckpointError(f"GGUF: the tensor {next(iter(state))!r} has no place in the file")
    if model.config.rope_parameters.get("rope_type") == "llama3":
        base = model.config.rope_parameters["rope_theta"]
        size = model.model.layers[0].self_attn.head_dim
        plain = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq.float().cpu()


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in pairs, as llama.cpp rotates them, instead of in halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _describe(writer: "GGUFWriter", model: Any) -> None:
    config, layers = model.config, list(model.model.layers)
    rope, size = config.rope_parameters, layers[0].self_attn.head_dim
    heads = [_heads(layer) for layer in layers]
    writer.add_name(Path(name_of(config) or type(model).__name__).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([_width(layer) for layer in layers])
    writer.add_head_count([query for query, _ in heads])
    writer.add_head_count_kv([kv for _, kv in heads])
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
