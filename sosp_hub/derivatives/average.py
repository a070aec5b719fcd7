"""Means over all batches and all processes, the same for every derivative."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import is_sharded, out_of_memory
from sosp_hub.errors import CriterionError
from sosp_hub.gates import GateKind, Gates, SharedBySamplesError, gated
from sosp_hub.modes import without_autocast
from sosp_hub.structure.groups import Groups
from sosp_hub.tasks.batches import in_step, num_samples, split_batch
from sosp_hub.tasks.loss import forward
from sosp_hub.tasks.predictions import whole

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn

logger = logging.getLogger("sosp_hub")


@dataclass(frozen=True)
class Protocol:
    """How the loss is measured, the same for every derivative.

    Attributes:
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        gate: What a gate multiplies.
        micro_batch_size: Most samples of one pass; None = whole batches.
        process_sum: Sum of a tensor over all processes; None = this is the only one.
        process_rows: The rows of all processes, one behind the other.
        unused: Is told the groups that the loss does not depend on, where it does on others; their
            derivatives are zero. None = that is an error.
    """

    loss_fn: "LossFn | None" = None
    gate: GateKind = "activation"
    micro_batch_size: int | None = None
    process_sum: Callable[[Tensor], Tensor] | None = None
    process_rows: Callable[[Tensor], Tensor] | None = None
    unused: set[str] | None = None


DEFAULT = Protocol()


class Seen(NamedTuple):
    """The mean loss of a batch, what it averages over, which groups it depends on, and rows."""

    loss: float
    weight: float
    used: list[bool]
    rows: Tensor | None = None


_Step = Callable[[Any, list[Tensor]], Seen]
"""Adds the derivatives of a batch to totals."""


class Average(NamedTuple):
    """What was added up, divided by the samples (or label tokens) that were seen."""

    loss: float
    weight: float
    num_samples: int
    totals: list[Tensor]


def average(
    model: nn.Module,
    groups: Groups,
    batches: "Batches",
    protocol: Protocol,
    num_totals: int,
    step: Callable[[Gates, Any, list[Tensor]], Seen],
    keep: Callable[[Tensor], None] = lambda _: None,
    *,
    own_gates: bool = False,
) -> Average:
    """The mean of what ``step`` adds up, over all processes, in one exchange of numbers.

    ``keep`` gets the rows that a step saw, once for each batch: a process that goes through one
    again while others are not done keeps nothing of it. With ``own_gates``, where ``step`` gives
    each sample its own, one sample goes through first: what is as large then is shared by all.

    Faults of the data (no batch, a loss that is not finite, gates without effect) are exchanged
    too, so that all processes raise and none waits for the others.
    """
    num_structures = sum(group.size for group in groups.values())
    sharded = is_sharded(model)
    with _plain_autograd(model), gated(model, groups, protocol.gate) as gates:
        totals = [torch.zeros(num_structures, dtype=torch.float64) for _ in range(num_totals)]
        counts = torch.zeros(4 + len(groups), dtype=torch.float64)
        run = _run_in_step if sharded else _run
        if own_gates and not sharded:
            batches = _one_first(model, gates, batches)
        for batch, seen in run(batches, protocol, partial(step, gates), totals):
            if not seen.weight:  # no label that counts
                continue
            finite = math.isfinite(seen.loss)
            share = [seen.weight, num_samples(batch), seen.loss * seen.weight, not finite]
            counts += torch.tensor(share + seen.used, dtype=torch.float64)
            if seen.rows is not None:
                keep(seen.rows)
            if not finite and not sharded:
                break
    sums = [counts, *totals]
    if protocol.process_sum is not None:
        flat = protocol.process_sum(torch.cat([part.flatten() for part in sums]))
        parts = flat.split([part.numel() for part in sums])
        counts, *totals = [part.view_as(old) for part, old in zip(parts, sums, strict=True)]
    weight, samples, loss, num_bad, *used = counts.tolist()
    unused = [name for name, count in zip(groups, used, strict=True) if not count]
    if protocol.unused is not None and weight and len(unused) < len(groups):
        protocol.unused.update(unused)
        unused = []
    _check(weight, num_bad, unused)
    return Average(loss / weight, whole(weight), int(samples), [total / weight for total in totals])


@contextmanager
def _plain_autograd(model: nn.Module) -> Iterator[None]:
    """Gradients in the dtype of the weights, whatever context the caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(model):
        yield


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
            "does this part of the model run, and does its output reach the loss, through kernels "
            "that have a derivative (some of quantised weights have none)? Otherwise leave them "
            "out (structure.exclude in a recipe), score other kinds (`kinds=`), or use `magnitude`"
        )


def _one_first(model: nn.Module, gates: Gates, batches: "Batches") -> Iterator[Any]:
    """The batches; before the first one its first sample is seen alone."""
    for number, batch in enumerate(batches):
        if not number and num_samples(batch) > 1:
            gates.set_(1.0, own=(1,))
            with torch.no_grad(), suppress(Exception):  # what cannot run alone tells nothing
                forward(model, split_batch(batch, 1)[0])
        yield batch


def _run(
    batches: "Batches", protocol: Protocol, step: _Step, totals: list[Tensor]
) -> Iterator[tuple[Any, Seen]]:
    """Each micro-batch with what ``step`` saw; where it cannot be done whole they get smaller."""
    most = protocol.micro_batch_size
    for batch in batches:
        pending = split_batch(batch, most)
        while pending:
            seen, size = None, num_samples(pending[0])
            smaller, why = -(-size // 2), "out of memory"
            try:
                seen = step(pending[0], totals)
            except RuntimeError as error:
                if size == 1 or not out_of_memory(error):
                    raise
            except SharedBySamplesError as error:
                if size == 1:
                    raise
                smaller, why = 1, str(error).partition(";")[0]
            if seen is None:  # outside of `except`, which keeps the failed graph alive
                most = smaller
                logger.info("%s: trying micro-batches of %d samples", why, most)
                pending = [part for whole in pending for part in split_batch(whole, most)]
            else:
                yield pending.pop(0), seen


def _run_in_step(
    batches: "Batches", protocol: Protocol, step: _Step, totals: list[Tensor]
) -> Iterator[tuple[Any, Seen]]:
    """Each micro-batch with what ``step`` saw, as many passes on every process."""
    mine = (part for batch in batches for part in split_batch(batch, protocol.micro_batch_size))
    nothing = CriterionError(
        "a process has no calibration data, and all have to go through sharded weights (FSDP2) "
        "together: give each at least one batch"
    )
    for part, counts in in_step(mine, protocol.process_sum or (lambda flags: flags), nothing):
        if counts:
            yield part, step(part, totals)
        else:
            step(part, [torch.zeros_like(total) for total in totals])
