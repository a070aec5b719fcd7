"""LayerNorm."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sosp_hub.compat.torch import aten
from sosp_hub.double_backward.pieces import constant, where_reached


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        output, mean, rstd = aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x)
        ctx.constants = shape, weight, bias, mean, rstd
        return output

    @staticmethod
    @where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            _LayerNormBackward.apply(*ctx.saved_tensors, grad, *ctx.constants),
            None,
            None,
            None,
            None,
        )


class _LayerNormBackward(Function):
    """The Jacobian is ``P / std``, where ``P`` projects off the ones and the normalised input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, *constants: Any) -> Tensor:
        shape, weight, bias, mean, rstd = constants
        result = aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        ctx.save_for_backward(x, grad)
        ctx.constants = constants
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dot: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        shape, weight, _, mean, rstd = ctx.constants
        dims = tuple(range(-len(shape), 0))
        unit = (x - mean).mul_(rstd)
        if weight is not None:
            grad = grad * weight
        # The Jacobian is symmetric: what it makes of a tensor is a backward without weights.
        projected_dot, projected_grad = (
            aten.native_layer_norm_backward(
                tensor, x, shape, mean, rstd, None, None, [True, False, False]
            )[0]
            for tensor in (dot, grad)
        )
        grad_unit = (grad * unit).mean(dims, keepdim=True)
        dot_unit = (dot * unit).mean(dims, keepdim=True)
        cross = (grad * projected_dot).mean(dims, keepdim=True)
        grad_x = unit.mul_(cross)
        grad_x.addcmul_(grad_unit, projected_dot).addcmul_(dot_unit, projected_grad).mul_(-rstd)
        grad_grad = projected_dot if weight is None else projected_dot.mul_(weight)
        return grad_x, grad_grad, None, None, None, None, None


def layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """``F.layer_norm``; None where this is not for it."""
    if not x.requires_grad or not constant(weight, bias):
        return None
    return _LayerNorm.apply(x, list(normalized_shape), weight, bias, eps)
