"""Torch-Pruning on the same models, as its documentation uses it (`pip install torch-pruning`).

Half of every layer by magnitude, the classifier ignored, the heads of attention modules told to it
and written back as its examples for timm and transformers models do. Its examples cut either the
channels of heads or whole heads: both are tried, and the better result counts. The result is equal
where the pruned model computes what the dense one computes with the removed channels at zero where
they are made and where they are read, and with norms that see the kept channels only. What was kept
is read off the weights themselves: their values differ, so that each can be found in the dense
model.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.structure.trace import call, output_tensors, wanted_outputs
from tests.structure.oracles import difference

ALLOWED = 1e-4
"""Far above rounding; cuts that are wrong are off by 1e-2 and more."""

WAYS = {
    "channels of heads": {},
    "whole heads": {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5},
}
RESULTS = ("equal", "not compared", "differs", "nothing cut", "fails")
"""Best first. ``not compared``: it runs, and what it should compute could not be found out."""

PROJECTIONS = (
    ("qkv",), ("qkv_proj",), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"),
)  # fmt: skip
HEADS = ("num_heads", "num_attention_heads", "n_heads")
CHANNELS = ("head_dim", "attention_head_size", "key_value_proj_dim")
WIDTHS = ("all_head_size", "attn_dim", "inner_dim")


def measure_peer(model: nn.Module, inputs: Any, outputs: str | None) -> dict[str, Any]:
    """What became of one model, one of ``RESULTS``; what was raised where both ways fail."""
    _tell_apart(model)
    ways = list(WAYS)
    if any(hasattr(module, "q_proj") for module in model.modules()):
        ways.reverse()  # its example for language models; the other way leaves rotations behind
    found: list[dict[str, Any]] = []
    for way in ways if _heads(model) else ways[:1]:
        found.append({**_one_way(model, inputs, outputs, WAYS[way]), "way": way})
        if found[-1]["peer"] == "equal":
            break
    return min(found, key=lambda result: RESULTS.index(result["peer"]))


def _one_way(
    model: nn.Module, inputs: Any, outputs: str | None, way: dict[str, Any]
) -> dict[str, Any]:
    names = None if outputs is None else (outputs,)

    def run(which: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(wanted_outputs(call(which, inputs), names))

    pruned = copy.deepcopy(model)
    try:
        _prune(pruned, inputs, run(model), names, way)
        found = run(pruned)
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        return {"peer": "fails", "message": f"{type(error).__name__}: {error}"[:200]}
    before = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in pruned.parameters()) / before
    if share == 1:
        return {"peer": "nothing cut"}
    result = {"peer": "not compared", "peer_params": round(share, 3)}
    try:
        error = difference(found, run(_masked(copy.deepcopy(model), pruned)))
    except Exception as why:  # noqa: BLE001 - the reference's fault, not the library's
        return {**result, "message": f"{type(why).__name__}: {why}"[:200]}
    state = "equal" if error <= ALLOWED else "differs"
    return {**result, "peer": state, "peer_error": error}


def _prune(
    model: nn.Module,
    inputs: Any,
    dense: list[Tensor],
    names: tuple[str, ...] | None,
    way: dict[str, Any],
) -> None:
    import torch_pruning

    arguments: dict[str, Any] = {}
    if isinstance(inputs, dict):
        arguments["forward_fn"] = lambda which, given: call(which, given)
        arguments["output_transform"] = lambda out: output_tensors(wanted_outputs(out, names))[0]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=_classifiers(model, dense),
        num_heads=_heads(model),
        out_channel_groups={
            module.gate_up_proj: 2
            for module in model.modules()
            if isinstance(getattr(module, "gate_up_proj", None), nn.Linear)
        },
        **way,
        **arguments,
    )
    pruner.step()
    _write_back(model, pruner.num_heads)


def _classifiers(model: nn.Module, outputs: list[Tensor]) -> list[nn.Module]:
    """Every layer that makes as many classes as timm models have; elsewhere the last one."""
    sizes = {int(output.shape[-1]) for output in outputs if output.dim() > 1}
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        and module.weight.shape[0] in sizes
    ]
    return found if hasattr(model, "num_classes") else found[-1:]


def _attentions(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module], int, int]]:
    """Attention modules, their projections, and how many heads these have: queries, the rest."""
    found = []
    for module in model.modules():
        config = getattr(module, "config", None)
        counts = [getattr(owner, key, None) for owner in (module, config) for key in HEADS]
        number = next((count for count in counts if isinstance(count, int)), None)
        for names in PROJECTIONS if number else ():
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) for layer in layers):
                shared = getattr(module, "num_key_value_heads", None)
                shared = shared or getattr(config, "num_key_value_heads", None) or number
                found.append((module, layers, number, shared if len(layers) > 1 else number))
    return found


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {
        layer: shared if i else number
        for _, layers, number, shared in _attentions(model)
        for i, layer in enumerate(layers)
    }


def _write_back(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    for module, layers, _, shared in _attentions(model):
        number = heads[layers[0]]
        width = layers[0].weight.shape[0] // (3 if len(layers) == 1 else 1)
        for names, value in ((HEADS, number), (CHANNELS, width // number), (WIDTHS, width)):
            for name in names:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, value)
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = number // heads.get(layers[-1], shared)


def _masked(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    smaller = dict(pruned.named_modules())
    for name, module in list(dense.named_modules()):
        other = smaller[name]
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and any(
            one.shape != two.shape
            for one, two in zip(module.parameters(), other.parameters(), strict=True)
        ):
            raise ValueError(f"{type(module).__name__}: its weights are read by no layer")
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.shape == other.weight.shape:
            continue
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            makes, reads = (
                (1, 0) if isinstance(module, nn.modules.conv._ConvTransposeNd) else (0, 1)
            )
            dim = -1 if isinstance(module, nn.Linear) else 1
            groups = getattr(module, "groups", 1)
            if groups == 1 or weight.shape[1] > 1:  # what a depthwise one reads, it makes
                kept = _kept(weight, other.weight, reads)
                each = weight.shape[reads]
                kept = [group * each + i for group in range(groups) for i in kept]
                module.register_forward_pre_hook(_reader(dim, kept))
            module.register_forward_hook(_maker(dim, _kept(weight, other.weight, makes)))
        elif weight.dim() == 1 and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            _normalise_kept(module, sorted(_kept(weight, other.weight, 0)))
    return dense


def _tell_apart(model: nn.Module) -> None:
    """Scales of norms are all different, so that each can be found again."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                values = torch.linspace(0.5, 1.5, len(weight))
                weight.copy_(values[torch.randperm(len(weight), generator=generator)])


