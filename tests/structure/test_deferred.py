"""Parameters that are computed where an operation reads them."""

import gc
import weakref

import pytest
import torch
from torch import nn

from sosp_hub.structure.copies import copy_model, share_model
from sosp_hub.structure.deferred import WhereRead, at_once, data_of, deferred, is_deferred
from tests.compare import assert_close


@pytest.fixture(autouse=True)
def _whatever_its_size(monkeypatch):
    monkeypatch.setattr("sosp_hub.structure.deferred._SMALL", 0)


def doubled(parameter):
    return deferred(lambda: 2 * data_of(parameter), parameter)


def test_it_looks_like_what_it_stands_for():
    like = nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16).T)
    found = doubled(like)
    assert isinstance(found, nn.Parameter)
    assert is_deferred(found)
    assert not is_deferred(like)
    assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), like.dtype)
    assert found.device == like.device
    other = deferred(lambda: like.double()[:2], like, shape=(2, 4), dtype=torch.float64)
    assert (other.shape, other.dtype) == ((2, 4), torch.float64)


def test_operations_get_its_data_and_those_of_what_is_made_of_it():
    like, x = nn.Parameter(torch.randn(3, 5)), torch.randn(2, 5)
    twice = doubled(like)
    four = doubled(twice)
    with torch.no_grad(), WhereRead():
        assert_close(torch.nn.functional.linear(x, four), 4 * x @ like.T)
        assert_close(torch.cat([twice, four]), torch.cat([2 * like, 4 * like]))
        assert float(twice.sum()) == pytest.approx(2 * float(like.sum()), rel=1e-5)


def test_named_arguments_have_their_data_too():
    """Such as a learned mask of attention."""
    q, mask = torch.randn(1, 1, 4, 8), nn.Parameter(torch.randn(1, 1, 4, 4))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), WhereRead():
        found = attend(q, q, q, attn_mask=doubled(mask))[0]
    shares = (q @ q.mT / 8**0.5 + 2 * mask).softmax(-1)
    assert_close(found, (shares @ q).detach(), relative=1e-5)


def test_without_the_mode_nothing_can_be_read():
    found = doubled(nn.Parameter(torch.randn(3, 5)))
    with torch.no_grad(), pytest.raises(Exception):  # noqa: B017 - torch has many types
        float((torch.randn(2, 5) @ found.T).sum())


def test_copies_of_a_model_have_the_same():
    model = nn.Linear(100, 90)
    twin = share_model(model, {"bias"}, instead=lambda _, p: doubled(p))
    assert not is_deferred(twin.bias)
    assert is_deferred(twin.weight)
    assert share_model(twin).weight is twin.weight
    assert copy_model(twin).weight is twin.weight
    again = share_model(twin, {"bias"}, instead=lambda _, p: doubled(p))
    x = torch.randn(2, 100)
    with torch.no_grad(), WhereRead():
        assert_close(again(x), x @ (4 * model.weight).T + model.bias, relative=1e-5)


def test_it_can_be_computed_at_once():
    like = nn.Parameter(torch.randn(3, 5))
    with at_once():
        found = doubled(like)
    assert not is_deferred(found)
    assert_close(found.detach(), 2 * like.detach(), relative=0)
    assert is_deferred(doubled(like))


def test_a_small_one_is_computed_at_once(monkeypatch):
    monkeypatch.setattr("sosp_hub.structure.deferred._SMALL", 15)
    assert not is_deferred(doubled(nn.Parameter(torch.randn(3, 5))))
    assert is_deferred(doubled(nn.Parameter(torch.randn(4, 4))))


def test_what_it_is_made_of_goes_with_it():
    like = nn.Parameter(torch.randn(3, 5))
    found, seen = doubled(like), weakref.ref(like)
    del like
    assert seen() is not None
    del found
    gc.collect()
    assert seen() is None
