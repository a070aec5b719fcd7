"""Linear maps, whose backward is a linear map again, and piecewise linear functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sosp_hub.compat.torch import aten, no_view
from sosp_hub.double_backward.pieces import constant, where_reached


class _LinearMap(Function):
    """An affine map. Backward is ``transpose``, a linear map whose backward is ``linear``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable, transpose: Callable, linear: Callable
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.maps = transpose, linear
        return forward(x)

    @staticmethod
    @where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        transpose, linear = ctx.maps
        return _LinearMap.apply(grad, transpose, linear, transpose), None, None, None


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """``F.conv1d``, ``conv2d`` and ``conv3d``; None where this is not for it."""
    num_dims = weight.ndim - 2
    if (
        not constant(weight, bias)
        or not x.requires_grad
        or isinstance(padding, str)
        or x.ndim != weight.ndim
    ):
        return None
    stride, padding, dilation = (
        [v] * num_dims if isinstance(v, int) else list(v) * (num_dims if len(v) == 1 else 1)
        for v in (stride, padding, dilation)
    )
    settings = stride, padding, dilation, False, [0] * num_dims, groups
    shape = x.detach()

    def linear(x: Tensor) -> Tensor:
        return aten.convolution(x, weight, None, *settings)

    def transpose(grad: Tensor) -> Tensor:
        return aten.convolution_backward(
            grad, shape, weight, None, *settings, [True, False, False]
        )[0]

    return _LinearMap.apply(
        x, lambda x: aten.convolution(x, weight, bias, *settings), transpose, linear
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear``; None where this is not for it."""
    if not constant(weight, bias) or not x.requires_grad:
        return None

    def forward(x: Tensor) -> Tensor:
        return no_view(F.linear(x, weight, bias))  # models write to what their layers give

    return _LinearMap.apply(
        x,
        forward,
        lambda grad: grad @ weight,
        lambda x: F.linear(x, weight),
    )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """In eval mode a batch norm is an affine map per channel."""
    if (
        training
        or running_mean is None
        or running_var is None
        or not x.requires_grad
        or not constant(weight, bias)
    ):
        return None
    scale = (running_var + eps).rsqrt()
    scale = (
        (scale if weight is None else scale * weight).to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
    )

    def forward(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)

    return _LinearMap.apply(x, forward, scale.mul, scale.mul)


class _Kinked(Function):
    """A piecewise linear function. Its backward depends on the output alone, and is linear."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable, backward: Callable, inplace: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(x)
        output = forward(x)
        ctx.save_for_backward(output)
        ctx.map = backward
        return output

    @staticmethod
    @where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, backward = ctx.saved_tensors[0].detach(), ctx.map

        def transpose(grad: Tensor) -> Tensor:
            return backward(grad, output)

        return _LinearMap.apply(grad, transpose, transpose, transpose), None, None, None


def relu(x: Tensor, inplace: bool = False) -> Tensor | None:
    """``F.relu``; None where this is not for it."""
    if not x.requires_grad:
        return None
    forward = torch.relu_ if inplace else torch.relu
    return _Kinked.apply(x, forward, lambda grad, y: aten.threshold_backward(grad, y, 0), inplace)


def relu6(x: Tensor, inplace: bool = False) -> Tensor | None:
    """``F.relu6``; None where this is not for it."""
    if not x.requires_grad:
        return None
    forward = F.hardtanh_ if inplace else F.hardtanh
    return _Kinked.apply(
        x,
        lambda x: forward(x, 0.0, 6.0),
        lambda grad, y: aten.hardtanh_backward(grad, y, 0, 6),
        inplace,
    )
