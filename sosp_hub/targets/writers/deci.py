"""A pruned Llama as a DeciLM checkpoint, which has one size for each layer and many readers.

``model_type: nemotron-nas`` is read by mlx-lm, TensorRT-LLM and llama.cpp's converter as it is, and
by vLLM and SGLang with ``trust_remote_code=True``: they know the model, but take the class of its
config from the checkpoint. The format names a width by a factor that readers round up to 256, and
the KV heads of a layer by how many query heads share one; all layers have as many query heads.
Zeros fill up what is between: they change no output.
"""

import copy
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format import proof
from sosp_hub.checkpoint.format.standins import RemovedAttention, RemovedMlp
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.errors import CheckpointError, ModelError
from sosp_hub.targets.writers.widths import DECI_STEP, shared_out

_FAMILIES = ("llama", "mistral")
_CONFIG_FILE = "configuration_decilm.py"
_CONFIG_CODE = '''\
"""The config of a DeciLM checkpoint, for loaders that take its class from here."""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """A Llama's, with the sizes of each layer in ``block_configs``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        self.block_configs = [
            SimpleNamespace(**{key: SimpleNamespace(**part) for key, part in block.items()})
            for block in block_configs or []
        ]
        super().__init__(**{key: value for key, value in kwargs.items() if value is not None})

    def to_dict(self):
        record = super().to_dict()
        record["block_configs"] = [
            {key: vars(part) for key, part in vars(block).items()} for block in self.block_configs
        ]
        return record
'''
_LOG = logging.getLogger("sosp_hub")


@dataclass(frozen=True)
class _Layer:
    """Sizes of a layer, as it is and as the format has it.

    Attributes:
        queries: Query heads; 0 = no attention.
        kv: KV heads.
        kv_slots: KV heads in the file.
        width: Neurons; 0 = no MLP.
        width_slots: Neurons in the file; 0 = no MLP.
    """

    queries: int
    kv: int
    kv_slots: int
    width: int
    width_slots: int


def to_deci(
    model: nn.Module, folder: str | Path, tokenizer: Any = None, *, tensor_parallel: int = 1
) -> Path:
    """Writes ``config.json``, the class of that config and the weights of a DeciLM checkpoint.

    Args:
        model: A pruned causal language model of the families Llama and Mistral.
        folder: Where to; a new or an empty folder.
        tokenizer: Saved beside it.
        tensor_parallel: Processes that share heads and neurons; zeros fill up to what divides.

    Returns:
        The folder.

    Raises:
        ModelError: A model of another family.
        CheckpointError: A layer or setting that the format has no form for, or a folder that holds
            something.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: holds something already; give a new or an empty folder")
    num_heads, layers = _in_file(model, tensor_parallel)
    config = _config(model, layers, num_heads)
    state = dict(_tensors(model, layers, num_heads))
    _prove(model, config, state)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / _CONFIG_FILE).write_text(_CONFIG_CODE)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    generation = getattr(model, "generation_config", None)
    for part in (tokenizer, generation):
        if part is not None:
            part.save_pretrained(folder)
    padded = sum(tensor.numel() for tensor in state.values())
    own = sum(parameter.numel() for parameter in model.parameters())
    if padded > own:
        _LOG.info("DeciLM: %s zeros fill up heads and neurons (%+.1f %% parameters)",
                  f"{padded - own:,}", 100 * (padded / own - 1))  # fmt: skip
    return folder


def check(model: Any) -> int:
    """The query heads that every layer gets; looks at no weight.

    Raises:
        ModelError: A model of another family.
        CheckpointError: A setting that the readers of the format would not follow.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in _FAMILIES or not hasattr(model, "lm_head"):
        raise ModelError(
            f"DeciLM: written for causal language models of {', '.join(_FAMILIES)}, not {family}; "
            f"the targets onnx and torch_export take any family"
        )
    if getattr(config, "sliding_window", None) is not None:
        raise CheckpointError(
            f"DeciLM: its readers attend to everything, this model to {config.sliding_window} "
            f"tokens; set config.sliding_window = None if texts are never longer"
        )
    sizes = {
        layer.self_attn.head_dim
        for layer in _layers(model)
        if not isinstance(layer.self_attn, RemovedAttention)
    }
    if len(sizes) != 1:
        raise CheckpointError(
            f"DeciLM: heads of one size in all layers are needed, here they have "
            f"{', '.join(map(str, sorted(sizes))) or 'none'}"
        )
    (size,) = sizes
    num_heads, rest = divmod(config.hidden_size, size)
    most = max(_queries(layer) for layer in _layers(model))
    if rest or most > num_heads:
        raise CheckpointError(
            f"DeciLM: a head has hidden size / heads values for llama.cpp and mlx; {most} heads of "
            f"{size} do not fit the hidden size {config.hidden_size}"
        )
    return num_heads


