"""Batches of any nesting: how many samples they have, and how they are cut into parts."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sosp_hub.errors import DataError


def check_batch(batch: Any, *, targets: bool = False) -> None:
    """Sees that a batch is ``(inputs, targets)``, or a dict with a tensor.

    Args:
        batch: One batch.
        targets: A loss is wanted: arrays that are no tensors are refused among the targets too.

    Raises:
        DataError: It is something else; says what.
    """
    if isinstance(batch, Mapping):
        given = f"a dict of {', '.join(map(str, batch))}"
        fits = any(isinstance(value, Tensor) for value in batch.values())
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        given = f"inputs as {_kinds(batch[0])} and labels as {_kinds(batch[1])}"
        fits = _has_tensors(batch[0]) and not (targets and not _has_tensors(batch[1]))
    else:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        given, fits = f"a {type(batch).__name__}{length}", False
    if not fits:
        raise DataError(
            f"a batch is {given}; expected (inputs, labels) as tensors, or a dict of tensors as "
            "the model takes it (torch.from_numpy(array) makes a tensor of an array)"
        )


def _kinds(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(type(part).__name__ for part in value[:4]) or "nothing"
    return type(value).__name__


def _has_tensors(value: Any) -> bool:
    """Whether there are tensors and, beside containers, nothing else."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return bool(value) and all(_has_tensors(part) for part in value)
    return isinstance(value, Tensor)


def num_samples(batch: Any) -> int:
    """Samples of a batch: the entries of a list of dicts, else the length of the first tensor.

    Raises:
        DataError: It has none.
    """
    of_dicts = next((part for part in _lists(batch) if _one_each(part)), None)
    if of_dicts is not None:
        return len(of_dicts)
    for tensor in tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise DataError(f"a batch is a {type(batch).__name__} without a tensor; expected tensors")


def has_targets(batch: Mapping[str, Any]) -> bool:
    """Whether a dict holds more than inputs, by the names that transformers gives to targets."""
    return any(
        name.startswith("return_loss") or "label" in name or name in _TARGETS for name in batch
    )


_TARGETS = "start_positions", "end_positions", "future_values", "target_values", "targets"


def split_batch(batch: Any, most: int | None) -> list[Any]:
    """Parts of a batch with at most ``most`` samples; None = the batch as it is."""
    size = num_samples(batch)
    if most is None or size <= most:
        return [batch]
    return [_slice(batch, size, slice(start, start + most)) for start in range(0, size, most)]


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(part)


def _lists(batch: Any) -> Iterator[list[Any] | tuple[Any, ...]]:
    if isinstance(batch, tuple | list):
        yield batch
    if isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            if isinstance(part, tuple | list):
                yield from _lists(part)


def _one_each(part: Any) -> bool:
    """Whether a list has one entry a sample: dicts of boxes and the like, at least one."""
    return bool(part) and all(isinstance(entry, Mapping) for entry in part)


def _slice(batch: Any, size: int, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _slice(value, size, part) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        fits = (isinstance(entry, Tensor) and entry.ndim and len(entry) == size for entry in batch)
        if len(batch) == size and (_one_each(batch) or not any(fits)):
            return batch[part]
        return tuple(_slice(value, size, part) for value in batch)
    return batch


def described(value: Any) -> str:
    """In a few words: types, names, shapes."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        shown = (f"{name}: {described(part)}" for name, part in list(value.items())[:6])
        return f"a {type(value).__name__} of {{{', '.join(shown)}}}"
    if isinstance(value, tuple | list):
        shown = (described(part) for part in value[:4])
        return f"a {type(value).__name__} of ({', '.join(shown)})"
    return f"a {type(value).__name__}"
