"""A copy of the model to trace: tensors without data, ints that know where they come from."""

import copy
from typing import Any

import torch
from torch import nn

from sosp_hub.compat.torch import FakeMode
from sosp_hub.structure.copies import copy_model, share_model
from sosp_hub.structure.traced_int import Attribute, TracedInt


def shadow(model: nn.Module, fake: FakeMode | None, *, shared: bool = False) -> nn.Module:
    """A copy whose ints are traced; with ``fake`` its tensors hold no data.

    Args:
        model: Any module.
        fake: The mode of its tensors; None = they have data.
        shared: With data: parameters lie where those of the model lie, and must not be written to.
    """
    memo: dict[int, Any] = {}
    if fake is not None:
        for tensor in [*model.parameters(), *model.buffers()]:
            device = "cpu" if tensor.is_meta else tensor.device
            with fake:
                empty = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
                )
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    twin = share_model(model) if shared else copy_model(model, memo)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for name, module in twin.named_modules():
        _trace_ints(module, name)
    return twin


def _trace_ints(module: nn.Module, name: str) -> None:
    for key, value in list(vars(module).items()):
        if key == "training" or key.startswith("_"):
            continue
        if is_config(value):
            module.__dict__[key] = _trace_config(value, name, key)
        else:
            traced = _traced(value, name, key)
            if traced is not value:
                module.__dict__[key] = traced


def is_config(value: Any) -> bool:
    """Whether it is a transformers config; does not import transformers."""
    return hasattr(value, "model_type") and hasattr(value, "to_diff_dict")


def _trace_config(config: Any, module: str, prefix: str) -> Any:
    twin = copy.copy(config)
    for key, value in list(vars(twin).items()):
        if is_config(value):
            twin.__dict__[key] = _trace_config(value, module, f"{prefix}.{key}")
        elif not key.startswith("_"):
            twin.__dict__[key] = _traced(value, module, f"{prefix}.{key}")
    return twin


def _traced(value: Any, module: str, name: str) -> Any:
    if type(value) is int:
        return TracedInt(value, Attribute(module, name, dense=value))
    if type(value) in {tuple, list} and value and all(type(item) is int for item in value):
        return type(value)(
            TracedInt(item, Attribute(module, name, i, item)) for i, item in enumerate(value)
        )
    return value
