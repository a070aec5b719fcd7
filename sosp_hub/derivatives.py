"""Derivatives of the mean loss by the gates.

With ``m`` the gates, all 1: the gradient ``g = dL/dm``, the product ``r = (d2L/dm2) v`` with a
vector ``v`` of gates, per-sample gradients and the Gauss-Newton matrix. All are means over samples,
so batches, micro-batches and processes that are weighted by what they count (samples, label
tokens) give the answer of one process and one batch.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sosp_hub.errors import CriterionError
from sosp_hub.gates import GateKind, Gates, gated
from sosp_hub.structure.groups import Groups
from sosp_hub.twice import CheapSecondDerivatives
from sosp_hub.zoo.loss import batch_loss

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency

logger = logging.getLogger("sosp_hub")

Mode = Literal["exact", "differences", "auto"]
"""``exact``: double backward. ``differences``: central differences of the gradient, which need no
second derivative of any kernel. ``auto``: exact, and differences where a kernel has none."""


@dataclass(frozen=True)
class Protocol:
    """How the loss is measured, the same for every derivative.

    Attributes:
        loss_fn: Loss of (logits, labels); None = what the task says.
        gate: What a gate multiplies.
        micro_batch_size: Most samples of one pass; None = whole batches.
        process_sum: Sum of a tensor over all processes; None = this is the only one.
    """

    loss_fn: "LossFn | None" = None
    gate: GateKind = "activation"
    micro_batch_size: int | None = None
    process_sum: Callable[[Tensor], Tensor] | None = None


_DEFAULT = Protocol()


class GateDerivatives(NamedTuple):
    """Means over all samples of all processes.

    Attributes:
        loss: The loss.
        weight: What was averaged: samples, or label tokens of a causal language model.
        num_samples: Samples that were seen.
        gradient: ``g`` of each group.
        second: What else was asked for, of each group; empty where it was the gradient alone.
    """

    loss: float
    weight: int
    num_samples: int
    gradient: "Saliency"
    second: "Saliency"


def gate_gradient(
    model: nn.Module, groups: Groups, batches: "Batches", protocol: Protocol = _DEFAULT
) -> GateDerivatives:
    """The gradient of the mean loss by the gates."""

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> _Seen:
        gates.set_(1.0)
        seen, gradient = _first_order(model, gates, batch, protocol)
        totals[0] += gradient
        return seen

    mean = _mean(model, groups, batches, protocol, [1], step)
    return GateDerivatives(*mean[:3], _by_group(groups, mean.totals[0]), {})


def hessian_product(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol = _DEFAULT,
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

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> _Seen:
        nonlocal exact
        if exact:
            try:
                return _add_exact(model, gates, batch, protocol, vector, totals)
            except (RuntimeError, NotImplementedError) as error:
                if mode == "exact" or not _lacks_second_derivative(error):
                    raise
                logger.info("differences instead of exact second derivatives: %s", error)
                exact = False
        return _add_differences(model, gates, batch, protocol, vector, eps, totals)

    mean = _mean(model, groups, batches, protocol, [1, 1], step)
    gradient, product = (_by_group(groups, total) for total in mean.totals)
    return GateDerivatives(*mean[:3], gradient, product)


def batch_squares(
    model: nn.Module, groups: Groups, batches: "Batches", protocol: Protocol = _DEFAULT
) -> GateDerivatives:
    """The gradient and, as ``second``, the mean over batches of each batch's squared gradient.

    Unlike all else here it depends on how the data is cut into batches.
    """

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> _Seen:
        gates.set_(1.0)
        seen, gradient = _first_order(model, gates, batch, protocol)
        totals[0] += gradient
        totals[1] += gradient.square() / max(seen.weight, 1)
        return seen

    mean = _mean(model, groups, batches, protocol, [1, 1], step)
    gradient, square = (_by_group(groups, total) for total in mean.totals)
    return GateDerivatives(*mean[:3], gradient, square)


def sample_squares(
    model: nn.Module, groups: Groups, batches: "Batches", protocol: Protocol = _DEFAULT
) -> GateDerivatives:
    """The gradient and, as ``second``, the mean over samples of each sample's squared gradient.

    A sample's gradient is that of its own loss, which for a causal language model is the sum over
    its label tokens.
    """

    def step(gates: Gates, batch: Any, totals: list[Tensor]) -> _Seen:
        gates.set_(1.0, num_samples=num_samples(batch))
        seen, rows = _first_order(model, gates, batch, protocol)
        totals[0] += rows.sum(0)
        totals[1] += rows.square().sum(0)
        return seen

    mean = _mean(model, groups, batches, protocol, [1, 1], step)
    gradient, square = mean.totals[0], mean.totals[1] * (mean.weight / mean.num_samples)
    return GateDerivatives(*mean[:3], _by_group(groups, gradient), _by_group(groups, square))


# One batch ----------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """The mean loss of a batch, what it averages over, and which groups it depends on."""

    loss: float
    weight: int
    used: list[bool]


def _first_order(
    model: nn.Module, gates: Gates, batch: Any, protocol: Protocol
) -> tuple[_Seen, Tensor]:
    loss = batch_loss(model, batch, protocol.loss_fn)
    gradient = _gradient(loss.value, gates)
    seen = _Seen(loss.value.item(), loss.weight, _used(gradient))
    return seen, _row(gradient, gates, loss.weight)


def _add_exact(
    model: nn.Module,
    gates: Gates,
    batch: Any,
    protocol: Protocol,
    vector: Mapping[str, Tensor] | None,
    totals: list[Tensor],
) -> _Seen:
    gates.set_(1.0)
    with sdpa_kernel(SDPBackend.MATH), CheapSecondDerivatives():
        loss = batch_loss(model, batch, protocol.loss_fn)
    gradient = _gradient(loss.value, gates, create_graph=True)
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
        total += _row(part, gates, loss.weight)
    return _Seen(loss.value.item(), loss.weight, _used(gradient))


def _add_differences(
    model: nn.Module,
    gates: Gates,
    batch: Any,
    protocol: Protocol,
    vector: Mapping[str, Tensor] | None,
    eps: float,
    totals: list[Tensor],
) -> _Seen:
    """Two passes; their mean is the gradient, but for the square of the step."""
    ends = []
    for step in (eps, -eps):
        gates.set_(
            {name: 1 + step * _direction(g, vector, name) for name, g in gates.values.items()}
        )
        ends.append(_first_order(model, gates, batch, protocol))
    (seen, high), (seen_low, low) = ends
    totals[0] += (high + low) / 2
    totals[1] += (high - low) / (2 * eps)
    return _Seen((seen.loss + seen_low.loss) / 2, seen.weight, seen.used)


def _direction(gate: Tensor, vector: Mapping[str, Tensor] | None, name: str) -> Tensor:
    ones = torch.ones_like(gate, requires_grad=False)
    return ones if vector is None else ones * vector[name].to(gate)


def _gradient(loss: Tensor, gates: Gates, create_graph: bool = False) -> list[Tensor | None]:
    leaves = list(gates.values.values())
    if not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True))


def _used(parts: list[Tensor | None]) -> list[bool]:
    return [part is not None for part in parts]


def _row(parts: list[Tensor | None], gates: Gates, weight: int) -> Tensor:
    """All groups one behind the other, times ``weight``: float64 on the CPU, 0 where None."""
    whole = [
        torch.zeros_like(leaf) if part is None or not weight else part.detach()
        for part, leaf in zip(parts, gates.values.values(), strict=True)
    ]
    return torch.cat(whole, -1).detach().to("cpu", torch.float64) * weight


def _by_group(groups: Groups, row: Tensor) -> "Saliency":
    parts = row.split([group.size for group in groups.values()])
    return {name: part.clone() for name, part in zip(groups, parts, strict=True)}


def _lacks_second_derivative(error: Exception) -> bool:
    text = str(error)
    return "is not implemented" in text or "once_differentiable" in text


def _step_size(model: nn.Module, eps: float | None) -> float:
    """Refuses a step that activations, as coarse as the weights, would round away."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    rounding = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    if eps is None:
        return 2.0**-4 if rounding > torch.finfo(torch.float32).eps else 2.0**-7
    if not 4 * rounding <= eps < 1:
        raise CriterionError(
            f"eps={eps:g} must be under 1 and at least {4 * rounding:g}, where it stands out from "
            f"the rounding of the model's weights (machine epsilon {rounding:g}); "
            "leave it out for the default"
        )
    return eps


