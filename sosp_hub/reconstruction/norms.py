"""Statistics of BatchNorm after a cut, estimated again from calibration inputs."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import BatchNorm
from sosp_hub.distributed import process_sum as of_all_processes
from sosp_hub.distributed import to_model
from sosp_hub.errors import DataError
from sosp_hub.modes import evaluating
from sosp_hub.plan import PruningPlan
from sosp_hub.reconstruction.gram import ProcessSum
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import output_tensors
from sosp_hub.surgery.carry import carried_tensors
from sosp_hub.tasks.batches import as_batch, num_samples
from sosp_hub.tasks.loss import forward

logger = logging.getLogger("sosp_hub")

_LEAST_VARIANCE = 1e-6  # of a channel that is constant in the dense model
_FARTHER = 1.5  # our choice: what is a little nearer in outputs may be a little worse by labels

Statistics = Mapping[str, Tensor]
"""A mean and a variance of each norm, named as its own are: ``NAME.running_mean`` and
``NAME.running_var`` (channels,)."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance of what each norm hands to its scale and shift; 0 and 1 fit the data.

    Attributes:
        handed_on: As the model computes it.
        estimated: As the pass of an estimate sees it, in which norms take the statistics of each
            batch: of small batches and few places it sees others. What one such pass finds is
            compared with what another one does.
    """

    handed_on: Statistics
    estimated: Statistics


_NONE = Moments({}, {})


def has_norms(model: nn.Module) -> bool:
    """Whether there are statistics to estimate again."""
    return bool(_norms(model))


def recalibrate_after(
    pruned: nn.Module,
    dense: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    batches: Sequence[Any],
    process_sum: ProcessSum = of_all_processes,
) -> int:
    """Re-estimates the statistics of a cut model, so that its norms hand on what the dense ones do.

    See `recalibrate_norm`, whose ``like`` are the `norm_moments` of the dense model.

    Args:
        pruned: The cut model; changed in place.
        dense: The model before the cut.
        graph: What ``trace`` found in it.
        plan: The plan of the cut.
        batches: Calibration batches of this process.
        process_sum: Sum of a tensor over the processes that do this together.

    Returns:
        The number of layers that were re-estimated.
    """
    if not has_norms(pruned):
        return 0
    like = carried(norm_moments(dense, batches, process_sum), pruned, graph, plan)
    return recalibrate_norm(pruned, batches, like, process_sum)


def recalibrate_where_nearer(
    pruned: nn.Module,
    dense: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    batches: Sequence[Any],
    process_sum: ProcessSum = of_all_processes,
) -> int:
    """`recalibrate_after`, unless outputs are then half as far again from the dense model's.

    Where little of a channel is left, its old deviation is mostly made of what is wrong with it.
    It needs no labels.
    """
    before = {name: value.clone() for name, value in pruned.named_buffers()}
    as_it_was = _apart(pruned, dense, batches, process_sum) if has_norms(pruned) else 0.0
    number = recalibrate_after(pruned, dense, graph, plan, batches, process_sum)
    if not number or math.isnan(as_it_was):
        return number
    if (now := _apart(pruned, dense, batches, process_sum)) <= _FARTHER * as_it_was:
        return number
    logger.info(
        "norms: their statistics stay as they were: re-estimated, outputs are %.3g of their mean "
        "square from those of the dense model, without %.3g",
        now,
        as_it_was,
    )
    with torch.no_grad():
        for name, value in pruned.named_buffers():
            value.copy_(before[name])
    return 0


@torch.no_grad()
def _apart(
    pruned: nn.Module, dense: nn.Module, batches: Sequence[Any], process_sum: ProcessSum
) -> float:
    """Squared distance of outputs over the squares of the dense model's."""
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluating(pruned, dense):
        for batch in map(as_batch, batches):
            outputs = (
                [t.double() for t in output_tensors(made) if t.is_floating_point()]
                for made in (forward(model, to_model(batch, model)) for model in (pruned, dense))
            )
            for own, its in zip(*outputs, strict=False):
                if own.shape == its.shape:  # others may be cut, or are boxes, as many as there are
                    sums += torch.stack(
                        [(own - its.to(own)).square().sum(), its.square().sum()]
                    ).cpu()
    far, size = process_sum(sums).tolist()
    return far / (size or 1.0)


