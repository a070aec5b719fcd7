"""Losses and metrics of maps: classes and distances of pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sosp_hub.data.ignored import IGNORED_PIXEL
from sosp_hub.errors import DataError
from sosp_hub.tasks.batches import described
from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll
from sosp_hub.tasks.predictions import Predictions, squared

Areas = tuple[Tensor, Tensor]
"""Pixels of each class where both say it, and where either does."""


def depth_error(outputs: Any, targets: Any) -> Predictions:
    """A ``loss_fn``: the mean over images of the squared error over the pixels that are known.

    Predictions of another size are first brought to that of the map.
    """
    depth = outputs.get("predicted_depth") if isinstance(outputs, Mapping) else outputs
    labels = targets["labels"] if isinstance(targets, Mapping) else targets
    if not isinstance(depth, Tensor) or depth.ndim != 3:
        raise DataError(f"the model returns {described(outputs)}; expected predicted_depth")
    if depth.shape[1:] != labels.shape[1:]:
        size = labels.shape[1:]
        depth = F.interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    known = (labels > 0).to(depth.dtype).flatten(1)
    share = known.shape[1] / known.sum(1, keepdim=True).clamp(min=1)
    return squared(depth.flatten(1), labels.flatten(1).to(depth.dtype), weights=known * share)


def relative_error(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean over images of ``|predicted - true| / true`` over the pixels that are known."""
    del batch
    assert loss.predictions is not None  # `depth_error` is the loss
    read = loss.predictions
    away = (read.values - read.targets).abs() / read.targets.clamp(min=1e-6)
    return (read.weights * away).sum(1), torch.ones(len(away))


def pixel_accuracy(loss: Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """How many pixels that count are right, whatever else the loss reads."""
    labels = batch["labels"]
    counted = labels != IGNORED_PIXEL
    right = (_classes(loss, labels) == labels) & counted
    return right.flatten(1).sum(1), counted.flatten(1).sum(1)


def _classes(loss: Loss, labels: Tensor) -> Tensor:
    """The likeliest class of each pixel of the labels."""
    logits, size = loss.outputs.logits, labels.shape[-2:]
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)


def _areas(model: nn.Module, loss: Loss, batch: Any) -> list[Areas]:
    del model
    labels, num, areas = batch["labels"], loss.outputs.logits.shape[1], []
    for predicted, truth in zip(_classes(loss, labels), labels, strict=True):
        counted = truth != IGNORED_PIXEL
        mine, aim = predicted[counted], truth[counted]
        both = torch.bincount(aim[mine == aim], minlength=num)
        either = torch.bincount(mine, minlength=num) + torch.bincount(aim, minlength=num) - both
        areas.append((both.cpu(), either.cpu()))
    return areas


def _mean_iou(images: Sequence[Areas]) -> float:
    both, either = (torch.stack(parts).sum(0).double() for parts in zip(*images, strict=True))
    seen = either > 0
    return (both[seen] / either[seen]).mean().item()


mean_iou = OfAll(_areas, _mean_iou)
"""The mean over classes of intersection over union, of all pixels together."""
