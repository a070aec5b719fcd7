"""Python attributes that must follow the tensors: traced ones, configs, standard layers."""

import copy
from typing import Any

from torch import nn

from sosp_hub.plan import Plan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.ints import Attribute
from sosp_hub.structure.ties import attribute_values


def rewrite(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Sets every attribute the cut changes; a module that needs it gets its own config."""
    values = attribute_values(graph.constraints, graph.count(plan.num_kept()))
    configs: dict[tuple[str, str], Any] = {}
    for attribute, value in values.items():
        _set(model, attribute, value, configs)
    _unread_head_attributes(model, graph, plan, {(a.module, a.name) for a in values})
    for module in model.modules():
        _follow_shapes(module)


def _set(
    model: nn.Module, attribute: Attribute, value: int, configs: dict[tuple[str, str], Any]
) -> None:
    module = model.get_submodule(attribute.module)
    *path, name = attribute.name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    old = vars(owner).get(name)
    new = _with_item(old, attribute.item, value)
    if old is None or new == old:
        return
    if not path:
        module.__dict__[name] = new
        return
    holder: Any = module
    for depth, part in enumerate(path):
        key = (attribute.module, ".".join(path[: depth + 1]))
        if key not in configs:
            configs[key] = copy.copy(vars(holder)[part])
            vars(holder)[part] = configs[key]
        holder = configs[key]
    vars(holder)[name] = new


def _with_item(old: Any, item: int | None, value: int) -> Any:
    if item is None or old is None:
        return value
    return type(old)(value if i == item else entry for i, entry in enumerate(old))


_BOTH = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_q_heads",
    "all_head_size",
    "inner_dim",
    "attn_dim",
)
_KV = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_COPIES = ("num_key_value_groups", "n_rep")


def _unread_head_attributes(
    model: nn.Module, graph: Graph, plan: Plan, known: set[tuple[str, str]]
) -> None:
    """Head counts that the traced path did not read but another kernel's path may."""
    ratios: dict[str, dict[str, tuple[int, int]]] = {}
    for name, kept in plan.kept.items():
        group = graph.groups[name]
        if group.kind in {"head", "kv_group"}:
            maker = next((m.tensor for m in group.members if not m.reads), group.members[0].tensor)
            attention = maker.rpartition(".")[0].rpartition(".")[0]
            ratios.setdefault(attention, {})[group.kind] = (len(kept), group.size)
    grouped = {
        name.rpartition(":")[0].rpartition(".")[0]
        for name, g in graph.groups.items()
        if g.kind == "kv_group"
    }
    for attention, found in ratios.items():
        module = model.get_submodule(attention)
        heads, kv_groups = found.get("head", (1, 1)), found.get("kv_group", (1, 1))
        plain = attention not in grouped
        scale = {**dict.fromkeys(_BOTH, (heads[0] * kv_groups[0], heads[1] * kv_groups[1]))}
        scale |= dict.fromkeys(_KV, heads if plain else kv_groups)
        scale |= {} if plain else dict.fromkeys(_COPIES, heads)
        for name, (kept, size) in scale.items():
            value = vars(module).get(name)
            if type(value) is int and (attention, name) not in known and value * kept % size == 0:
                module.__dict__[name] = value * kept // size


def _follow_shapes(module: nn.Module) -> None:
    """Sizes that standard layers repeat beside their weights."""
    if isinstance(module, nn.MultiheadAttention):
        _follow_attention(module)
    weight = getattr(module, "weight", None)
    if not hasattr(weight, "shape") or weight is None:
        return
    shape = tuple(weight.shape)
    found: dict[str, Any] = {}
    if isinstance(module, nn.Linear):
        found = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        found = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
    elif isinstance(module, nn.modules.conv._ConvNd):
        found = {"out_channels": shape[0], "in_channels": shape[1] * module.groups}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        found = {"num_features": shape[0]}
    elif isinstance(module, nn.GroupNorm):
        found = {"num_channels": shape[0]}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        found = {"normalized_shape": shape}
    elif isinstance(module, nn.Embedding):
        found = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    elif type(module).__name__ == "Conv1D":
        found = {"nx": shape[0], "nf": shape[1]}
    for name, value in found.items():
        if name in vars(module) and vars(module)[name] != value:
            module.__dict__[name] = value


def _follow_attention(module: nn.MultiheadAttention) -> None:
    """Its widths; the number of heads and the width are read while it runs, the rest is not."""
    module.head_dim = module.embed_dim // module.num_heads
    module.kdim = module.vdim = module.embed_dim
    if module.k_proj_weight is not None and module.v_proj_weight is not None:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
