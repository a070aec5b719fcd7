"""The curvature of every loss against dense Jacobians and autograd's Hessian by the outputs."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sosp_hub.derivatives import Protocol, gauss_newton, sample_squares
from sosp_hub.errors import CriterionError, DataError
from sosp_hub.tasks import batch_loss, next_token, pixels, sigmoid, softmax, squared
from sosp_hub.tasks.maps import depth_error
from tests.compare import assert_close
from tests.gates.toys import group, perceptron

pytestmark = pytest.mark.slow

CLASSES = 3
INTS = torch.tensor([0, 2, 1, 1, 0, 2, 2])
SOME = torch.tensor([0, 2, -100, 1, 0, -100, 2])
NUMBERS = torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3)
YES = (NUMBERS.sin() * 7 % 1 > 0.4).double()
SHARES = NUMBERS.softmax(-1)
UNEVEN = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


class LogSoftmax(nn.Module):
    def forward(self, x):
        return x.log_softmax(-1)


# loss_fn, targets, what the model ends with, the form that is recognised
LOSSES = {
    "cross_entropy": (F.cross_entropy, INTS, nn.Identity(), "softmax"),
    "ignored": (nn.CrossEntropyLoss(), SOME, nn.Identity(), "softmax"),
    "weighted": (nn.CrossEntropyLoss(weight=UNEVEN), SOME, nn.Identity(), "softmax"),
    "smoothed": (
        functools.partial(F.cross_entropy, label_smoothing=0.2),
        SOME,
        nn.Identity(),
        "softmax",
    ),
    "shares": (F.cross_entropy, SHARES, nn.Identity(), "softmax"),
    "nll": (nn.NLLLoss(weight=UNEVEN), INTS, LogSoftmax(), "softmax"),
    "logits": (F.binary_cross_entropy_with_logits, YES, nn.Identity(), "sigmoid"),
    "positive": (
        nn.BCEWithLogitsLoss(weight=UNEVEN, pos_weight=UNEVEN.flip(0)),
        YES,
        nn.Identity(),
        "sigmoid",
    ),
    "probabilities": (F.binary_cross_entropy, YES, nn.Sigmoid(), "sigmoid"),
    "squared": (nn.MSELoss(), NUMBERS, nn.Identity(), "squared"),
    "depth": (
        lambda x, y: depth_error(x.view(-1, 1, 3), y.view(-1, 1, 3)),
        NUMBERS.clamp(min=0),
        nn.Identity(),
        "squared",
    ),
    "own softmax": (lambda x, y: softmax(x[:, :2], y), INTS % 2, nn.Identity(), "softmax"),
    "own sigmoid": (lambda x, y: sigmoid(x, y), YES, nn.Identity(), "sigmoid"),
    "own squared": (
        lambda x, y: squared(x, y, weights=UNEVEN.expand(len(x), -1)),
        NUMBERS,
        nn.Identity(),
        "squared",
    ),
}


class Ends(nn.Module):
    """A model whose logits are those of another, in another shape."""

    def __init__(self, body, end):
        super().__init__()
        self.body, self.end = body, end

    def forward(self, x):
        return self.end(self.body(x))


def _value(loss_fn, outputs, targets):
    result = loss_fn(outputs, targets)
    return result if isinstance(result, torch.Tensor) else result.value()


def dense_matrix(logits, loss, row):
    """``J' H J``: the Jacobian of all logits of the batch, the Hessian of the mean loss by them."""
    jacobian = torch.autograd.functional.jacobian(logits, row).reshape(-1, len(row))
    start = logits(row).detach()
    hessian = torch.autograd.functional.hessian(loss, start).reshape(start.numel(), -1)
    return jacobian.T @ hessian @ jacobian


@pytest.fixture
def toy():
    return perceptron()


def _groups(toy):
    return {name: group(name, "neuron", g.size, _sites(g)) for name, g in toy.groups.items()}


def _sites(of):
    return [(f"body.{site.module}", site.dim, site.index) for site in of.sites]


