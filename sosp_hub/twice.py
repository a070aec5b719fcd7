"""Operations whose second derivative is cheap; exact second derivatives run the model under them.

PyTorch's own double backward is written for generality. Where the weights take no gradient, most
layers are linear maps, and the backward of a linear map is a linear map again: nothing has to be
stored and no weight term computed. Smooth activations, LayerNorm and attention have short closed
forms. Everything else takes PyTorch's own path. Measured by ``tests/bench/saliency.py``.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

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


def pieces(*tensors: Tensor, share: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the first dimension, so small on a CPU that what is made of them stays in cache."""
    first, rows = tensors[0], len(tensors[0])
    if first.device.type == "cpu":
        rows = max(1, PIECE // share * rows // max(1, first.numel()))
    return zip(*(tensor.split(max(rows, 1)) for tensor in tensors), strict=True)


def pieces_with_scratch(*tensors: Tensor) -> Iterator[tuple[list[Tensor], *tuple[Tensor, ...]]]:
    """As ``pieces``, smaller, each with four tensors like its first to write on."""
    scratch = []
    for parts in pieces(*tensors, share=4):
        scratch = scratch or [torch.empty_like(parts[0]) for _ in range(4)]
        yield [tensor[: len(parts[0])] for tensor in scratch], *parts


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
    @_where_reached
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
        results = _empty(dot), _empty(dot)
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


def _gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    if approximate != "none" or not x.requires_grad:
        return None
    return _Pointwise.apply(x, Smooth(F.gelu, _aten.gelu_backward, _gelu_derivatives))


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


def _silu(x: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace or not x.requires_grad:
        return None
    return _Pointwise.apply(x, Smooth(F.silu, _aten.silu_backward, _silu_derivatives))


def _silu_derivatives(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sigmoid = torch.sigmoid(x, out=a)
    value = torch.mul(x, sigmoid, out=b)
    rest = torch.sub(1, sigmoid, out=c)
    slope = torch.addcmul(sigmoid, value, rest, out=d)
    return value, slope, sigmoid.addcmul_(sigmoid, value, value=-1).add_(slope).mul_(rest)


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
            _aten.native_layer_norm_backward(
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
    """All have the shape ``(samples, heads, positions, features)``.

    The shares are kept where that takes no more than query, key, value and their gradient do;
    between many positions they are made again where they are used.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        output = value.new_empty(*query.shape[:3], value.shape[3])
        share = None
        if key.shape[2] <= 4 * query.shape[3]:
            share = query.new_empty(*query.shape[:3], key.shape[2])
        ctx.save_for_backward(query, key, value, share)
        ctx.constants = bias, scale
        for q, k, v, shift, p, out in _blocks(query, key, value, bias, share, output):
            torch.bmm(_share(q, k, shift, scale, p), v, out=out)
        return output

    @staticmethod
    @_where_reached
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *_AttentionBackward.apply(*ctx.saved_tensors, grad, *ctx.constants),
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
        share: Tensor | None,
        grad: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, share, grad)
        ctx.constants = bias, scale
        results = _empty(query), _empty(key), _empty(value)
        tensors = (query, key, value, bias, share, grad, *results)
        for q, k, v, shift, p, g, q_grad, k_grad, v_grad in _blocks(*tensors):
            if share is None:
                p = _share(q, k, shift, scale)
            torch.bmm(p.mT, g, out=v_grad)
            score_grad = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
            torch.bmm(score_grad, k, out=q_grad).mul_(scale)
            torch.bmm(score_grad.mT, q, out=k_grad).mul_(scale)
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query_dot: Tensor, key_dot: Tensor, value_dot: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, share, grad = ctx.saved_tensors
        bias, scale = ctx.constants
        results = _empty(query), _empty(key), _empty(value), _empty(grad)
        tensors = (query, key, value, bias, share, grad, query_dot, key_dot, value_dot, *results)
        for q, k, v, shift, p, g, q_dot, k_dot, v_dot, *out in _blocks(*tensors):
            if share is None:
                p = _share(q, k, shift, scale)
            q_dot, k_dot = q_dot * scale, k_dot * scale
            # Deviations from the mean over the keys, weighted by their shares.
            score_dot = _deviation(torch.bmm(q_dot, k.mT).baddbmm_(q, k_dot.mT), p)
            value_grad = _deviation(torch.bmm(g, v.mT), p)
            share_dot = p * score_dot
            torch.bmm(share_dot.mT, g, out=out[2])
            torch.bmm(share_dot, v, out=out[3]).baddbmm_(p, v_dot)
            score_grad_dot = score_dot.mul_(value_grad).baddbmm_(g, v_dot.mT)
            score_grad_dot = torch._softmax_backward_data(score_grad_dot, p, -1, p.dtype)
            score_grad = value_grad.mul_(p)
            torch.bmm(score_grad_dot, k, out=out[0]).mul_(scale).baddbmm_(score_grad, k_dot)
            torch.bmm(score_grad_dot.mT, q, out=out[1]).mul_(scale).baddbmm_(score_grad.mT, q_dot)
        return (*results[:3], None, results[3], None, None)


def _blocks(query: Tensor, key: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Some heads, one behind the other, whose scores stay in a CPU's cache; elsewhere all."""
    samples, heads, rows = query.shape[:3]
    most = samples * heads
    if query.device.type == "cpu":
        most = max(1, PIECE // (rows * key.shape[2]))

    def split(tensor: Tensor) -> Iterator[Tensor]:
        for sample in tensor.split(max(1, most // heads)):
            yield from sample.flatten(0, 1).split(most)

    absent = itertools.repeat(None)
    tensors = query, key, *tensors
    return zip(*(absent if t is None else split(t) for t in tensors), strict=False)


def _share(
    query: Tensor, key: Tensor, bias: Tensor | None, scale: float, out: Tensor | None = None
) -> Tensor:
    """How much of each value a query takes."""
    score = torch.bmm(query * scale, key.mT)
    if bias is None:
        return torch.softmax(score, -1, out=out)
    share = _aten._safe_softmax(score.add_(bias), -1)
    return share if out is None else out.copy_(share)


def _deviation(x: Tensor, share: Tensor) -> Tensor:
    """``x`` less its mean over the last dimension, weighted by the shares; written over ``x``."""
    return x.sub_((x * share).sum(-1, keepdim=True))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


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
    if attn_mask is not None:
        attn_mask = _four_dimensional(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
    output = _Attention.apply(
        *map(_four_dimensional, (query, key, value)),
        attn_mask,
        query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return output.view(*query.shape[:-1], value.shape[-1])


def _four_dimensional(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 4 else tensor.reshape(-1, *tensor.shape[-3:])


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
