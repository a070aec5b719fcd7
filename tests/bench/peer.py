"""Torch-Pruning on the same models, as its documentation uses it (`pip install torch-pruning`).

Half of every layer by magnitude, the classifier ignored, the heads of attention modules told to it
and written back as its examples for timm and transformers models do. The result counts as equal
where the pruned model computes what the dense one computes with the removed channels at zero where
they are read and with layer norms that see the kept channels only. What was kept is read off the
weights themselves: their values are random, so that each can be found in the dense model.
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


def measure_peer(model: nn.Module, inputs: Any, outputs: str | None) -> dict[str, Any]:
    """What became of one model: ``equal``, ``differs``, ``nothing cut`` or what was raised."""
    import torch_pruning

    names = None if outputs is None else (outputs,)

    def run(which: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(wanted_outputs(call(which, inputs), names))

    pruned = copy.deepcopy(model)
    heads = _heads(pruned)
    arguments: dict[str, Any] = {}
    if isinstance(inputs, dict):
        arguments["forward_fn"] = lambda which, given: call(which, given)
        arguments["output_transform"] = lambda out: output_tensors(wanted_outputs(out, names))[0]
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        example_inputs=inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=_classifiers(pruned, run(model)),
        num_heads=heads,
        **arguments,
    )
    pruner.step()
    _write_back(pruned, pruner.num_heads)
    before = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for parameter in pruned.parameters()) / before
    if share == 1:
        return {"peer": "nothing cut"}
    found = run(pruned)
    error = difference(found, run(_masked(copy.deepcopy(model), pruned)))
    state = "equal" if error <= ALLOWED else "differs"
    return {"peer": state, "peer_error": error, "peer_params": round(share, 3)}


def _classifiers(model: nn.Module, outputs: list[Tensor]) -> list[nn.Module]:
    sizes = {int(output.shape[-1]) for output in outputs if output.dim() > 1}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in sizes]
    return linear[-1:]


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Heads by projection, for the attention modules that its examples know."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        number = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        number = number if isinstance(number, int) else None
        config = getattr(module, "config", None)
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "qkv") and number and isinstance(module.qkv, nn.Linear):
            found[module.qkv] = number
        for name in ("query", "key", "value"):
            if isinstance(getattr(module, name, None), nn.Linear) and number:
                found[getattr(module, name)] = number
        if config is not None and hasattr(module, "q_proj"):
            heads = getattr(config, "num_attention_heads", None)
            shared = getattr(config, "num_key_value_heads", None) or heads
            for name, count in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
                if isinstance(getattr(module, name, None), nn.Linear) and count:
                    found[getattr(module, name)] = count
    return found


def _write_back(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Linear) and qkv in heads:
            module.num_heads = heads[qkv]
            module.head_dim = qkv.out_features // (3 * heads[qkv])
            module.attn_dim = qkv.out_features // 3  # newer than its example
        query = getattr(module, "query", None)
        if isinstance(query, nn.Linear) and query in heads:
            module.num_attention_heads = heads[query]
            module.attention_head_size = query.out_features // heads[query]
            module.all_head_size = query.out_features
        if isinstance(getattr(module, "q_proj", None), nn.Linear) and module.q_proj in heads:
            module.num_heads = heads[module.q_proj]
            module.head_dim = module.q_proj.out_features // heads[module.q_proj]
            if module.k_proj in heads:
                module.num_key_value_groups = heads[module.q_proj] // heads[module.k_proj]


def _masked(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    smaller = dict(pruned.named_modules())
    projections = {id(module) for module in _heads(dense)}
    for name, module in dense.named_modules():
        other = smaller.get(name)
        weight = getattr(module, "weight", None)
        if other is None or not isinstance(weight, Tensor) or weight.shape == other.weight.shape:
            continue
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1
        ):
            dim = -1 if isinstance(module, nn.Linear) else 1
            kept = _kept(weight, other.weight, 0 if _transposed(module) else 1)
            module.register_forward_pre_hook(_reader(dim, kept))
            if id(module) in projections:  # queries and keys are read by one another
                rows = _kept(weight, other.weight, 0)
                module.register_forward_hook(_maker(rows))
        elif weight.dim() == 1 and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            _normalise_kept(module, sorted(_kept(weight, other.weight, 0)))
    return dense


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


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


def _maker(kept: list[int]) -> Any:
    return lambda module, args, out: _zeroed(out, -1, kept)


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
