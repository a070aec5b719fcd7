"""The one comparison of the tests. It raises; it returns no bool that could be forgotten."""

from collections.abc import Mapping, Sequence
from numbers import Number

import torch
from torch import Tensor


def assert_close(actual, expected, *, relative: float = 1e-5, what: str = "value") -> None:
    """Raises unless `actual` equals `expected`, tensor by tensor.

    The error of a tensor is its largest absolute difference over the largest absolute value of the
    expected tensor (over 1 where that is all zero). Mappings must have the same keys and sequences
    the same length; tensors must have the same shape, and no value may be NaN. Comparing nothing
    (an empty mapping, a tensor without elements) raises too: such a check could never fail.

    Args:
        actual: A tensor, number, or nested mapping or sequence of them.
        expected: The same from the oracle.
        relative: Largest error that passes; 0 asks for equal values.
        what: What is compared, for the message.
    """
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{what}: a {type(actual).__name__}, expected a mapping"
        odd = [sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())]
        assert odd == [[], []], f"{what}: missing {odd[0]}, extra {odd[1]}"
        keys = list(expected)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert isinstance(actual, Sequence), f"{what}: a {type(actual).__name__}, expected a list"
        assert len(actual) == len(expected), f"{what}: {len(actual)} items, not {len(expected)}"
        keys = list(range(len(expected)))
    else:
        _assert_tensor_close(_tensor(actual, what), _tensor(expected, what), relative, what)
        return
    assert keys, f"{what}: nothing to compare"
    for key in keys:
        assert_close(actual[key], expected[key], relative=relative, what=f"{what}[{key!r}]")


def _tensor(value, what: str) -> Tensor:
    assert isinstance(value, Tensor | Number), f"{what}: cannot compare a {type(value).__name__}"
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


def _assert_tensor_close(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert expected.numel(), f"{what}: nothing to compare"
    assert not expected.isnan().any(), f"{what}: the expected values hold NaN"
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} values are NaN"
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())  # inf equals inf
    scale = expected.abs().max().item() or 1.0
    error = difference.max().item() / scale
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    assert error <= relative, (
        f"{what}: relative error {error:.3g}, allowed {relative:.3g}; "
        f"worst at {where}: {actual[where].item():.9g}, expected {expected[where].item():.9g}"
    )
