"""Every rewritten operation equals PyTorch's own, up to the second derivative."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sosp_hub.double_backward import _REWRITES, CheapSecondDerivatives, pieces
from tests.compare import assert_close


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


_mask = torch.rand(5, 7) < 0.7
_mask[:, 0] = True

CASES = {
    "conv1d": (F.conv1d, (2, 4, 9), lambda x: (x, _random(6, 2, 3), _random(6), 2, 1, 1, 2)),
    "conv2d": (F.conv2d, (2, 4, 7, 6), lambda x: (x, _random(6, 4, 3, 2), _random(6), (2, 1), 1)),
    "conv2d_depthwise": (
        F.conv2d,
        (2, 4, 6, 6),
        lambda x: (x, _random(4, 1, 3, 3), None, 1, 2, 2, 4),
    ),
    "conv3d": (F.conv3d, (2, 2, 4, 5, 4), lambda x: (x, _random(3, 2, 2, 2, 2))),
    "conv2d_same": (F.conv2d, (2, 4, 6, 6), lambda x: (x, _random(4, 4, 3, 3), None, 1, "same")),
    "linear": (F.linear, (2, 3, 4), lambda x: (x, _random(5, 4), _random(5))),
    "linear_one_row": (F.linear, (4,), lambda x: (x, _random(5, 4))),
    "batch_norm": (
        F.batch_norm,
        (3, 4, 5),
        lambda x: (x, _random(4), _random(4).square() + 0.1, _random(4), _random(4)),
    ),
    "batch_norm_plain": (F.batch_norm, (3, 4), lambda x: (x, _random(4), _random(4).square() + 1)),
    "batch_norm_training": (
        F.batch_norm,
        (3, 4, 5),
        lambda x: (x, None, None, _random(4), None, True),
    ),
    "relu": (F.relu, (3, 4), lambda x: (x,)),
    "relu_inplace": (lambda x: F.relu(x * 2, inplace=True), (3, 4), lambda x: (x,)),
    "relu6": (lambda x: F.relu6(x * 5), (9, 4), lambda x: (x,)),
    "relu6_inplace": (lambda x: F.relu6(x * 5, inplace=True), (9, 4), lambda x: (x,)),
    "attention": (
        F.scaled_dot_product_attention,
        (3, 2, 2, 5, 4),
        lambda x: (*x[:2], x[2][..., :3]),
    ),
    "attention_of_many": (  # more positions than what is kept of the shares
        F.scaled_dot_product_attention,
        (3, 2, 3, 9, 2),
        lambda x: x.unbind(),
    ),
    "attention_of_many_masked": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (3, 2, 3, 9, 2),
        lambda x: x.transpose(2, 3).reshape(3, 2, 9, 3, 2).transpose(2, 3).unbind(),
    ),
    "attention_without_samples": (F.scaled_dot_product_attention, (3, 2, 5, 4), tuple),
    "attention_of_five_dimensions": (
        F.scaled_dot_product_attention,
        (3, 2, 1, 3, 5, 4),
        lambda x: (*x, torch.ones(3, 5, 5).tril().bool()),
    ),
    "attention_causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        (3, 2, 2, 5, 4),
        lambda x: x.unbind(),
    ),
    "attention_masked": (
        F.scaled_dot_product_attention,
        (2, 2, 12, 4),
        lambda x: (x[..., :5, :], x[..., 5:, :], x[..., 5:, :].sin(), _mask),
    ),
    "attention_biased": (
        F.scaled_dot_product_attention,
        (2, 2, 5, 4),
        lambda x: (x, x.cos(), x.sin(), _random(2, 1, 5, 5)),
    ),
    "attention_gqa": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k.sin(), enable_gqa=True),
        (2, 6, 5, 4),
        lambda x: (x[:, :4], x[:, 4:]),
    ),
    "attention_broadcast": (
        F.scaled_dot_product_attention,
        (2, 2, 5, 4),
        lambda x: (x, x[:1], x[:1].sin()),
    ),
}


def _derivatives(function, x, make):
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    arguments = make(leaf)
    output = function(*arguments)
    scalar = (output * torch.randn_like(output)).sum() + output.pow(3).sum()
    (first,) = torch.autograd.grad(scalar, leaf, create_graph=True)
    direction = torch.randn_like(first)
    (second,) = torch.autograd.grad(first, leaf, direction, allow_unused=True)
    return output, first, second


@pytest.mark.parametrize("piece", [pieces.PIECE, 50], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name, piece, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", piece)
    function, shape, make = CASES[name]
    x = _random(*shape)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = _derivatives(function, x, make)
        with CheapSecondDerivatives():
            found = _derivatives(function, x, make)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, relative=1e-10, what=name)


def test_every_rewrite_is_tried_and_taken(monkeypatch):
    taken = set()
    for function, rewrite in list(_REWRITES.items()):

        def spy(*args, rewrite=rewrite, function=function, **kwargs):
            output = rewrite(*args, **kwargs)
            if output is not None:
                taken.add(function)
            return output

        monkeypatch.setitem(_REWRITES, function, spy)
    for function, shape, make in CASES.values():
        with CheapSecondDerivatives():
            function(*make(_random(*shape).requires_grad_()))
    assert taken == set(_REWRITES)


def test_a_weight_that_takes_a_gradient_is_left_to_pytorch():
    weight = _random(5, 4).requires_grad_()
    x = _random(2, 4).requires_grad_()
    with CheapSecondDerivatives():
        F.linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_a_row_that_sees_nothing_gives_zeros_as_pytorch_does():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    x = _random(1, 1, 3, 2).requires_grad_()
    with CheapSecondDerivatives():
        assert_close(F.scaled_dot_product_attention(x, x, x, mask), torch.zeros(1, 1, 3, 2))


def test_a_saved_tensor_that_is_written_over_is_noticed():
    x = _random(3).requires_grad_()
    with CheapSecondDerivatives():
        z = F.relu(x * 2)
    with torch.no_grad():
        z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_attention_with_dropout_drops():
    """A model may drop in eval mode too; the same numbers are drawn then."""
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))

    def run():
        torch.manual_seed(1)
        q = query.clone().requires_grad_()
        return F.scaled_dot_product_attention(q, key, value, dropout_p=0.5)

    with sdpa_kernel(SDPBackend.MATH):
        expected = run()
        with CheapSecondDerivatives():
            found = run()
    assert_close(found.detach(), expected.detach(), relative=1e-6)


@pytest.mark.parametrize(("places", "kept"), [(8, True), (64, False)])
def test_between_many_positions_no_table_of_shares_is_kept(places, kept):
    """It would take the memory that long texts and large pictures do not have."""
    query, key, value = (torch.randn(1, 2, places, 4) for _ in range(3))
    sizes = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ),
        CheapSecondDerivatives(),
    ):
        output = F.scaled_dot_product_attention(query.requires_grad_(), key, value)
        (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
        gradient.square().sum().backward()
    assert any(size >= 2 * places * places for size in sizes) == kept


def written_over(function):
    """Goes on with the tensor that was changed in place, not with what the call returned."""

    def run(x):
        y = x * 2
        function(y, inplace=True)
        return y

    return run


@pytest.mark.parametrize(
    "function",
    [
        *map(written_over, (F.relu, F.relu6)),
        lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
        lambda x: F.batch_norm(x, None, None, training=True),
    ],
    ids=["relu_", "relu6_", "batch statistics", "no statistics"],
)
def test_what_a_model_does_besides_is_derived_as_it_is(function):
    x = torch.randn(6, 4)
    found = []
    for context in (contextlib.nullcontext(), CheapSecondDerivatives()):
        leaf = x.clone().requires_grad_()
        with context:
            output = function(leaf)
        (gradient,) = torch.autograd.grad((output + 1).pow(3).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        found.append((output.detach(), gradient.detach(), leaf.grad))
    assert_close(found[1], found[0], relative=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.ReLU6()],  # torch refuses it after a ReLU
    ids=["linear", "without bias", "relu6"],
)
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_what_a_layer_gives_may_be_written_to(layer, shape, part):
    """As Conditional DETR does with its boxes: ``boxes[..., :2] += reference``."""
    layer.requires_grad_(False)

    def derivatives(mode):
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_()
        with mode:
            y = layer(x)
            target = y[..., :2] if part else y
            target += x.square().sum()
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    found = derivatives(CheapSecondDerivatives())
    assert_close(found, derivatives(contextlib.nullcontext()), relative=1e-5)