# All batches, all processes -----------------------------------------------------------------------


class _Mean(NamedTuple):
    loss: float
    weight: int
    num_samples: int
    totals: list[Tensor]


def _mean(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol,
    num_dims: list[int],
    step: Callable[[Gates, Any, list[Tensor]], _Seen],
) -> _Mean:
    """The mean of what ``step`` adds up, over all processes, in one exchange of numbers.

    Faults of the data (no batch, a loss that is not finite, gates without effect) are exchanged
    too, so that all processes raise and none waits for the others.
    """
    num_structures = sum(group.size for group in groups.values())
    totals = [torch.zeros((num_structures,) * n, dtype=torch.float64) for n in num_dims]
    counts = torch.zeros(4 + len(groups), dtype=torch.float64)
    with torch.enable_grad(), gated(model, groups, protocol.gate) as gates:
        for batch, seen in _run(batches, protocol, lambda part: step(gates, part, totals)):
            if not seen.weight:  # no label that counts
                continue
            finite = math.isfinite(seen.loss)
            share = [seen.weight, num_samples(batch), seen.loss * seen.weight, not finite]
            counts += torch.tensor(share + seen.used, dtype=torch.float64)
            if not finite:
                break
    sums = [counts, *totals]
    if protocol.process_sum is not None:
        flat = protocol.process_sum(torch.cat([part.flatten() for part in sums]))
        parts = flat.split([part.numel() for part in sums])
        counts, *totals = [part.view_as(old) for part, old in zip(parts, sums, strict=True)]
    weight, samples, loss, num_bad, *used = counts.tolist()
    _check(weight, num_bad, [name for name, count in zip(groups, used, strict=True) if not count])
    return _Mean(loss / weight, int(weight), int(samples), [total / weight for total in totals])