def carried(moments: Moments, pruned: nn.Module, graph: Graph, plan: PruningPlan) -> Moments:
    """The moments of the channels that a plan keeps; gates and shifts are of other tensors."""
    plan = replace(plan, gates={}, shifts={})
    parts = moments.handed_on, moments.estimated
    return Moments(
        *(carried_tensors(part, pruned, graph, plan) if part else part for part in parts)
    )


@torch.no_grad()
def norm_moments(
    model: nn.Module, batches: Sequence[Any], process_sum: ProcessSum = of_all_processes
) -> Moments:
    """What the norms of a model hand to their scale and shift: means over the batches.

    Found twice, since the pass of an estimate is not that of a model in eval mode: a model that
    lost nothing is estimated to be what it is.

    Args:
        model: Stays as it is.
        batches: Calibration batches of this process.
        process_sum: As of `recalibrate_after`.

    Raises:
        DataError: As of `recalibrate_norm`.
    """
    norms = _norms(model)
    sums = {
        name: torch.zeros_like(torch.stack([_mean(norm)] * 3), dtype=torch.float64)
        for name, norm in norms.items()
    }

    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            given = args[0] if args else kwargs["input"]
            values = given.transpose(0, 1).flatten(1).float()
            if values.shape[1] < 2:
                raise ValueError("one value a channel")  # as of torch's norms that are in training
            var, mean = torch.var_mean(values, 1)
            sums[name] += torch.stack([torch.ones_like(mean), mean, var]).to(sums[name])

        return add

    hooks = [
        norm.register_forward_pre_hook(hook(name), with_kwargs=True) for name, norm in norms.items()
    ]
    try:
        with evaluating(model):
            _forward_all(model, batches, process_sum)
    finally:
        for each in hooks:
            each.remove()
    handed_on: dict[str, Tensor] = {}
    for name, norm in norms.items():
        number, mean, var = process_sum(sums[name])
        if number.any():  # runs in eval mode
            handed_on |= _handed_on(name, norm, mean / number, var / number)
    estimated: dict[str, Tensor] = {}
    for name, (mean, var, _) in _estimates(model, batches, handed_on, process_sum).items():
        if f"{name}.running_var" in handed_on:
            estimated |= _handed_on(name, norms[name], mean, var)
    return Moments(handed_on, estimated)


