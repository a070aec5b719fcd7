"""Scaled dot-product attention."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sosp_hub.compat.torch import safe_softmax, softmax_backward
from sosp_hub.double_backward.pieces import constant, empty, fitting, where_reached


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
    @where_reached
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
        results = empty(query), empty(key), empty(value)
        tensors = (query, key, value, bias, share, grad, *results)
        for q, k, v, shift, p, g, q_grad, k_grad, v_grad in _blocks(*tensors):
            if share is None:
                p = _share(q, k, shift, scale)
            torch.bmm(p.mT, g, out=v_grad)
            score_grad = softmax_backward(torch.bmm(g, v.mT), p)
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
        results = empty(query), empty(key), empty(value), empty(grad)
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
            score_grad_dot = softmax_backward(score_grad_dot, p)
            score_grad = value_grad.mul_(p)
            torch.bmm(score_grad_dot, k, out=out[0]).mul_(scale).baddbmm_(score_grad, k_dot)
            torch.bmm(score_grad_dot.mT, q, out=out[1]).mul_(scale).baddbmm_(score_grad.mT, q_dot)
        return (*results[:3], None, results[3], None, None)


def _blocks(query: Tensor, key: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Some heads, one behind the other, whose scores stay in a CPU's cache; elsewhere all."""
    samples, heads, rows = query.shape[:3]
    most = samples * heads
    if query.device.type == "cpu":
        most = fitting(rows * key.shape[2])

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
    share = safe_softmax(score.add_(bias))
    return share if out is None else out.copy_(share)


def _deviation(x: Tensor, share: Tensor) -> Tensor:
    """``x`` less its mean over the last dimension, weighted by the shares; written over ``x``."""
    return x.sub_((x * share).sum(-1, keepdim=True))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``F.scaled_dot_product_attention``; None where this is not for it."""
    if dropout_p or query.ndim < 3 or not constant(attn_mask):
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
