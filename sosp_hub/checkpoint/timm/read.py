"""Loads a timm model, and takes no tensor that the files do not hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sosp_hub.checkpoint.format.headers import TensorHeader
from sosp_hub.errors import CheckpointError
from sosp_hub.modes import building_in

_DTYPES = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def read(folder: Path, tensors: Mapping[str, TensorHeader], kwargs: dict[str, Any]) -> nn.Module:
    """The model of a folder, in eval mode and in the dtype of its files.

    Args:
        folder: Holds the config and the weights.
        tensors: Headers of the weights.
        kwargs: For `timm.create_model`; ``num_classes`` asks for a new head, other arguments have
            timm adapt weights, so the caller has compared the files with their config.

    Raises:
        CheckpointError: Tensors are missing, left over, or of another shape.
    """
    dtype = kwargs.pop("dtype", None)
    kinds = {each.dtype for each in tensors.values() if each.dtype in _DTYPES}
    with building_in(torch.float64 if "F64" in kinds else torch.float32):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()
    if not kwargs:
        _check_all_read(model, tensors)
    if dtype is None and len(kinds) == 1:
        dtype = _DTYPES[kinds.pop()]
    return model if dtype is None else model.to(dtype)


def _check_all_read(model: nn.Module, tensors: Mapping[str, TensorHeader]) -> None:
    """Refuses a head of another size, which timm would fill with random numbers silently."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        held = tensors[name].shape if name in tensors else None
        if held != shapes.get(name):
            raise CheckpointError(
                f"tensor {name!r}: the file holds {held}, the config builds {shapes.get(name)}"
            )
