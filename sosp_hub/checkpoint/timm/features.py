"""Channel counts that timm announces beside its models: ``feature_info`` and ``num_features``.

No forward pass reads them, so a cut leaves them as they were; ``features_only=True`` hands them on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.fake import to_fake
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.compat.torch import FakeMode
from sosp_hub.modes import evaluating
from sosp_hub.structure.copies import copy_model

_Shapes = dict[str, tuple[int, ...]]


def announced_channels(model: nn.Module, dense: nn.Module) -> tuple[list[int], dict[str, int]]:
    """What the model should announce, by comparing the shapes of its features with the dense ones.

    Args:
        model: The pruned model.
        dense: Its skeleton; it loses its data.

    Returns:
        Channels of each entry of ``feature_info``, and ``num_features`` and ``head_hidden_size``
        where the model has them; both empty where its features cannot be followed.
    """
    entries = feature_entries(model)
    try:
        bare = any(parameter.is_meta for parameter in model.parameters())
        after = _fake_shapes(copy_model(model), entries) if bare else _shapes(model, entries)
        before = _fake_shapes(dense, entries)
    except Exception:  # noqa: BLE001 - a model that only runs on other inputs announces what it did
        return [], {}
    channels = [
        _same_place(entry["num_chs"], before.get(str(i)), after.get(str(i)))
        for i, entry in enumerate(entries)
    ]
    numbers = {
        name: _same_place(getattr(dense, name), before.get(name), after.get(name))
        for name in ("num_features", "head_hidden_size")
        if isinstance(getattr(dense, name, None), int)
    }
    return channels, numbers


def announce(model: nn.Module, channels: Sequence[int]) -> None:
    """Writes the channels into ``feature_info`` where it has as many entries."""
    entries = feature_entries(model)
    if len(entries) == len(channels):
        for entry, number in zip(entries, channels, strict=True):
            entry["num_chs"] = number


def feature_entries(model: nn.Module) -> list[dict[str, Any]]:
    """The entries of ``feature_info``, in either form that timm keeps."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, list) or not all(isinstance(each, Mapping) for each in info):
        return []
    return info


def _fake_shapes(model: nn.Module, entries: Sequence[Mapping[str, Any]]) -> _Shapes:
    """The shapes without data; the model loses its own."""
    with FakeMode():
        return _shapes(to_fake(model), entries)


def _shapes(model: nn.Module, entries: Sequence[Mapping[str, Any]]) -> _Shapes:
    inputs: Any = made_up_inputs(model)
    shapes: _Shapes = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, *values: Any) -> None:  # noqa: ARG001
            value = values[-1]
            value = value[0] if isinstance(value, tuple) else value
            if isinstance(value, Tensor):
                shapes[name] = tuple(value.shape)

        return hook

    handles = []
    for i, entry in enumerate(entries):
        module = model.get_submodule(entry["module"])
        before = entry.get("hook_type") == "forward_pre"
        place = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(place(keep(str(i))))
    runs: Any = model
    try:
        with torch.no_grad(), evaluating(model):
            features = runs.forward_features(*inputs)
            shapes["num_features"] = tuple(features.shape)
            hidden = runs.forward_head(features, pre_logits=True)
            shapes["head_hidden_size"] = tuple(hidden.shape)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _same_place(size: int, before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> int:
    """The size in ``after`` at the dimension where ``before`` has ``size``."""
    if before is None or after is None or len(before) != len(after):
        return size
    dims = [dim for dim in (1, len(before) - 1) if before[dim] == size]
    return after[dims[0]] if dims else size
