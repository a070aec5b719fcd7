"""The rules, by what an operation does. Importing this package registers them all."""

from sosp_hub.structure.rules import lookup, product, reduction, shape, window
from sosp_hub.structure.rules.product import attention
from sosp_hub.structure.rules.registry import RULES, Operation, apply_rule, tensors, unknown

__all__ = [
    "RULES",
    "Operation",
    "apply_rule",
    "attention",
    "lookup",
    "product",
    "reduction",
    "shape",
    "tensors",
    "unknown",
    "window",
]