@pytest.mark.parametrize(("loss_fn", "targets", "end", "form"), LOSSES.values(), ids=LOSSES)
def test_the_matrix_equals_dense_jacobians(toy, loss_fn, targets, end, form):
    model, inputs = Ends(toy.model, end), toy.batch[0]
    parts = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    found = gauss_newton(model, _groups(toy), parts, Protocol(loss_fn))
    expected = dense_matrix(
        toy.logits, lambda logits: _value(loss_fn, end(logits), targets), toy.ones()
    )
    assert (found.form, found.exact) == (form, True)
    assert_close(found.matrix, expected, relative=1e-9)
    ones = toy.ones()
    slope = torch.autograd.functional.jacobian(
        lambda row: _value(loss_fn, end(toy.logits(row)), targets), ones
    )
    assert_close(found.gradient, toy.split(slope), relative=1e-9)
    value = _value(loss_fn, end(toy.logits(ones)), targets)
    assert found.loss == pytest.approx(value.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["weighted", "positive", "own squared"])
def test_drawn_targets_give_the_same_matrix_in_the_mean(toy, name):
    loss_fn, targets, end, _ = LOSSES[name]
    batches, model = [(toy.batch[0], targets)], Ends(toy.model, end)
    exact = gauss_newton(model, _groups(toy), batches, Protocol(loss_fn))
    drawn = gauss_newton(
        model, _groups(toy), batches, Protocol(loss_fn), max_classes=2, num_draws=4000
    )
    assert not drawn.exact
    assert_close(drawn.matrix, exact.matrix, relative=0.05)


PLACES = {  # what makes 12 outputs of a sample, the loss, its targets
    "pixels": (
        lambda x: x.view(-1, 3, 2, 2),
        F.cross_entropy,
        torch.arange(28).view(7, 2, 2) % 4 - 1,
    ),
    "upsampled": (
        lambda x: x.view(-1, 3, 2, 2),
        pixels,
        (torch.arange(7 * 16).view(7, 4, 4) % 4 - 1).masked_fill(
            torch.arange(7 * 16).view(7, 4, 4) % 4 == 0, 255
        ),
    ),
    "tokens": (lambda x: x.view(-1, 4, 3), next_token, torch.arange(28).view(7, 4) % 3),
    "boxes": (lambda x: x.view(-1, 4, 3), F.mse_loss, torch.arange(84.0).view(7, 4, 3).sin()),
    "labels": (
        lambda x: x.view(-1, 4, 3),
        F.binary_cross_entropy_with_logits,
        (torch.arange(84).view(7, 4, 3) % 2).double(),
    ),
}


class Wide(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.body, self.out = nn.Linear(4, 5), nn.Linear(5, 12)

    def forward(self, x, gate=1.0):
        return self.shape(self.out(torch.tanh(self.body(x)) * gate))


@pytest.mark.parametrize(("shape", "loss_fn", "targets"), PLACES.values(), ids=PLACES)
def test_sums_over_places_equal_dense_jacobians(shape, loss_fn, targets):
    model, inputs = Wide(shape).double(), torch.randn(7, 4, dtype=torch.float64)
    targets = targets.double() if targets.is_floating_point() else targets.clone()
    if loss_fn is F.cross_entropy:
        targets[targets < 0] = -100
    groups = {"n": group("n", "neuron", 5, [("out", -1, None)])}
    ones = torch.ones(5, dtype=torch.float64)
    expected = dense_matrix(
        lambda gate: model(inputs, gate),
        lambda outputs: _value(loss_fn, outputs, targets),
        ones,
    )
    parts = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    found = gauss_newton(model, groups, parts, Protocol(loss_fn), max_classes=100)
    assert found.exact
    assert_close(found.matrix, expected, relative=1e-9)
    drawn = gauss_newton(model, groups, parts, Protocol(loss_fn), max_classes=1, num_draws=4000)
    assert_close(drawn.matrix, expected, relative=0.06)


def test_a_loss_that_is_not_known_gets_the_empirical_fisher_and_says_so(toy, caplog):
    def own(outputs, targets):
        return (outputs.gather(1, targets[:, None]) - outputs.logsumexp(1, True)).mean().neg() + 0

    parts = [tuple(part[:3] for part in toy.batch), tuple(part[3:] for part in toy.batch)]
    with caplog.at_level(logging.INFO):
        found = gauss_newton(toy.model, toy.groups, parts, Protocol(own))
    assert found.form == "empirical"
    assert caplog.text.count("empirical Fisher") == 1
    rows = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda row, n=n: own(toy.logits(row)[n : n + 1], toy.batch[1][n : n + 1]),
                toy.ones(),
            )
            for n in range(7)
        ]
    )
    assert_close(found.matrix, rows.T @ rows / 7, relative=1e-9)
    squares = sample_squares(toy.model, toy.groups, parts, Protocol(own))
    assert_close(torch.cat(list(squares.second.values())), found.matrix.diagonal(), relative=1e-9)
    with pytest.raises(CriterionError, match=r"compare the outputs.*softmax\(logits, labels\)"):
        gauss_newton(toy.model, toy.groups, parts, Protocol(own), at=toy.split(toy.ones()))


