"""What a loss is made of, against sums written out."""

import pytest
import torch
import torch.nn.functional as F

from sosp_hub.errors import DataError
from sosp_hub.tasks import sigmoid, softmax
from tests.compare import assert_close

MINE = torch.linspace(-2, 2, 12, dtype=torch.float64).view(4, 3).sin()
DENSE = torch.linspace(1, -3, 12, dtype=torch.float64).view(4, 3).cos()
LABELS = torch.tensor([0, 2, -100, 1])
COUNTED = LABELS >= 0


def test_the_divergence_is_that_from_the_dense_model():
    """Its expectation is over the dense model's classes."""
    share = DENSE.softmax(-1)
    each = (share * (share.log() - MINE.softmax(-1).log())).sum(-1)
    found = softmax(MINE, LABELS).divergence(softmax(DENSE, LABELS))
    assert_close(found, each[COUNTED].mean(), relative=1e-12)


def test_places_that_do_not_count_are_no_distance():
    other = torch.where(COUNTED[:, None], MINE, MINE + torch.tensor([5.0, 0.0, -5.0]))
    found, expected = (softmax(x, LABELS).divergence(softmax(DENSE, LABELS)) for x in (other, MINE))
    assert_close(found, expected, relative=0)


def test_the_curvature_under_a_squared_form_is_one():
    logits = MINE.clone().requires_grad_()
    found = softmax(logits, LABELS).as_form("squared")
    total = (found.weights * (found.values - found.targets.detach()).square()).sum()
    (first,) = torch.autograd.grad(total, logits, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logits)
    assert_close(second, COUNTED[:, None].expand(4, 3).double(), relative=1e-12)


def test_smoothed_answers_are_drawn_to_the_middle():
    targets = (DENSE > 0).double()
    expected = F.binary_cross_entropy_with_logits(MINE + 1, targets * 0.8 + 0.1)
    assert_close(sigmoid(MINE + 1, targets).value(0.2), expected, relative=1e-12)


@pytest.mark.parametrize("odd", [-0.1, 1.5, float("nan")])
def test_answers_are_shares(odd):
    targets = torch.full((4, 3), 0.5, dtype=torch.float64)
    targets[1, 2] = odd
    with pytest.raises(DataError, match=r"0|1"):
        sigmoid(MINE, targets)
