"""The inputs that a rebuild was made with, kept beside a model so that any budget can be made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sosp_hub.errors import DataError, OutputExistsError


def write_inputs(batches: Sequence[Any], model: nn.Module, path: Path) -> None:
    """Writes inputs without labels, except where the model makes its inputs of labels.

    Raises:
        DataError: Batches that hold more than tensors.
    """
    of_labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        for name, value in _inputs(batch, of_labels).items():
            if not isinstance(value, Tensor):
                raise DataError(
                    f"output.any_budget: calibration inputs hold a {type(value).__name__} "
                    f"({name}), and only tensors are kept; leave it out"
                )
            tensors[f"{number}.{name}"] = _narrow(value).contiguous()
    save_file(tensors, path)


def read_inputs(path: Path, num_samples: int) -> list[Any]:
    """The first batches, as `sosp_hub.rebuild` takes them: dicts, or pairs without labels.

    Args:
        path: The file.
        num_samples: At most so many samples.

    Raises:
        OutputExistsError: A damaged file.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OutputExistsError(f"{path} is damaged ({error}); run the recipe again") from error
    batches: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or not name or not tensor.ndim:
            raise OutputExistsError(f"{path}: {key!r} is no input of a batch")
        wide = tensor.long() if tensor.dtype == torch.int32 else tensor
        batches.setdefault(int(number), {})[name] = wide
    found = []
    for number in sorted(batches):
        part = {name: tensor[:num_samples] for name, tensor in batches[number].items()}
        num_samples -= len(next(iter(part.values())))
        found.append(_batch(part))
        if num_samples <= 0:
            break
    return found


def _inputs(batch: Any, of_labels: bool) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return {name: x for name, x in batch.items() if of_labels or name != "labels"}
    inputs = batch[0]
    if isinstance(inputs, Mapping):
        return inputs
    inputs = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return {str(place): x for place, x in enumerate(inputs)}


def _narrow(tensor: Tensor) -> Tensor:
    """Token ids in half of their size, where they fit."""
    if tensor.dtype == torch.int64 and bool((tensor.abs() < 2**31).all()):
        return tensor.int()
    return tensor


def _batch(named: dict[str, Tensor]) -> Any:
    if not all(name.isdecimal() for name in named):
        return named
    inputs = [named[name] for name in sorted(named, key=int)]
    none = torch.zeros(len(inputs[0]))
    return (inputs[0] if len(inputs) == 1 else inputs), none