def test_a_weight_that_is_told_makes_batches_of_uneven_weight_one(toy):
    """A mean over what counts, in batches in which not equally much does."""

    def own(outputs, targets):
        counts = targets != -100
        each = -outputs.log_softmax(-1)[torch.arange(len(targets)), targets.clamp(min=0)]
        return (each * counts).sum() / counts.sum(), counts.sum()

    inputs = toy.batch[0]
    parts = [(inputs[:3], SOME[:3]), (inputs[3:], SOME[3:])]
    found = gauss_newton(toy.model, toy.groups, parts, Protocol(own))
    whole = F.cross_entropy(toy.logits(toy.ones()), SOME)
    assert found.loss == pytest.approx(whole.item(), rel=1e-9)


FAULTS = {
    "distribution": (None, NUMBERS, "no distribution over classes"),
    "yes or no": (None, YES, "binary_cross_entropy_with_logits"),
    "broadcast": (F.mse_loss, NUMBERS[:, :1], r"\[7, 1\] do not fit outputs of shape \[7, 3\]"),
    "outside": (F.binary_cross_entropy_with_logits, NUMBERS, "targets from 0 to 1"),
    "sum": (nn.MSELoss(reduction="sum"), NUMBERS, "reduction='sum'.*'mean'"),
    "none": (functools.partial(F.cross_entropy, reduction="none"), INTS, "reduction='none'"),
    "no log": (F.nll_loss, INTS, "takes log-probabilities.*cross_entropy"),
    "no share": (F.binary_cross_entropy, YES, "probabilities.*with_logits"),
    "a list": (
        lambda x, y: (x - y.unsqueeze(1)).square().mean(1),
        INTS,
        r"shape \[7\].*one number",
    ),
    "attribute": (lambda x, y: x.logits.mean(), INTS, r"AttributeError.*float64 tensor.*\[7, 3\]"),
    "class": (F.cross_entropy, INTS + 1, "label 3 does not fit a head with 3 outputs"),
}


@pytest.mark.parametrize(("loss_fn", "targets", "words"), FAULTS.values(), ids=FAULTS)
def test_a_loss_that_cannot_be_right_is_an_error(toy, loss_fn, targets, words):
    with pytest.raises(DataError, match=words):
        batch_loss(toy.model, (toy.batch[0], targets), loss_fn)


def test_a_shape_is_no_reason_to_guess(toy):
    """(samples, tokens) beside (samples, tokens, classes) may be tags or the next tokens."""
    model, inputs = Wide(lambda x: x.view(-1, 4, 3)), torch.randn(7, 4)
    with pytest.raises(DataError, match=r"no loss of its own.*\n.*def loss_fn\(outputs, targets\)"):
        batch_loss(model, (inputs, torch.zeros(7, 4, dtype=torch.int64)))


def test_one_output_a_sample_has_no_classes():
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(DataError, match=r"have no classes.*mse_loss"):
        batch_loss(model, (torch.randn(7, 4), INTS), F.cross_entropy)
    found = batch_loss(model, (torch.randn(7, 4), INTS.float()), F.mse_loss)
    assert (found.predictions.form, found.weight) == ("squared", 7)
