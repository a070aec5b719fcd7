"""Which numbers of heads and channels the config of a model takes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sosp_hub.compat.transformers import is_taken
from sosp_hub.structure.groups import Group
from sosp_hub.structure.shadow import is_config

_WIDTH, _HEADS, _KV_HEADS = "hidden_size", "num_attention_heads", "num_key_value_heads"


@dataclass(eq=False)
class PlainSizes:
    """Asks a config, by the names that configs of transformers share.

    Attributes:
        config: A copy of the model's.
        sizes: Structures in each group of a kind that the config counts.
        kinds: These kinds, by group.
    """

    config: Any
    sizes: dict[str, int]
    kinds: dict[str, str]
    _known: dict[tuple[tuple[str, int], ...], bool] = field(default_factory=dict)

    def admits(self, counts: Mapping[str, int]) -> bool:
        """Whether the config takes what is left; True where it does not count that.

        Args:
            counts: Structures kept, by group; groups that are not there stay whole.
        """
        kept: dict[str, set[int]] = {}
        for name, kind in self.kinds.items():
            kept.setdefault(kind, set()).add(counts.get(name, self.sizes[name]))
        if any(len(numbers) > 1 for numbers in kept.values()):
            return True  # not one number for all layers
        number = {kind: min(numbers) for kind, numbers in kept.items()}
        numbers: dict[str, int] = {}
        if "residual" in number:
            numbers[_WIDTH] = number["residual"]
        if "head" in number:
            numbers[_HEADS] = number["head"] * number.get("kv_group", 1)
            if "kv_group" in number:
                numbers[_KV_HEADS] = number["kv_group"]
            elif getattr(self.config, _KV_HEADS, 1) == getattr(self.config, _HEADS):
                numbers[_KV_HEADS] = number["head"]
        key = tuple(sorted(numbers.items()))
        if key not in self._known:
            self._known[key] = is_taken(self.config, numbers)
        return self._known[key]


def plain_sizes(model: nn.Module, groups: Mapping[str, Group]) -> tuple[PlainSizes, ...]:
    """What configs inside a model say of its groups: its own, and those of models in it.

    A group belongs to the configs of the innermost modules that hold its tensors and have one.
    """
    owners = {
        name: config
        for name, module in model.named_modules()
        if is_config(config := vars(module).get("config"))
    }
    configs = {id(config): config for config in owners.values()}
    inside: dict[int, dict[str, Group]] = {number: {} for number in configs}
    for name, group in groups.items():
        for member in group.members:
            if (owner := _innermost(member.tensor, owners)) is not None:
                inside[id(owners[owner])][name] = group
    found = (_sizes_of(configs[number], held) for number, held in inside.items())
    return tuple(sizes for sizes in found if sizes is not None)


def _innermost(tensor: str, owners: Mapping[str, Any]) -> str | None:
    """The deepest of these modules that holds a tensor."""
    path = tensor
    while path:
        path = path.rpartition(".")[0]
        if path in owners:
            return path
    return None


def _sizes_of(config: Any, groups: Mapping[str, Group]) -> PlainSizes | None:
    """What one config says; None where it does not count these groups."""
    by_kind: dict[str, dict[str, int]] = {}
    for name, group in groups.items():
        by_kind.setdefault(group.kind, {})[name] = group.size
    width = getattr(config, _WIDTH, None)
    streams = {name: size for name, size in by_kind.get("residual", {}).items() if size == width}
    heads, shared = by_kind.get("head", {}), by_kind.get("kv_group", {})
    if len({*heads.values()}) != 1 or len({*shared.values()}) > 1:
        return None
    total = next(iter(heads.values())) * next(iter(shared.values()), 1)
    if total != getattr(config, _HEADS, None):
        return None
    kinds = {
        name: kind
        for kind, found in (("residual", streams), ("head", heads), ("kv_group", shared))
        for name in found
    }
    return PlainSizes(copy.deepcopy(config), {**streams, **heads, **shared}, kinds)
