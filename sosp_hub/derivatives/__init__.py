"""Derivatives of the mean loss by the gates.

With ``m`` the gates, all 1: the gradient ``g = dL/dm``, the product ``r = (d2L/dm2) v`` with a
vector ``v`` of gates, per-sample gradients and the Gauss-Newton matrix. All are means over samples,
so batches, micro-batches and processes that are weighted by what they count (samples, label
tokens) give the answer of one process and one batch.
"""

from sosp_hub.derivatives.average import Protocol
from sosp_hub.derivatives.divergence import divergence
from sosp_hub.derivatives.gauss_newton import GaussNewton, gauss_newton
from sosp_hub.derivatives.gram import LowRank, Matrix
from sosp_hub.derivatives.hessian import (
    GateDerivatives,
    batch_squares,
    gate_gradient,
    hessian_product,
    sample_squares,
)
from sosp_hub.derivatives.rows import by_group

__all__ = [
    "GateDerivatives",
    "GaussNewton",
    "LowRank",
    "Matrix",
    "Protocol",
    "batch_squares",
    "by_group",
    "divergence",
    "gate_gradient",
    "gauss_newton",
    "hessian_product",
    "sample_squares",
]
