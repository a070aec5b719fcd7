"""What a module keeps besides tensors, and which tensor shapes follow from it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sosp_hub.checkpoint.format.record import Plain
from sosp_hub.compat.torch import buffer_table, parameter_table
from sosp_hub.standard_layers import standard_layer

_TORCH_STATE = frozenset(nn.Module().__dict__)
_RUN_STATE = frozenset({"max_seq_len_cached"})  # grows while a model runs


def own_config(module: nn.Module) -> Any | None:
    """The config object that a module holds, if it holds one."""
    config = module.__dict__.get("config")
    return config if hasattr(config, "model_type") else None


def plain_attributes(module: nn.Module) -> dict[str, Plain]:
    """The numbers that a module keeps as attributes, without torch's and a run's own."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _TORCH_STATE
        and name not in _RUN_STATE
        and not name.startswith("__")
        and is_plain(value)
        and not (isinstance(value, float) and _is_dropout(module, name))
    }


def natural_shapes(module: nn.Module, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's tensors as torch's own classes derive them from attributes.

    Args:
        module: A module; of other classes nothing follows.
        values: The attributes to derive from, the module's own or changed ones.
    """
    layer = standard_layer(module)
    return layer.shapes(module, values) if layer else {}


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, without those of its children."""
    for name, tensor in (*parameter_table(module).items(), *buffer_table(module).items()):
        if tensor is not None:
            yield name, tensor


def join(*names: str) -> str:
    """Dotted name of the parts that are not empty."""
    return ".".join(name for name in names if name)


def is_plain(value: object) -> bool:
    """Whether a delta may hold the value: a finite number or some whole numbers; no truth value."""
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def as_plain(value: Any) -> Plain:
    """What `is_plain` accepted, without subclasses of int, and as a tuple."""
    if isinstance(value, tuple | list):
        return tuple(int(v) for v in value)
    return float(value) if isinstance(value, float) else int(value)


def _is_dropout(module: nn.Module, name: str) -> bool:
    return "drop" in name.lower() or "drop" in type(module).__name__.lower()


def set_like(table: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value of a delta in the type that is already there."""
    known = table.get(key)
    if isinstance(known, list):
        table[key] = list(value)
    elif isinstance(known, float):
        table[key] = float(value)
    else:
        table[key] = value
