"""What a loss reads of a model's outputs, place by place: so its curvature is known."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sosp_hub.data.ignored import IGNORED
from sosp_hub.errors import DataError

_TOLERANCE = 1e-3  # of probabilities that have to sum to 1

Form = Literal["softmax", "sigmoid", "squared"]
"""How a place's outputs enter the loss: as logits of one class among several, as the logit of yes,
or as a number that should equal the target."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """A loss as a weighted sum over places: ``sum(weights * losses) / weight``.

    A place is a sample, token, pixel or number; each has its own logits and its own target. The
    second derivative of the loss by the outputs is therefore known: at each place ``weights`` times
    ``diag(p) - p p'`` (softmax), ``p (1 - p)`` (sigmoid) or 2 (squared).

    Attributes:
        form: How outputs enter the loss.
        values: What the loss reads: ``(samples, places, classes)`` for ``softmax``, else
            ``(samples, places)``.
        targets: Of each place: the class as a whole number, or a probability of each class; for the
            other forms a number.
        weights: How much each place counts, 0 where its target is none: ``(samples, places)``.
        weight: What the sum is divided by: samples, or tokens that count.
    """

    form: Form
    values: Tensor
    targets: Tensor
    weights: Float[Tensor, "samples places"]
    weight: float

    def losses(self, smoothing: float = 0.0) -> Float[Tensor, "samples places"]:
        """The loss of each place; anything where it has no weight.

        Args:
            smoothing: Share of the target that goes to all classes alike.
        """
        values = at_least_float32(self.values)
        if self.form == "squared":
            return (values - self.targets).square()
        if self.form == "sigmoid":
            targets = self.targets.to(values.dtype)
            targets = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(values, targets, reduction="none")
        targets = self.targets
        if targets.is_floating_point():
            targets = targets.to(values.dtype).flatten(0, 1)
        else:
            targets = targets.flatten()
        flat = F.cross_entropy(
            values.flatten(0, 1), targets, reduction="none", label_smoothing=smoothing
        )
        return flat.view(self.weights.shape)

    def value(self, smoothing: float = 0.0) -> Tensor:
        """The mean loss; 0 where nothing counts."""
        return self._mean(self.losses(smoothing))

    def divergence(self, dense: "Predictions", temperature: float = 1.0) -> Tensor:
        """How far the values are from those of the dense model, a scalar with a gradient.

        The Kullback-Leibler divergence from the dense model's distributions, or the squared
        distance. Where both are equal its second derivative is that of the loss.

        Args:
            dense: What the same loss reads of the dense model's outputs.
            temperature: Distributions are softened by it; the result is then multiplied by its
                square (Hinton et al. 2015).
        """
        counts = self.weights != 0
        each = self._divergences(dense, temperature, counts)
        weights = self.weights.to(each) if counts.all() else self.weights[counts].to(each)
        return (weights * each).sum() / (self.weight or 1)

    def divergences(self, dense: "Predictions") -> Float[Tensor, "samples places"]:
        """The divergence at each place; 0 where it has no weight."""
        counts = self.weights != 0
        each = self._divergences(dense, 1.0, counts)
        return each.new_zeros(counts.shape).masked_scatter(counts, each)

    def _divergences(self, dense: "Predictions", temperature: float, counts: Tensor) -> Tensor:
        """At the places that count."""
        mine, target = at_least_float32(self.values), at_least_float32(dense.values).detach()
        if not counts.all():
            mine, target = mine[counts], target[counts]
        if self.form == "squared":
            return (mine - target).square()
        if self.form == "sigmoid":
            mine, target = mine / temperature, target / temperature
            share = target.sigmoid()
            each = share * (F.logsigmoid(target) - F.logsigmoid(mine))
            each = each + (1 - share) * (F.logsigmoid(-target) - F.logsigmoid(-mine))
            return each * temperature**2
        mine, target = (x.div(temperature).log_softmax(-1) for x in (mine, target))
        each = F.kl_div(mine, target, reduction="none", log_target=True).sum(-1)
        return each * temperature**2

    def _mean(self, losses: Tensor) -> Tensor:
        weights = self.weights.to(losses)
        counted = torch.where(weights != 0, weights * losses, torch.zeros_like(losses))
        return counted.sum() / (self.weight or 1)

    def as_form(self, form: Form) -> "Predictions":
        """The same values under another curvature: cross-entropy's, or 1 for ``squared``."""
        if form == "squared":
            if self.form == "softmax":
                samples, places, classes = self.values.shape
                values = self.values.reshape(samples, places * classes)
                weights = self.weights.repeat_interleave(classes, 1)
            else:
                values, weights = self.values, self.weights
            halves = (weights != 0).to(weights.dtype) / 2
            targets = values.detach()
            return replace(self, form=form, values=values, targets=targets, weights=halves)
        if self.form == form:
            return self
        raise DataError(
            f"the loss reads its outputs as {self.form}; loss: cross_entropy needs logits of "
            "classes. Write loss: auto"
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in its own dtype, or float32 where that is coarser."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def softmax(
    logits: Float[Tensor, "samples *places classes"],
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    weight: float | None = None,
    ignore_index: int = IGNORED,
) -> Predictions:
    """Softmax cross-entropy at each place, as a mean over the places that have a label.

    Args:
        logits: Classes last.
        labels: One class for each place, or a probability of each class.
        weights: How much each place counts; None = 1 each.
        weight: What the sum is divided by; None = the sum of the weights that count.
        ignore_index: Label of places that do not count.

    Raises:
        DataError: Labels that fit no class, or are no distribution.
    """
    shape, classes = logits.shape[:-1], logits.shape[-1]
    if labels.is_floating_point():
        check_distribution(labels, logits.shape)
        counts = torch.ones(shape, dtype=torch.bool, device=logits.device)
        labels = labels.reshape(shape[0], -1, classes)
    else:
        if labels.shape != shape:
            raise DataError(
                f"labels of shape {list(labels.shape)} do not fit outputs of shape "
                f"{list(logits.shape)}: expected {list(shape)}, a class for each place"
            )
        check_classes(labels, classes, ignore_index)
        labels = labels.long()
        counts = labels != ignore_index
        labels = labels.masked_fill(~counts, 0).reshape(shape[0], -1)
    scale = torch.ones((), device=logits.device) if weights is None else weights.to(logits.device)
    own = (counts * scale).reshape(shape[0], -1)
    total = own.sum().item() if weight is None else weight
    return Predictions("softmax", logits.reshape(shape[0], -1, classes), labels, own, whole(total))


