"""What a task says: its loss with weight and curvature, below everything that asks for it.

Each task is a file in ``kinds``; torch is loaded only when what follows is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sosp_hub.tasks.loss import Loss, batch_loss, forward
    from sosp_hub.tasks.own_outputs import OwnOutputs
    from sosp_hub.tasks.predictions import Predictions, sigmoid, softmax, squared
    from sosp_hub.tasks.recognised import next_token, pixels, spans

__all__ = [
    "Loss",
    "OwnOutputs",
    "Predictions",
    "batch_loss",
    "forward",
    "next_token",
    "pixels",
    "sigmoid",
    "softmax",
    "spans",
    "squared",
]

_FILES = {
    "loss": ("Loss", "batch_loss", "forward"),
    "own_outputs": ("OwnOutputs",),
    "predictions": ("Predictions", "sigmoid", "softmax", "squared"),
    "recognised": ("next_token", "pixels", "spans"),
}


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"sosp_hub.tasks.{file}"), name)
    raise AttributeError(f"module 'sosp_hub.tasks' has no attribute {name!r}")