def _check(weight: float, num_bad: float, unused: list[str]) -> None:
    if num_bad:
        raise CriterionError(
            "the loss of a calibration batch is not finite (nan or inf): look at the data and the "
            "weights, or score in float32"
        )
    if not weight:
        raise CriterionError(
            "no calibration data: the criterion needs at least one batch with labels; `magnitude` "
            "and `random` need none"
        )
    if unused:
        more = f" and {len(unused) - 8} others" if len(unused) > 8 else ""
        raise CriterionError(
            f"the loss does not depend on the gates of {', '.join(map(repr, unused[:8]))}{more}: "
            "does this part of the model run, and does its output reach the loss? Otherwise score "
            "other kinds (`kinds=`)"
        )


def _run(
    batches: "Batches", protocol: Protocol, step: Callable[[Any], _Seen]
) -> Iterator[tuple[Any, _Seen]]:
    """Each micro-batch with what ``step`` saw; where memory does not suffice they get smaller."""
    most = protocol.micro_batch_size
    for batch in batches:
        pending = split_batch(batch, most)
        while pending:
            seen = None
            try:
                seen = step(pending[0])
            except RuntimeError as error:
                if num_samples(pending[0]) == 1 or not _out_of_memory(error):
                    raise
            if seen is None:  # outside of `except`, which keeps the failed graph alive
                most = -(-num_samples(pending[0]) // 2)
                logger.info("memory does not suffice: micro-batches of %d samples", most)
                pending = [part for whole in pending for part in split_batch(whole, most)]
            else:
                yield pending.pop(0), seen


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def num_samples(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    return len(next(_tensors(batch)))


def split_batch(batch: Any, most: int | None) -> list[Any]:
    """Parts of a batch with at most ``most`` samples; None = the batch as it is."""
    size = num_samples(batch)
    if most is None or size <= most:
        return [batch]
    return [_slice(batch, size, slice(start, start + most)) for start in range(0, size, most)]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _slice(batch: Any, size: int, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _slice(value, size, part) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_slice(value, size, part) for value in batch)
    return batch
