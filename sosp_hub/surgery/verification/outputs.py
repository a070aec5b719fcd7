"""What models return, and how far that is apart."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.errors import VerificationError
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.deferred import where_read
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.isolation import isolated
from sosp_hub.structure.trace import Program, call, output_tensors, wanted_outputs
from sosp_hub.surgery.verification.twins import twin_of

TOLERANCE = 1e-4
"""Largest error relative to the largest output, in float32. Rounding gives up to 1e-5 in deep
networks, wrong cuts 1e-2.
"""

ROUNDING = 1e-2
"""A smaller error in float32 may be rounding; it is computed again in float64."""


def outputs_of(model: nn.Module, graph: Graph) -> list[Tensor]:
    """The outputs that matter, on the example inputs, in evaluation."""
    return output_tensors(results_of(model, graph, [(call, graph.example_inputs)]))


def results_of(model: nn.Module, graph: Graph, runs: Iterable[tuple[Program, Any]]) -> list[Any]:
    """What the model returns, called in these ways with these inputs, one after the other."""
    with isolated(model), torch.no_grad(), where_read(model):
        results = [run(model.eval(), copy_inputs(inputs)) for run, inputs in runs]
    return [wanted_outputs(result, graph.outputs) for result in results]


def has_values(tensor: Tensor) -> bool:
    """Whether it holds numbers that rounding may change."""
    return bool(tensor.numel()) and (tensor.is_floating_point() or tensor.is_complex())


def has_numbers(model: nn.Module, graph: Graph, run: Program) -> bool:
    """Whether any number that a model itself returns is finite."""
    outputs = output_tensors(
        results_of(twin_of(model, graph), graph, [(run, graph.example_inputs)])[0]
    )
    return any(bool(tensor.isfinite().any()) for tensor in outputs if has_values(tensor))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error relative to the largest finite number; infinite where no number is finite.

    What is infinite or no number (NaN) must be so in both.
    """
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if one.shape != two.shape:
            raise VerificationError(
                f"an output has shape {list(one.shape)}, expected {list(two.shape)}"
            )
        if has_values(two):
            finite = two.isfinite()
            if not finite.all():
                alike = (one == two) | (one.isnan() & two.isnan())
                if not finite.any() or not alike[~finite].all():
                    return math.inf
                one, two = one[finite], two[finite]
            scale = max(float(two.abs().max()), 1e-30)
            wide = torch.complex128 if two.is_complex() else torch.float64
            difference = float((one.to(wide) - two.to(wide)).abs().max()) / scale
            worst = max(worst, difference) if difference == difference else float("inf")
    return worst