def _kept(dense: Tensor, pruned: Tensor, dim: int) -> list[int]:
    """Positions of one dimension whose values are still there, in the order they now have."""
    place = {value: i for i, value in enumerate(dense.detach().flatten().tolist())}
    step = dense[0].numel() if dim == 0 else dense[0, 0].numel()
    kept = []
    for line in pruned.detach().movedim(dim, 0).flatten(1) if dense.dim() > 1 else pruned[:, None]:
        found = Counter(place[value] // step % dense.shape[dim] for value in line[:16].tolist())
        kept.append(found.most_common(1)[0][0])  # of equal values some are told apart wrongly
    return kept


def _zeroed(x: Tensor, dim: int, kept: list[int]) -> Tensor:
    gate = torch.zeros(x.shape[dim])
    gate[kept] = 1
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * gate.view(shape)


def _reader(dim: int, kept: list[int]) -> Any:
    return lambda module, args: (_zeroed(args[0], dim, kept), *args[1:])


def _maker(dim: int, kept: list[int]) -> Any:
    return lambda module, args, out: _zeroed(out, dim, kept)


def _normalise_kept(module: nn.Module, kept: list[int]) -> None:
    """A normalisation that sees the kept channels only."""
    size = len(module.weight)
    small = copy.deepcopy(module)
    for name in ("weight", "bias"):
        if getattr(small, name, None) is not None:
            setattr(small, name, nn.Parameter(getattr(small, name).detach()[kept]))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(kept),)

    def forward(x: Tensor, *args: Any) -> Tensor:
        dim = -1 if x.shape[-1] == size else 1
        out = torch.zeros_like(x)
        index = torch.tensor(kept)
        return out.index_copy(dim, index, small(x.index_select(dim, index), *args))

    module.forward = forward  # type: ignore[method-assign]
