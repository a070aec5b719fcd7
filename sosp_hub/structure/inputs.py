"""Example inputs of any nesting: how many samples they hold, and others like them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_CHANNELS = (1, 3, 4)


def is_images(value: Any) -> bool:
    """Whether an argument is a list of single images, which may differ in size: (C, H, W) each."""
    return (
        isinstance(value, tuple | list)
        and bool(value)
        and all(isinstance(x, Tensor) and x.dim() == 3 and len(x) in _CHANNELS for x in value)
    )


def first_tensor(inputs: Any) -> Tensor:
    """The tensor that comes first."""
    return next(_tensors(inputs))


def num_samples(inputs: Any) -> int:
    """Entries of the first argument that is a list of images, else the length of the first tensor.

    One for a first tensor without dimensions.
    """
    for value in _arguments(inputs):
        if is_images(value):
            return len(value)
        for tensor in _tensors(value):
            return int(tensor.shape[0]) if tensor.dim() else 1
    return 1


def plain_inputs(inputs: Any) -> Any:
    """The same nesting with plain dicts for mappings, such as what a tokenizer returns.

    What has none of them is returned itself.
    """
    if isinstance(inputs, Mapping):
        parts = {key: plain_inputs(value) for key, value in inputs.items()}
        same = isinstance(inputs, dict) and all(parts[key] is inputs[key] for key in parts)
        return inputs if same else parts
    if isinstance(inputs, tuple | list):
        values = [plain_inputs(value) for value in inputs]
        if all(value is before for value, before in zip(values, inputs, strict=True)):
            return inputs
        return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)
    return inputs


def num_tokens(inputs: Any) -> int:
    """Length of the first tensor, where it holds token numbers; else 0."""
    first = first_tensor(inputs)
    return int(first.shape[1]) if _holds_tokens(first) else 0


def one_sample(inputs: Any) -> str:
    """How large one sample is, in words, such as ``16 tokens`` or ``3x224x224``."""
    named = (
        inputs.items() if isinstance(inputs, Mapping) else ((None, x) for x in _arguments(inputs))
    )
    words: list[str] = []
    lengths: set[int] = set()
    for name, value in named:
        before = "" if name is None or not words else f"{name} "
        if is_images(value):
            words.append(before + _times(value[0].shape))
            continue
        for tensor in _tensors(value):
            whole = not tensor.is_floating_point() and not tensor.is_complex()
            if tensor.dim() == 2 and whole and tensor.shape[1] in lengths:  # a mask, say
                continue
            if _holds_tokens(tensor):
                lengths.add(tensor.shape[1])
                words.append(f"{tensor.shape[1]} tokens")
            else:
                words.append(f"{before}{_times(tensor.shape[1:])}")
    return ", ".join(words)


def map_named(inputs: Any, function: Callable[[str, Tensor], Tensor]) -> Any:
    """The same nesting with what ``function`` makes of each tensor and its key, if any."""
    return _mapped("", inputs, function)


def with_samples(inputs: Any, samples: Sequence[int]) -> Any:
    """The same inputs with these samples of them, which may be there more than once."""
    size, chosen = num_samples(inputs), list(samples)

    def change(_: str, value: Tensor) -> Tensor:
        return value[chosen] if value.dim() and value.shape[0] == size else value

    def changed(value: Any) -> Any:
        if is_images(value) and len(value) == size:
            return type(value)(value[i] for i in chosen)
        return map_named(value, change)

    if isinstance(inputs, Mapping):
        return {name: changed(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(changed(value) for value in inputs)
    return changed(inputs)


def _holds_tokens(tensor: Tensor) -> bool:
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return tensor.dim() == 2 and whole and not tensor.is_complex()


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "a number"


def _arguments(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in _arguments(value):
            yield from _tensors(item)


def _mapped(name: str, value: Any, function: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, Mapping):
        return {key: _mapped(str(key), item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(name, item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(name, item, function) for item in value)
    return value
