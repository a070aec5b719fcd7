"""Gradient, Hessian products and squared gradients by the gates."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sosp_hub.compat.torch import RECOMPUTED_OTHERWISE, is_sharded, out_of_memory
from sosp_hub.derivatives.average import (
    DEFAULT,
    Protocol,
    Seen,
    average,
)
from sosp_hub.derivatives.rows import by_group, first_order, gradient_by, row, used
from sosp_hub.double_backward import CheapSecondDerivatives
from sosp_hub.errors import CriterionError
from sosp_hub.gates import Gates
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.batches import num_samples
from sosp_hub.tasks.loss import batch_loss
from sosp_hub.types import Mode

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

logger = logging.getLogger("sosp_hub")


class GateDerivatives(NamedTuple):
    """Means over all samples of all processes.

    Attributes:
        loss: The loss.
        weight: What was averaged: samples, or the tokens or pixels that have a label.
        num_samples: Samples that were seen.
        gradient: ``g`` of each group.
        second: What else was asked for, of each group; empty where it was the gradient alone.
    """

    loss: float
    weight: float
    num_samples: int
    gradient: "Saliency"
    second: "Saliency"


def gate_gradient(
    model: nn.Module, groups: Groups, batches: "Batches", protocol: Protocol = DEFAULT
) -> GateDerivatives:
    """The gradient of the mean loss by the gates."""

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        gates.set_(1.0)
        seen, gradient = first_order(model, gates, batch, protocol)
        totals[0] += gradient
        return seen

    mean = average(model, groups, batches, protocol, 1, step)
    return GateDerivatives(*mean[:3], by_group(groups, mean.totals[0]), {})


def hessian_product(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol = DEFAULT,
    *,
    vector: Mapping[str, Tensor] | None = None,
    mode: Mode = "exact",
    eps: float | None = None,
) -> GateDerivatives:
    """The gradient and, as ``second``, the Hessian of the mean loss times a vector of gates.

    Args:
        model: The model.
        groups: The groups that have gates.
        batches: Calibration data, gone through once.
        protocol: How the loss is measured.
        vector: One tensor per group; None = the ones.
        mode: How the second derivative is taken.
        eps: Step of the differences; None = 2^-7, or 2^-4 where weights have 16 bits or fewer.

    Raises:
        CriterionError: Among others, an ``eps`` that drowns in the rounding of the model.
    """
    exact, eps = mode != "differences", _step_size(model, eps)
    if exact and is_sharded(model):
        if mode == "exact":
            raise CriterionError(
                "exact second derivatives need all weights at once, and these are spread over "
                "processes (FSDP2): write mode='differences'"
            )
        logger.info("finite differences instead of exact second derivatives: weights are sharded")
        exact = False

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        nonlocal exact
        if exact:
            try:
                return _add_exact(model, gates, batch, protocol, vector, totals)
            except RECOMPUTED_OTHERWISE as error:
                if mode == "exact":
                    raise CriterionError(
                        "exact second derivatives cannot go through layers that are computed again "
                        "(torch.utils.checkpoint): switch that off while scores are computed, such "
                        "as by set_grad_checkpointing(False), or write mode='differences'"
                    ) from error
                logger.info(
                    "finite differences instead of exact second derivatives: layers are computed "
                    "again (torch.utils.checkpoint)"
                )
                exact = False
            except (RuntimeError, NotImplementedError) as error:
                least = num_samples(batch) == 1  # else smaller micro-batches are tried first
                if mode == "exact" or not (
                    _lacks_second_derivative(error) or (least and out_of_memory(error))
                ):
                    raise
                logger.info("finite differences instead of exact second derivatives: %s", error)
                exact = False
        return _add_differences(model, gates, batch, protocol, vector, eps, totals)

    mean = average(model, groups, batches, protocol, 2, step)
    gradient, product = (by_group(groups, total) for total in mean.totals)
    return GateDerivatives(*mean[:3], gradient, product)


def batch_squares(
    model: nn.Module, groups: Groups, batches: "Batches", protocol: Protocol = DEFAULT
) -> GateDerivatives:
    """The gradient and, as ``second``, the mean over batches of each batch's squared gradient.

    Unlike all else here it depends on how the data is cut into batches.
    """

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        gates.set_(1.0)
        seen, gradient = first_order(model, gates, batch, protocol)
        totals[0] += gradient
        totals[1] += gradient.square() / max(seen.weight, 1)
        return seen

    mean = average(model, groups, batches, protocol, 2, step)
    gradient, square = (by_group(groups, total) for total in mean.totals)
    return GateDerivatives(*mean[:3], gradient, square)


def sample_squares(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol = DEFAULT,
    *,
    per_token: bool = False,
) -> GateDerivatives:
    """The gradient and, as ``second``, the mean over samples of each sample's squared gradient.

    A sample's gradient is that of its own loss, which for a causal language model is the sum over
    its label tokens. Samples of a batch have gates of their own; where gates scale a weight, such
    as that of an expert, which all samples share, there is one pass for each sample.

    Args:
        model: The model.
        groups: The groups that have gates.
        batches: Calibration data, gone through once.
        protocol: How the loss is measured.
        per_token: Of each sample the sum of squares of its tokens' shares of that gradient.

    Raises:
        CriterionError: Among others, batches or layers without tokens.
    """
    shared = any(site.module is None for group in groups.values() for site in group.sites)
    if shared and not per_token:
        protocol = dataclasses.replace(protocol, micro_batch_size=1)

    def own_gates(batch: Any) -> Sequence[int]:
        if per_token:
            return _tokens(batch)
        return () if shared else (num_samples(batch),)

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> Seen:
        gates.set_(1.0, own=own_gates(batch))
        loss = batch_loss(model, batch, protocol.loss_fn)
        gradient = gradient_by(loss.value, gates)
        at = 0
        for part, gate in zip(gradient, gates.values.values(), strict=True):
            end = at + gate.shape[-1]
            if part is not None and loss.weight:
                rows = part.detach().reshape(-1, end - at).to("cpu", torch.float64) * loss.weight
                totals[0][at:end] += rows.sum(0)
                totals[1][at:end] += rows.square().sum(0)
            at = end
        return Seen(loss.value.item(), loss.weight, used(gradient))

    own = not (shared or per_token)
    mean = average(model, groups, batches, protocol, 2, step, own_gates=own)
    gradient, square = mean.totals[0], mean.totals[1] * (mean.weight / mean.num_samples)
    return GateDerivatives(*mean[:3], by_group(groups, gradient), by_group(groups, square))


def _tokens(batch: Any) -> tuple[int, int]:
    """Samples of a batch and tokens of each."""
    given = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0]
    if not isinstance(given, Tensor) or given.ndim != 2 or given.is_floating_point():
        raise CriterionError(
            "per_token: needs batches of token ids, (samples, tokens), as `input_ids`; leave it out"
        )
    return given.shape[0], given.shape[1]


def _add_exact(
    model: nn.Module,
    gates: Gates,
    batch: Any,
    protocol: Protocol,
    vector: Mapping[str, Tensor] | None,
    totals: list[Tensor],
) -> Seen:
    gates.set_(1.0)
    with sdpa_kernel(SDPBackend.MATH), CheapSecondDerivatives():
        loss = batch_loss(model, batch, protocol.loss_fn)
    gradient = gradient_by(loss.value, gates, create_graph=True)
    curved = {
        name: part
        for name, part in zip(gates.values, gradient, strict=True)
        if part is not None and part.requires_grad
    }
    if curved:
        # Not `grad`, which passes by the nodes that say "cannot be differentiated twice".
        directions = [_direction(gates.values[name], vector, name) for name in curved]
        torch.autograd.backward(list(curved.values()), directions)
    product = [gate.grad for gate in gates.values.values()]
    for total, part in zip(totals, (gradient, product), strict=True):
        total += row(part, gates, loss.weight)
    return Seen(loss.value.item(), loss.weight, used(gradient))


def _add_differences(
    model: nn.Module,
    gates: Gates,
    batch: Any,
    protocol: Protocol,
    vector: Mapping[str, Tensor] | None,
    eps: float,
    totals: list[Tensor],
) -> Seen:
    """Two passes; their mean is the gradient, but for the square of the step."""
    ends = []
    for step in (eps, -eps):
        gates.set_(
            {name: 1 + step * _direction(g, vector, name) for name, g in gates.values.items()}
        )
        ends.append(first_order(model, gates, batch, protocol))
    (seen, high), (seen_low, low) = ends
    totals[0] += (high + low) / 2
    totals[1] += (high - low) / (2 * eps)
    return Seen((seen.loss + seen_low.loss) / 2, seen.weight, seen.used)


def _direction(gate: Tensor, vector: Mapping[str, Tensor] | None, name: str) -> Tensor:
    ones = torch.ones_like(gate, requires_grad=False)
    return ones if vector is None else ones * vector[name].to(gate)


def _lacks_second_derivative(error: Exception) -> bool:
    text = str(error)
    return "is not implemented" in text or "once_differentiable" in text


def _is_coarse(tensor: Tensor) -> bool:
    """Whether it is a weight of at most 16 bits; kernels of whole numbers may round activations."""
    return tensor.ndim > 1 and tensor.element_size() <= 2 and tensor.dtype != torch.bool


def _step_size(model: nn.Module, eps: float | None) -> float:
    """Refuses a step that activations, as coarse as the weights, would round away."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    rounding = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    if eps is None:
        coarse = any(map(_is_coarse, chain(model.parameters(), model.buffers())))
        return 2.0**-4 if coarse else 2.0**-7
    if not 4 * rounding <= eps < 1:
        raise CriterionError(
            f"eps={eps:g} must be under 1 and at least {4 * rounding:g}, where it stands out from "
            f"the rounding of the model's weights (machine epsilon {rounding:g}); "
            "leave it out for the default"
        )
    return eps