def sigmoid(
    logits: Float[Tensor, "samples ..."],
    targets: Tensor,
    *,
    weights: Tensor | None = None,
) -> Predictions:
    """Sigmoid cross-entropy of each number, as a mean over a sample's and then over samples.

    Raises:
        DataError: Targets of another shape, or outside 0 to 1.
    """
    check_same_shape(logits, targets)
    odd = targets[(targets < 0) | (targets > 1) | targets.isnan()]
    if len(odd):
        raise DataError(
            f"a target is {odd[0].item():g}; a loss on sigmoids takes targets from 0 to 1"
        )
    return _elementwise("sigmoid", logits, targets, weights)


def squared(
    values: Float[Tensor, "samples ..."],
    targets: Tensor,
    *,
    weights: Tensor | None = None,
) -> Predictions:
    """Squared error of each number, as a mean over a sample's and then over samples.

    Raises:
        DataError: Targets of another shape.
    """
    check_same_shape(values, targets)
    return _elementwise("squared", values, targets, weights)


def _elementwise(
    form: Form, values: Tensor, targets: Tensor, weights: Tensor | None
) -> Predictions:
    rows, aims = values.reshape(len(values), -1), targets.reshape(len(targets), -1)
    own = torch.ones(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    own = own.to(rows.device)
    if weights is not None:
        own = own * torch.broadcast_to(weights, values.shape).reshape(rows.shape).to(own)
    return Predictions(form, rows, aims, own / max(rows.shape[1], 1), len(rows))


def check_same_shape(values: Tensor, targets: Tensor) -> None:
    """Refuses what torch would broadcast."""
    if values.shape != targets.shape:
        raise DataError(
            f"targets of shape {list(targets.shape)} do not fit outputs of shape "
            f"{list(values.shape)}; expected the same shape"
        )


def check_classes(labels: Tensor, num_classes: int, ignore_index: int = IGNORED) -> None:
    """Before a loss is computed: on a GPU that would end the process, with no word of labels."""
    odd = labels[(labels != ignore_index) & ((labels < 0) | (labels >= num_classes))]
    if len(odd):
        raise DataError(
            f"the label {odd[0].item()} does not fit a head with {num_classes} outputs; "
            f"labels go from 0 to {num_classes - 1}"
        )


def check_distribution(targets: Tensor, shape: torch.Size) -> None:
    """Sees that float labels are a probability of each class."""
    if targets.shape != shape:
        raise DataError(
            f"labels are {targets.dtype} of shape {list(targets.shape)}; expected class numbers "
            f"as int64, or one probability for each of the {shape[-1]} classes"
        )
    sums = targets.double().sum(-1)
    if (targets < 0).any() or not ((sums - 1).abs() < _TOLERANCE).all():
        worst = targets.flatten(0, -2)[int((sums.flatten() - 1).abs().argmax())]
        raise DataError(
            f"float labels are {[round(x, 4) for x in worst.tolist()[:6]]} at one place, which is "
            "no distribution over classes (from 0, sum 1). Several yes-or-no labels want "
            "loss_fn=torch.nn.functional.binary_cross_entropy_with_logits, numbers want "
            "loss_fn=torch.nn.functional.mse_loss"
        )


def whole(number: float) -> float:
    """As an int where it is one."""
    return int(number) if number == int(number) else number
