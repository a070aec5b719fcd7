"""Optimizers that keep weights of 16 bits in float32 beside them.

A step of Adam moves a weight by about the learning rate, and a bfloat16 weight of 0.02 has no
neighbour within 6e-5: at 5e-5 most weights would stay where they are, and a mean of squares that
should fall by a thousandth a step would stay as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_WHOLE = "in_float32"
"""Key of the state under which a weight is kept."""


class _InFloat32(Optimizer):
    """Steps in float32, whose result is rounded to what the model computes with."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; states of weights of 16 bits are in float32 too."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        narrow = [
            (parameter, parameter.data, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.dtype in {torch.float16, torch.bfloat16}
        ]
        try:
            for parameter, rounded, gradient in narrow:
                whole, parameter.grad = self.state[parameter].pop(_WHOLE, None), None
                parameter.data = rounded.float() if whole is None else whole
                parameter.grad = gradient.float()
            super().step()
        finally:
            for parameter, rounded, gradient in narrow:
                whole, parameter.grad = parameter.data.float(), None
                parameter.data = rounded.copy_(whole)
                self.state[parameter][_WHOLE], parameter.grad = whole, gradient
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of torch, which would round the states to what the weights are."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim():
                    self.state[parameter][key] = value.to(parameter.device, copy=True)


class AdamW(_InFloat32, torch.optim.AdamW):
    """AdamW."""


class SGD(_InFloat32, torch.optim.SGD):
    """SGD with momentum."""
