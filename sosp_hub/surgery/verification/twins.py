"""Copies of a model that share what they can."""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import nn

from sosp_hub.compat.torch import buffer_table
from sosp_hub.structure.copies import map_tensors, share_model
from sosp_hub.structure.deferred import data_of, deferred, is_deferred
from sosp_hub.structure.graph import Graph


def twin_of(
    model: nn.Module,
    graph: Graph,
    own: Iterable[str] = (),
    instead: Callable[[str, nn.Parameter], nn.Parameter | None] | None = None,
) -> nn.Module:
    """A copy that shares all parameters but those that its pass writes to, and ``own``."""
    return share_model(model, graph.written.union(own), instead)


def is_coarse(model: nn.Module) -> bool:
    """Whether rounding of 16 bits and fewer would hide what is wrong."""
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    return any(parameter.element_size() <= 2 for parameter in floating)


def in_double(graph: Graph) -> Graph:
    """The same trace with inputs in double precision."""
    inputs = map_tensors(graph.example_inputs, lambda t: t.double() if t.is_floating_point() else t)
    return dataclasses.replace(graph, example_inputs=inputs)


def deferred_copy(model: nn.Module, graph: Graph) -> nn.Module:
    """A copy whose parameters are read where its code reads them, for `cut` to change."""
    return twin_of(model, graph, instead=lambda _, p: deferred(lambda: data_of(p), p))


def doubled(model: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """A copy in double precision; run it ``WhereRead``.

    Args:
        model: Any module.
        own: Parameters that a pass writes to.
    """

    def instead(_: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not parameter.is_floating_point():
            return None
        return deferred(lambda: data_of(parameter).double(), parameter, dtype=torch.float64)

    twin = share_model(model, set(own), instead)
    for parameter in twin.parameters():
        if parameter.is_floating_point() and not is_deferred(parameter):
            parameter.data = parameter.data.double()
    for module in twin.modules():
        buffers = buffer_table(module)
        for name, buffer in buffers.items():
            if buffer is not None and buffer.is_floating_point():
                buffers[name] = buffer.double()
    return twin


def without_zeros(model: nn.Module, graph: Graph) -> nn.Module:
    """A copy in evaluation, with tensors filled that are (nearly) zero.

    What they hide could not be checked.
    """
    empty = {
        name
        for name, parameter in model.named_parameters()
        if parameter.numel()
        and (parameter.is_floating_point() or parameter.is_complex())
        and float(parameter.detach().abs().max()) < 1e-4
    }
    twin = twin_of(model, graph, empty).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in twin.named_parameters():
        if name in empty:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(noise)
    return twin
