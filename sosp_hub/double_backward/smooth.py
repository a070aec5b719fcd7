"""Smooth elementwise functions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sosp_hub.compat.torch import aten
from sosp_hub.double_backward.pieces import empty, pieces_with_scratch, where_reached


class Smooth(NamedTuple):
    """A smooth elementwise function.

    Attributes:
        value: The function.
        backward: Its backward, of (gradient, input).
        derivatives: Itself, its first and its second derivative of the first argument, in three of
            the four tensors that follow.
    """

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    derivatives: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Pointwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, smooth: Smooth) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.smooth = smooth
        return smooth.value(x)

    @staticmethod
    @where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _PointwiseBackward.apply(*ctx.saved_tensors, grad, ctx.smooth), None


class _PointwiseBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, smooth: Smooth) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.function = smooth
        return smooth.backward(grad, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dot: Tensor) -> tuple[Tensor | None, ...]:
        inputs = *ctx.saved_tensors, dot
        results = empty(dot), empty(dot)
        flat = (tensor.flatten() for tensor in (*inputs, *results))
        for scratch, x, grad, dot, grad_x, grad_grad in pieces_with_scratch(*flat):
            _, slope, second = ctx.function.derivatives(x, *scratch)
            torch.mul(second.mul_(grad), dot, out=grad_x)
            torch.mul(slope, dot, out=grad_grad)
        return *results, None


def smooth_source(output: Tensor) -> tuple[Tensor, Smooth] | None:
    """What ``output`` is the smooth function of, so that it need not be kept."""
    node: Any = output.grad_fn
    smooth = getattr(node, "smooth", None)
    return None if smooth is None else (node.saved_tensors[0], smooth)


def gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    """``F.gelu``; None where this is not for it."""
    if approximate != "none" or not x.requires_grad:
        return None
    return _Pointwise.apply(x, Smooth(F.gelu, aten.gelu_backward, _gelu_derivatives))


def _gelu_derivatives(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``x Phi(x)`` with the normal distribution ``Phi``, in few passes over the memory."""
    square = torch.mul(x, x, out=a)
    log_scale = x.new_tensor(-0.5 * math.log(2 * math.pi))
    density = torch.add(log_scale, square, alpha=-0.5, out=b).exp_()
    below = torch.mul(x, math.sqrt(0.5), out=c).erf_().add_(1).mul_(0.5)
    slope = torch.addcmul(below, x, density, out=d)
    return below.mul_(x), slope, square.neg_().add_(2).mul_(density)


def silu(x: Tensor, inplace: bool = False) -> Tensor | None:
    """``F.silu``; None where this is not for it."""
    if inplace or not x.requires_grad:
        return None
    return _Pointwise.apply(x, Smooth(F.silu, aten.silu_backward, _silu_derivatives))


def _silu_derivatives(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sigmoid = torch.sigmoid(x, out=a)
    value = torch.mul(x, sigmoid, out=b)
    rest = torch.sub(1, sigmoid, out=c)
    slope = torch.addcmul(sigmoid, value, rest, out=d)
    return value, slope, sigmoid.addcmul_(sigmoid, value, value=-1).add_(slope).mul_(rest)
