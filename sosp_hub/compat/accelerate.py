"""What the package uses of accelerate and accelerate does not promise."""

from typing import Any

from torch import nn


def is_spread(model: nn.Module) -> bool:
    """Whether a model lies on several devices, or partly outside them."""
    return hasattr(model, "hf_device_map")


def running_device(model: nn.Module) -> Any:
    """Where the weights of an offloaded model come when it runs; None where nothing says so."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)
