"""Operations whose second derivative is cheap; exact second derivatives run the model under them.

PyTorch's own double backward is written for generality. Where the weights take no gradient, most
layers are linear maps, and the backward of a linear map is a linear map again: nothing has to be
stored and no weight term computed. Smooth activations, LayerNorm and attention have short closed
forms. Everything else takes PyTorch's own path. Measured by ``tests/bench/saliency.py``.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
PIECE = 2**17  # numbers; on a CPU large new tensors cost more than what is done with them


class CheapSecondDerivatives(TorchFunctionMode):
    """Swaps layers for equal ones with a short double backward, in the forward pass inside it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rewrite = _REWRITES.get(func)
        if rewrite is not None and torch.is_grad_enabled():
            output = rewrite(*args, **(kwargs or {}))
            if output is not None:
                return output
        return func(*args, **(kwargs or {}))


def _constant(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors (not quantised, not spread over devices), no gradient."""
    return all(
        tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad)
        for tensor in tensors
    )


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the first dimension, so small on a CPU that what is made of them stays in cache."""
    first, rows = tensors[0], len(tensors[0])
    if first.device.type == "cpu":
        rows = max(1, PIECE * rows // max(1, first.numel()))
    return zip(*(tensor.split(max(rows, 1)) for tensor in tensors), strict=True)


def _where_reached(backward: Callable) -> Callable:
    """A backward that hands on nothing where nothing comes, because what follows has no derivative.

    Zeros would hide that the loss does not depend on what is before.
    """

    @wraps(backward)
    def run(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad)

    return run


# Linear maps --------------------------------------------------------------------------------------


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
    @_where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        transpose, linear = ctx.maps
        return _LinearMap.apply(grad, transpose, linear, transpose), None, None, None


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    num_dims = weight.ndim - 2
    if (
        not _constant(weight, bias)
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
        return _aten.convolution(x, weight, None, *settings)

    def transpose(grad: Tensor) -> Tensor:
        return _aten.convolution_backward(
            grad, shape, weight, None, *settings, [True, False, False]
        )[0]

    return _LinearMap.apply(
        x, lambda x: _aten.convolution(x, weight, bias, *settings), transpose, linear
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _constant(weight, bias) or not x.requires_grad:
        return None
    return _LinearMap.apply(
        x,
        lambda x: F.linear(x, weight, bias),
        lambda grad: grad @ weight,
        lambda x: F.linear(x, weight),
    )


def _batch_norm(
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
        or not _constant(weight, bias)
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
    @_where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, backward = ctx.saved_tensors[0].detach(), ctx.map

        def transpose(grad: Tensor) -> Tensor:
            return backward(grad, output)

        return _LinearMap.apply(grad, transpose, transpose, transpose), None, None, None


def _relu(x: Tensor, inplace: bool = False) -> Tensor | None:
    if not x.requires_grad:
        return None
    forward = torch.relu_ if inplace else torch.relu
    return _Kinked.apply(x, forward, lambda grad, y: _aten.threshold_backward(grad, y, 0), inplace)


def _relu6(x: Tensor, inplace: bool = False) -> Tensor | None:
    if not x.requires_grad:
        return None
    forward = F.hardtanh_ if inplace else F.hardtanh
    return _Kinked.apply(
        x,
        lambda x: forward(x, 0.0, 6.0),
        lambda grad, y: _aten.hardtanh_backward(grad, y, 0, 6),
        inplace,
    )


# Smooth activations -------------------------------------------------------------------------------


class _Pointwise(Function):
    """A smooth elementwise function, given with its fused backward and its second derivative."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable, backward: Callable, second: Callable
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.functions = backward, second
        return forward(x)

    @staticmethod
    @_where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _PointwiseBackward.apply(*ctx.saved_tensors, grad, *ctx.functions), None, None, None


class _PointwiseBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, backward: Callable, second: Callable) -> Tensor:
        ctx.save_for_backward(x, grad)
        ctx.functions = backward, second
        return backward(grad, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dot: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        backward, second = ctx.functions
        grad_x = torch.empty_like(x)
        for out, *parts in pieces(grad_x, x, grad, dot):
            torch.mul(second(parts[0]).mul_(parts[1]), parts[2], out=out)
        return grad_x, backward(dot, x), None, None


def _gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    if approximate != "none" or not x.requires_grad:
        return None
    return _Pointwise.apply(x, F.gelu, _aten.gelu_backward, _gelu_second)


def _gelu_second(x: Tensor) -> Tensor:
    """``(2 - x^2) phi(x)`` with ``phi`` the normal density, in few passes over the memory."""
    factor = torch.addcmul(x.new_tensor(2), x, x, value=-1)
    log_scale = x.new_tensor(-1 - 0.5 * math.log(2 * math.pi))
    return torch.add(log_scale, factor, alpha=0.5).exp_().mul_(factor)


def _silu(x: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace or not x.requires_grad:
        return None
    return _Pointwise.apply(x, F.silu, _aten.silu_backward, _silu_second)


def _silu_second(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return (1 - 2 * sigmoid).mul_(x).add_(2).mul_(sigmoid).mul_(1 - sigmoid)


# LayerNorm ----------------------------------------------------------------------------------------


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
        output, mean, rstd = _aten.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x)
        ctx.constants = shape, weight, bias, mean, rstd
        return output

    @staticmethod
    @_where_reached
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
        result = _aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        ctx.save_for_backward(x, grad, result)
        ctx.constants = constants
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dot: Tensor) -> tuple[Tensor | None, ...]:
        x, grad, projected_grad = ctx.saved_tensors
        shape, weight, _, mean, rstd = ctx.constants
        dims = tuple(range(-len(shape), 0))
        unit = (x - mean).mul_(rstd)
        if weight is not None:
            grad = grad * weight
        # The Jacobian is symmetric: what it makes of `dot` is one more backward without weights.
        projected_dot = _aten.native_layer_norm_backward(
            dot, x, shape, mean, rstd, None, None, [True, False, False]
        )[0]
        grad_unit = (grad * unit).mean(dims, keepdim=True)
        dot_unit = (dot * unit).mean(dims, keepdim=True)
        cross = (grad * projected_dot).mean(dims, keepdim=True)
        grad_x = unit.mul_(cross)
        grad_x.addcmul_(grad_unit, projected_dot).addcmul_(dot_unit, projected_grad).mul_(-rstd)
        grad_grad = projected_dot if weight is None else projected_dot.mul_(weight)
        return grad_x, grad_grad, None, None, None, None, None


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not x.requires_grad or not _constant(weight, bias):
        return None
    return _LayerNorm.apply(x, list(normalized_shape), weight, bias, eps)


# Attention ----------------------------------------------------------------------------------------


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        score = (query @ key.mT).mul_(scale)
        share = (
            torch.softmax(score, -1) if bias is None else _aten._safe_softmax(score.add_(bias), -1)
        )
        ctx.save_for_backward(query, key, value, share)
        ctx.scale = scale
        return share @ value

    @staticmethod
    @_where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *_AttentionBackward.apply(*ctx.saved_tensors, grad.contiguous(), ctx.scale),
            None,
            None,
        )


class _AttentionBackward(Function):
    """``backward`` differentiates along a change of query, key and value (names with ``dot``)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        share: Tensor,
        grad: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_score = _aten._softmax_backward_data(grad @ value.mT, share, -1, share.dtype)
        ctx.save_for_backward(query, key, value, share, grad, grad_score)
        ctx.scale = scale
        return (grad_score @ key).mul_(scale), (grad_score.mT @ query).mul_(scale), share.mT @ grad

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query_dot: Tensor, key_dot: Tensor, value_dot: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, share, grad, grad_score = ctx.saved_tensors
        query_dot, key_dot = (
            (query_dot * ctx.scale).contiguous(),
            (key_dot * ctx.scale).contiguous(),
        )
        score_dot = (query_dot @ key.mT).add_(query @ key_dot.mT)
        score_dot.sub_((score_dot * share).sum(-1, keepdim=True))
        share_dot = share * score_dot
        grad_score_dot = score_dot.mul_(grad_score).addcmul_(share, grad @ value_dot.mT)
        grad_score_dot.addcmul_(share, grad_score_dot.sum(-1, keepdim=True), value=-1)
        return (
            (grad_score_dot @ key).mul_(ctx.scale).add_(grad_score @ key_dot),
            (grad_score_dot.mT @ query).mul_(ctx.scale).add_(grad_score.mT @ query_dot),
            share_dot.mT @ grad,
            None,
            (share_dot @ value).add_(share @ value_dot),
            None,
        )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if dropout_p or query.ndim < 3 or not _constant(attn_mask):
        return None
    if is_causal:
        attn_mask = torch.ones(
            query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
        ).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            ~attn_mask, -math.inf
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if query.shape[:-2] != key.shape[:-2] or query.shape[:-2] != value.shape[:-2]:
        return None
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return _Attention.apply(
        query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale
    )


_REWRITES: dict[Any, Callable[..., Tensor | None]] = {
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.relu: _relu,
    F.relu6: _relu6,
    F.gelu: _gelu,
    F.silu: _silu,
    F.scaled_dot_product_attention: _attention,
}
