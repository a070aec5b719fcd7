"""Batches of any nesting: how many samples they have, and how they are cut into parts."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sosp_hub.errors import DataError


def as_batch(batch: Any) -> Any:
    """What a loader gives as ``(inputs, targets)``, or as a dict of named values.

    A dataclass, and a named tuple of more than two fields, count as a dict; a tensor, or a tuple of
    one, are inputs without targets. All else is handed on.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, Mapping | type):
        return _fields(batch)
    if (names := getattr(batch, "_fields", None)) and isinstance(batch, tuple) and len(batch) > 2:
        return dict(zip(names, batch, strict=True))
    if isinstance(batch, Tensor):
        return batch, None
    return (batch[0], None) if isinstance(batch, tuple | list) and len(batch) == 1 else batch


def check_batches(batches: Any, verb: str, error: Callable[[str], Exception] = DataError) -> None:
    """Refuses what is no row of batches, above all one batch; looks at none of them.

    Args:
        batches: What was given.
        verb: Who was given it, for the message.
        error: What it makes of a message is raised.
    """
    one = isinstance(batches, Tensor | Mapping) or (
        isinstance(batches, tuple) and any(isinstance(part, Tensor) for part in batches)
    )
    if one:
        raise error(
            f"{verb} got one batch, {described(batches)}; write [(inputs, labels)], a list of "
            "batches"
        )
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise error(
            f"{verb} got {described(batches)}; expected batches, such as [(inputs, labels)] or a "
            "DataLoader"
        )


def check_batch(batch: Any, *, targets: bool = False) -> Any:
    """The batch as ``(inputs, targets)``, or as a dict with a tensor.

    Args:
        batch: One batch.
        targets: A loss is wanted: arrays that are no tensors are refused among the targets too.

    Raises:
        DataError: It is something else; says what. Or it has no samples.
    """
    batch = as_batch(batch)
    if isinstance(batch, Mapping):
        given = f"a dict of {', '.join(map(str, batch))}"
        fits = any(_has_tensors(value) for value in batch.values())
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        labels = "no labels" if batch[1] is None else f"labels as {_kinds(batch[1])}"
        given = f"inputs as {_kinds(batch[0])} and {labels}"
        fits = _has_tensors(batch[0]) and not (targets and not _has_tensors(batch[1]))
    else:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        given, fits = f"a {type(batch).__name__}{length}", False
    if not fits:
        raise DataError(
            f"a batch is {given}; expected (inputs, labels) as tensors, or a dict of tensors as "
            "the model takes it; both may be lists, tuples and dicts of tensors: of several inputs "
            "((a, b), labels). torch.from_numpy(array) makes a tensor of an array"
        )
    num_samples(batch)
    return batch


def _kinds(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(type(part).__name__ for part in value[:4]) or "nothing"
    return type(value).__name__


def _has_tensors(value: Any) -> bool:
    """Whether there are tensors, and no arrays of other kinds."""
    return any(True for _ in tensors(value)) and not _has_arrays(value)


def _has_arrays(value: Any) -> bool:
    parts = _parts(value)
    if parts is None:
        return not isinstance(value, Tensor) and hasattr(value, "__array__")
    return any(_has_arrays(part) for part in parts)


def is_listed(batch: Any) -> bool:
    """Whether ``(inputs, targets)`` are lists with an entry a sample, as detectors take them."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    inputs, targets = batch
    return (
        isinstance(inputs, tuple | list)
        and isinstance(targets, tuple | list)
        and len(inputs) == len(targets)
        and _one_each(targets)
    )


def in_step(
    batches: Iterable[Any], process_sum: Callable[[Tensor], Tensor], nothing: Exception
) -> Iterator[tuple[Any, bool]]:
    """As many batches on every process, each with whether it counts.

    All processes gather sharded weights (FSDP2) together: one that is done gets its last batch
    again, for nothing, until the others are done too.

    Args:
        batches: Of this process.
        process_sum: Sum of a tensor over all processes.
        nothing: Is raised, on all of them, where a process has no batch and others have.
    """
    mine, last = iter(batches), None
    while True:
        batch = next(mine, None)
        waits = torch.tensor([batch is not None, batch is None and last is None]).double()
        busy, idle = process_sum(waits).tolist()
        if idle and busy:
            raise nothing
        if not busy:
            return
        last = last if batch is None else batch
        yield last, batch is not None


def num_samples(batch: Any) -> int:
    """Samples of a batch: the entries of a list of dicts, else the length of the first tensor.

    A dict without a tensor of its own, only with lists of them, has as many as its lists.

    Raises:
        DataError: There is no tensor, or it has no samples.
    """
    number = _length(batch)
    if number == 0:
        shapes = ", ".join(str(tuple(each.shape)) for each in tensors(batch))
        raise DataError(f"a batch has no samples (shapes {shapes}); leave it out")
    return number


def _length(batch: Any) -> int:
    of_dicts = next((part for part in _lists(batch) if _one_each(part)), None)
    if of_dicts is not None:
        return len(of_dicts)
    if isinstance(batch, Mapping):
        lengths = {len(value) for value in batch.values() if isinstance(value, list)}
        own = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        if own or len(lengths) == 1:
            return len(own[0]) if own else lengths.pop()
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
    for part in _parts(batch) or ():
        yield from tensors(part)


def _parts(value: Any) -> list[Any] | None:
    """What a container holds; None for what is none."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(_fields(value).values())
    return None


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _lists(batch: Any) -> Iterator[list[Any] | tuple[Any, ...]]:
    if isinstance(batch, tuple | list):
        yield batch
    for part in _parts(batch) or ():
        if isinstance(part, tuple | list):
            yield from _lists(part)


def _one_each(part: Any) -> bool:
    """Whether a list has one entry a sample: dicts of boxes and the like, at least one."""
    return bool(part) and all(isinstance(entry, Mapping) for entry in part)


def _slice(batch: Any, size: int, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {
            key: value[part]
            if isinstance(value, list) and len(value) == size
            else _slice(value, size, part)
            for key, value in batch.items()
        }
    if is_listed(batch):
        return tuple(each[part] for each in batch)
    if isinstance(batch, tuple | list):
        fits = (isinstance(entry, Tensor) and entry.ndim and len(entry) == size for entry in batch)
        if len(batch) == size and (_one_each(batch) or not any(fits)):
            return batch[part]
        parts = [_slice(value, size, part) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    if (named := _parts(batch)) is not None:
        names = [field.name for field in dataclasses.fields(batch)]
        sliced = (_slice(value, size, part) for value in named)
        return dataclasses.replace(batch, **dict(zip(names, sliced, strict=True)))
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
