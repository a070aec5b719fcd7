"""The comparison itself is seen to fail on everything that it must notice."""

import pytest
import torch

from tests.compare import assert_close

ONE = torch.tensor([1.0, -2.0])


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (ONE + 1e-4, ONE, "relative error 5e-05"),
        (ONE[:1], ONE, "shape"),
        (ONE * torch.nan, ONE, "2 values are NaN"),
        (ONE, ONE * torch.nan, "expected values hold NaN"),
        (ONE * torch.inf, ONE, "relative error inf"),
        (torch.zeros(0), torch.zeros(0), "nothing to compare"),
        ({}, {}, "nothing to compare"),
        ([], [], "nothing to compare"),
        ({"a": ONE}, {"b": ONE}, r"missing \['b'\], extra \['a'\]"),
        ({"a": {"b": ONE + 1}}, {"a": {"b": ONE}}, r"value\['a'\]\['b'\]: relative"),
        ([ONE, ONE], [ONE], "2 items, not 1"),
        (ONE, [ONE], "expected a list"),
        (None, ONE, "cannot compare a NoneType"),
        (1e-4, 0.0, "relative error 0.0001"),
        (torch.tensor([3]), torch.tensor([4]), r"worst at \(0,\): 3, expected 4"),
    ],
)
def test_a_difference_raises(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected)


def test_equal_values_pass():
    assert_close({"a": [ONE, 2.0], "b": ONE.half()}, {"a": (ONE, 2), "b": ONE}, relative=0)
    assert_close(ONE * torch.inf, ONE * torch.inf)
    assert_close(ONE + 1e-6, ONE)
