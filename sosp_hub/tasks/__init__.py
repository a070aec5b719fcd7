"""What a task says: its loss with weight and curvature, below everything that asks for it."""

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