def _in_file(model: Any, processes: int) -> "tuple[int, list[_Layer]]":
    """Query heads of every layer, and the sizes of each."""
    num_heads = check(model)
    if num_heads % processes:
        raise CheckpointError(
            f"DeciLM: {num_heads} query heads are not shared out to tensor_parallel={processes} "
            f"processes; give a divisor of {num_heads}"
        )
    return num_heads, [_sizes(model, i, num_heads, processes) for i in range(len(_layers(model)))]


def read_width(factor: float, hidden_size: int) -> int:
    """The width that readers make of ``ffn_mult`` (vLLM, SGLang, TensorRT-LLM, llama.cpp, mlx)."""
    return -(-int(2 * factor * hidden_size / 3) // DECI_STEP) * DECI_STEP


def _layers(model: Any) -> list[Any]:
    return list(model.model.layers)


def _queries(layer: Any) -> int:
    if isinstance(layer.self_attn, RemovedAttention):
        return 0
    return layer.self_attn.q_proj.out_features // layer.self_attn.head_dim


def _sizes(model: Any, i: int, num_heads: int, processes: int) -> _Layer:
    layer = _layers(model)[i]
    queries, kv, slots = _queries(layer), 0, 0
    if queries:
        kv = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
        divisors = (n for n in range(kv, num_heads + 1) if not num_heads % n)
        able = (n for n in divisors if num_heads // n >= queries // kv)
        slots = next((n for n in able if shared_out(n, processes)), 0)
        if not slots:
            raise CheckpointError(
                f"DeciLM: the {kv} KV heads of layer {i} with {queries // kv} query heads each are "
                f"not shared out to tensor_parallel={processes} processes; give another number"
            )
    elif not i:
        slots = 1  # readers begin with layer 0: the size of a head, the residual stream
    width = 0 if isinstance(layer.mlp, RemovedMlp) else layer.mlp.gate_proj.out_features
    # llama.cpp leaves a layer without MLP out, with its attention: zeros instead.
    step = math.lcm(DECI_STEP, processes)
    return _Layer(queries, kv, slots, width, max(step if slots else 0, -(-width // step) * step))


def _config(model: Any, layers: list[_Layer], num_heads: int) -> dict[str, Any]:
    config = model.config
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    shared = (
        *("hidden_size", "hidden_act", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
        *("initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
        *("pad_token_id",),
    )
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{_CONFIG_FILE.removesuffix('.py')}.DeciLMConfig"},
        **{key: getattr(config, key, None) for key in shared},
        "num_attention_heads": num_heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": None,
        "intermediate_size": None,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "block_configs": [_block(layer, num_heads, config.hidden_size) for layer in layers],
    }


def _block(layer: _Layer, num_heads: int, hidden_size: int) -> dict[str, Any]:
    factor = round(3 * layer.width_slots / (2 * hidden_size), 6)  # mlx-lm rounds so
    if layer.width_slots and read_width(factor, hidden_size) != layer.width_slots:
        factor = round(factor - 3e-6, 6)  # a hair less is rounded up to the same step
    assert read_width(factor, hidden_size) == layer.width_slots
    common = {"replace_with_linear": False, "sparsify": None}
    attention = {
        "n_heads_in_group": num_heads // layer.kv_slots if layer.kv_slots else None,
        "no_op": not layer.kv_slots,
        "window_length": None,
        "num_sink_tokens": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
    }
    ffn = {
        "ffn_mult": factor if layer.width_slots else None,
        "no_op": not layer.width_slots,
    }
    return {"attention": attention | common, "ffn": ffn | common}


def _tensors(model: Any, layers: list[_Layer], num_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, under the name that it has in a Llama."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for i, layer in enumerate(layers):
        ahead = f"model.layers.{i}."
        own = {n.removeprefix(ahead): state.pop(n) for n in list(state) if n.startswith(ahead)}
        for name, axes in _parts(layer, num_heads, model.config.hidden_size).items():
            yield f"{ahead}{name}.weight", _filled(own.pop(f"{name}.weight", None), axes, model)
            if (bias := own.pop(f"{name}.bias", None)) is not None:
                yield f"{ahead}{name}.bias", _filled(bias, axes[:1], model)
        if odd := set(own) - {"input_layernorm.weight", "post_attention_layernorm.weight"}:
            raise CheckpointError(f"DeciLM: {ahead}{min(odd)} has no place in the format")
    for name, tensor in state.items():
        yield name, tensor.contiguous()


def _parts(layer: _Layer, num_heads: int, hidden: int) -> "dict[str, tuple[_Axis, ...]]":
    """The weights of a layer in the file."""
    size = hidden // num_heads
    queries = _Axis(num_heads * size, _query_places(layer, num_heads, size))
    kv = _Axis(layer.kv_slots * size, torch.arange(layer.kv * size))
    width = _Axis(layer.width_slots, torch.arange(layer.width))
    stream = _Axis(hidden, torch.arange(hidden))
    parts: dict[str, tuple[_Axis, ...]] = {}
    if layer.kv_slots:
        attention = {"q": (queries, stream), "k": (kv, stream), "v": (kv, stream)}
        attention["o"] = (stream, queries)
        parts["input_layernorm"] = (stream,)
        parts |= {f"self_attn.{name}_proj": axes for name, axes in attention.items()}
    if layer.width_slots:
        parts["post_attention_layernorm"] = (stream,)
        parts |= {f"mlp.{name}_proj": (width, stream) for name in ("gate", "up")}
        parts["mlp.down_proj"] = (stream, width)
    return parts


def filling(model: Any, tensor_parallel: int = 1) -> tuple[float, str]:
    """How much the zeros of the file add, from shapes alone.

    Args:
        model: Of which a file would be written.
        tensor_parallel: As of `to_deci`.

    Returns:
        The share of the model's parameters, and the first layer that is filled up; 0 and an empty
        text where none is.

    Raises:
        ModelError, CheckpointError: As `check`.
    """
    (num_heads, all_sizes), added, first = _in_file(model, tensor_parallel), 0, ""
    for i, (layer, sizes) in enumerate(zip(_layers(model), all_sizes, strict=True)):
        parts = _parts(sizes, num_heads, model.config.hidden_size)
        held = sum(
            tensor.numel() for name, tensor in layer.named_parameters() if name.endswith("weight")
        )
        more = sum(math.prod(axis.size for axis in axes) for axes in parts.values()) - held
        if more > 0 and not first:
            changes = [f"width {sizes.width} to {sizes.width_slots}"]
            changes = changes if sizes.width_slots > sizes.width else []
            if num_heads > sizes.queries:
                changes.append(f"heads {sizes.queries} to {num_heads}")
            if sizes.kv_slots > sizes.kv:
                changes.append(f"KV heads {sizes.kv} to {sizes.kv_slots}")
            first = f"layer {i}: {', '.join(changes)}"
        added += max(more, 0)
    return added / sum(parameter.numel() for parameter in model.parameters()), first


@dataclass(frozen=True)
class _Axis:
    """Positions of the file, and which of them the model's go to; the others are zero."""

    size: int
    places: Tensor


def _query_places(layer: _Layer, num_heads: int, size: int) -> Tensor:
    """Each KV head comes first with its own query heads, then with those that are zero."""
    heads = torch.arange(num_heads).reshape(max(layer.kv_slots, 1), -1)
    own = heads[: layer.kv, : layer.queries // max(layer.kv, 1)].flatten()
    return (own[:, None] * size + torch.arange(size)).flatten()


def _filled(tensor: Tensor | None, axes: tuple[_Axis, ...], model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    wide = torch.zeros([axis.size for axis in axes], dtype=dtype)
    if tensor is not None:
        wide[torch.meshgrid(*[axis.places for axis in axes], indexing="ij")] = tensor
    return wide


def _prove(model: Any, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """What the file says, built from the model's own classes, computes what the model does."""
    inputs = made_up_inputs(model)
    rebuilt = _rebuilt(model, config)
    proof.adopt_dtypes(rebuilt, model)
    missing, unexpected = rebuilt.load_state_dict(state, strict=False)
    fits = not unexpected and all(
        name == "lm_head.weight" or name.endswith("layernorm.weight") for name in missing
    )
    rebuilt.tie_weights()
    if not fits or inputs is None or not proof.same_function(rebuilt, model, inputs):
        raise CheckpointError(
            f"{type(model).__name__}: padded with zeros it computes other outputs; save it "
            "with sosp_hub.save_pretrained, and report the model"
        )


def _rebuilt(model: Any, config: dict[str, Any]) -> Any:
    plain = adapter.plain_config(model.config)
    plain.num_attention_heads = plain.num_key_value_heads = config["num_attention_heads"]
    plain.num_hidden_layers, plain.head_dim = 0, plain.hidden_size // plain.num_attention_heads
    rebuilt: Any = type(model)(plain)
    kind = type(_layers(model)[0])
    for i, block in enumerate(config["block_configs"]):
        own = copy.deepcopy(rebuilt.config)
        if not block["attention"]["no_op"]:
            shared = block["attention"]["n_heads_in_group"]
            own.num_key_value_heads = own.num_attention_heads // shared
        if not block["ffn"]["no_op"]:
            own.intermediate_size = read_width(block["ffn"]["ffn_mult"], own.hidden_size)
        layer = kind(own, i)
        if block["attention"]["no_op"]:
            layer.self_attn = RemovedAttention(layer_idx=i)
        if block["ffn"]["no_op"]:
            layer.mlp = RemovedMlp()
        rebuilt.model.layers.append(layer)
    rebuilt.config.num_hidden_layers = len(rebuilt.model.layers)
    return rebuilt.eval()