def _handed_on(name: str, norm: BatchNorm, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
    """Moments behind a norm that is given these."""
    own = _var(norm).double() + norm.eps
    return {
        f"{name}.running_mean": (mean - _mean(norm)) / own.sqrt(),
        f"{name}.running_var": var / own,
    }


@torch.no_grad()
def recalibrate_norm(
    model: nn.Module,
    batches: Sequence[Any],
    like: Moments | None = None,
    process_sum: ProcessSum = of_all_processes,
) -> int:
    """Re-estimates the running statistics of every BatchNorm, in place; needs no labels.

    The statistics become the mean over the batches of all processes. With ``like`` each channel
    then hands on the mean and the deviation that it had in the dense model, as REPAIR does for
    merged models (arXiv 2211.08403, section 3). Where the statistics of that model fit the data
    this is the same; where they are of other data, as of a pretraining, they stay so.

    Args:
        model: Runs in eval mode but for these layers; all but the statistics is left as it is.
        batches: Calibration batches of this process, none where the data did not reach it. A
            batch of one sample has no variance and is left out where any process has another.
        like: What each norm is to hand on; None, or a norm without: mean 0 and variance 1.
        process_sum: As of `recalibrate_after`.

    Returns:
        The number of layers that were re-estimated. Those that no pass reached stay as they were.

    Raises:
        DataError: There is one sample alone, which has no variance; or another process failed.
    """
    norms = _norms(model)
    like = _NONE if like is None else like
    found = _estimates(model, batches, like.handed_on, process_sum)
    for name, (mean, var, number) in found.items():
        norm, its = norms[name], like.estimated
        if (its_var := its.get(f"{name}.running_var")) is not None:
            var = (var / its_var.clamp(min=_LEAST_VARIANCE).to(var) - norm.eps).clamp(min=0)
            mean = mean - its[f"{name}.running_mean"].to(mean) * (var + norm.eps).sqrt()
        _mean(norm).copy_(mean)
        _var(norm).copy_(var)
        norm.get_buffer("num_batches_tracked").copy_(number)
    return len(found)


def _estimates(
    model: nn.Module, batches: Sequence[Any], like: Statistics, process_sum: ProcessSum
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Mean and variance of what norms are given where all of them hand on moments, and how often.

    Norms take the statistics of each batch, and the mean over these is found. The model is
    afterwards as it was.
    """
    norms = _norms(model)
    if not norms:
        return {}
    before = [
        {name: value.clone() for name, value in norm.named_buffers()} for norm in norms.values()
    ]
    momenta = [norm.momentum for norm in norms.values()]
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    try:
        with evaluating(model), _handing_on(norms, like):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over the batches
                norm.train()
            done = _forward_all(model, batches, process_sum)
        share = torch.tensor(float(done))
        share = share / process_sum(share.clone())
        for name, norm in norms.items():
            mean, var = (
                process_sum(statistic * share.to(statistic)).double()
                for statistic in (_mean(norm), _var(norm))
            )
            number = norm.get_buffer("num_batches_tracked").clone()
            if process_sum(number.float()):
                found[name] = mean, var, number
    finally:
        for norm, momentum, buffers in zip(norms.values(), momenta, before, strict=True):
            norm.momentum = momentum
            _put(norm, buffers)
    return found


def _norms(model: nn.Module) -> dict[str, BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }


def _mean(norm: BatchNorm) -> Tensor:
    return norm.get_buffer("running_mean")


def _var(norm: BatchNorm) -> Tensor:
    return norm.get_buffer("running_var")


@contextmanager
def _handing_on(norms: Mapping[str, BatchNorm], like: Statistics) -> Iterator[None]:
    """Norms whose batches have mean 0 and variance 1 hand on these moments instead."""
    scales = {name: (norm.weight, norm.bias) for name, norm in norms.items()}
    try:
        for name, norm in norms.items():
            if (var := like.get(f"{name}.running_var")) is None:
                continue
            weight = torch.ones_like(_mean(norm)) if norm.weight is None else norm.weight
            bias = torch.zeros_like(_mean(norm)) if norm.bias is None else norm.bias
            mean = like[f"{name}.running_mean"]
            norm.bias = nn.Parameter(bias + weight * mean.to(weight))
            norm.weight = nn.Parameter(weight * var.sqrt().to(weight))
        yield
    finally:
        for name, (weight, bias) in scales.items():
            norms[name].weight, norms[name].bias = weight, bias


def _forward_all(model: nn.Module, batches: Sequence[Any], process_sum: ProcessSum) -> int:
    """Passes through the model, and how many; where one fails, all processes raise.

    Batches of one sample are left out where any process has a larger one.
    """
    batches = [as_batch(batch) for batch in batches]
    larger = any(num_samples(batch) > 1 for batch in batches)
    one_is_normal = not process_sum(torch.tensor(float(larger)))
    done, failure = 0, None
    try:
        for batch in batches:
            if one_is_normal or num_samples(batch) > 1:
                forward(model, to_model(batch, model))
                done += 1
    except Exception as error:  # noqa: BLE001 - raised below, where all processes know of it
        failure = error
    if process_sum(torch.tensor(float(failure is not None))):
        lone = one_is_normal and isinstance(failure, ValueError)  # of one value a channel
        if failure is not None and not lone:
            raise failure
        raise DataError(
            "norms cannot be re-estimated: a process has one sample alone, which has no variance "
            "over a layer without places, or it failed; give more samples, or set "
            "finetune.recalibrate_norm: false"
        ) from failure
    return done


def _put(norm: BatchNorm, buffers: Mapping[str, Tensor]) -> None:
    for name, value in buffers.items():
        norm.get_buffer(name).copy_(value)
