"""What the package uses of torch and torch does not promise."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class FakeMode(FakeTensorMode):
    """Tensors without data, also for the experts of a mixture in any dtype.

    The shape function of ``aten._grouped_mm`` refuses float32 in some versions and odd sizes in
    others, although the product itself is computed for both.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_shape(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def grouped_product_flops() -> dict[Any, Any]:
    """What `FlopCounterMode` has to be told of ``aten._grouped_mm``."""
    return {torch.ops.aten._grouped_mm: _grouped_flops}


def _grouped_shape(
    left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **kwargs: Any
) -> Tensor:
    """An empty result; a matrix has its groups one behind the other, split at ``offs``."""
    groups = [] if {left.dim(), right.dim()} == {2, 3} else [(offs if left.dim() == 2 else left)]
    shape = (*(len(each) for each in groups if each is not None), left.shape[-2], right.shape[-1])
    return left.new_empty(shape, dtype=kwargs.get("out_dtype"))


def _grouped_flops(rows: tuple[int, ...], weights: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Every row meets one expert."""
    return 2 * rows[-2] * rows[-1] * weights[-1]
