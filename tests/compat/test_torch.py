"""What `sosp_hub.compat.torch` makes of torch."""

import pytest
import torch

from sosp_hub.compat.torch import FakeMode

PRODUCTS = {  # left, right, the result; in the first, second and fourth two groups end at 3 and 8
    "rows of groups, by matrices": ((8, 6), (2, 6, 5), (8, 5)),
    "groups of rows, by columns of groups": ((2, 5, 6), (6, 8), (5, 8)),
    "groups by groups": ((2, 3, 6), (2, 6, 5), (2, 3, 5)),
    "columns of groups, by rows of groups": ((5, 8), (8, 6), (2, 5, 6)),
}


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products_without_data_know_their_shape(case, dtype):
    """Also in sizes that are no multiples of 16 bytes, which a kernel for matrices wants."""
    left, right, expected = PRODUCTS[case]
    with FakeMode():
        a, b = torch.empty(left, dtype=dtype), torch.empty(right, dtype=dtype)
        ends = None if len(left) == len(right) == 3 else torch.empty(2, dtype=torch.int32)
        product = torch._grouped_mm(a, b, ends)
    assert (tuple(product.shape), product.dtype) == (expected, dtype)
