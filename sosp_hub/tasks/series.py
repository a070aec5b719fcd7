"""How far forecasts are from what came."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sosp_hub.errors import DataError
from sosp_hub.tasks.batches import described
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll

Errors = tuple[float, float]
"""Of a window: the mean of the absolute errors, and of the squared ones."""


def _errors(model: Any, loss: Loss, batch: Any) -> list[Errors]:
    forecast = _forecast(model, loss.outputs)
    away = (forecast - batch["future_values"]).double().flatten(1).cpu()
    means = zip(away.abs().mean(1).tolist(), away.square().mean(1).tolist(), strict=True)
    return list(means)


def _forecast(model: Any, outputs: Any) -> Any:
    """What the model says, or the mean of the distribution that it gives."""
    named = outputs if isinstance(outputs, Mapping) else {}
    predicted = named.get("prediction_outputs")
    if predicted is None:
        predicted = named.get("params")
    where = {"loc": named.get("loc"), "scale": named.get("scale")}
    if isinstance(predicted, tuple) and hasattr(model, "output_distribution"):
        return model.output_distribution(predicted, **where).mean
    if isinstance(predicted, tuple) and hasattr(model, "distribution_output"):
        return model.distribution_output.distribution(predicted, **where).mean
    if predicted is None:
        raise DataError(f"the model returns {described(outputs)}, in which there is no forecast")
    return predicted


def _mean_absolute(windows: Sequence[Errors]) -> float:
    return sum(absolute for absolute, _ in windows) / len(windows)


def _root_mean_squared(windows: Sequence[Errors]) -> float:
    return math.sqrt(sum(squared for _, squared in windows) / len(windows))


mean_absolute_error = OfAll(_errors, _mean_absolute)
root_mean_squared_error = OfAll(_errors, _root_mean_squared)
