"""The mean average precision of boxes, as COCO defines it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from sosp_hub.tasks.loss import Loss
from sosp_hub.tasks.metrics import OfAll

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # as pycocotools has them, to the last bit
_MOST = 100  # detections of one class in an image
_RECALLS = 101  # points of the precision curve


@dataclass(frozen=True, eq=False)
class Detections:
    """What was detected in an image, and what of it is right.

    Attributes:
        scores: Of each detection.
        classes: Of each detection.
        right: Whether it is matched with a box of its class, at each of `THRESHOLDS`.
        there: Classes of the boxes that are there.
    """

    scores: Float[Tensor, " detections"]
    classes: Int64[Tensor, " detections"]
    right: Bool[Tensor, "detections thresholds"]
    there: Int64[Tensor, " boxes"]


def matched(
    scores: Tensor, classes: Tensor, boxes: Tensor, true_classes: Tensor, true_boxes: Tensor
) -> Detections:
    """Matches detections with boxes of their class, the surest first, each box once.

    Args:
        scores: Of each detection.
        classes: Of each detection.
        boxes: Of each detection: left, top, right, bottom.
        true_classes: Of each box that is there.
        true_boxes: As ``boxes``.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = torch.cat([order[classes[order] == c][:_MOST] for c in classes.unique()] or [order])
    scores, classes, boxes = scores[kept], classes[kept], boxes[kept]
    overlaps = box_iou(boxes, true_boxes)
    overlaps = overlaps.masked_fill(classes[:, None] != true_classes[None], 0.0)
    right = torch.zeros(len(boxes), len(THRESHOLDS), dtype=torch.bool)
    for column, threshold in enumerate(THRESHOLDS):
        left = overlaps.clone()
        for detection in scores.argsort(descending=True, stable=True).tolist():
            best, box = left[detection].max(0) if len(true_boxes) else (torch.zeros(()), None)
            if best >= threshold:
                right[detection, column] = True
                left[:, box] = 0.0
    return Detections(scores, classes, right, true_classes)


def average_precision(images: Sequence[Detections], thresholds: slice = slice(None)) -> float:
    """The mean over classes and thresholds of the area under the precision curve.

    Precision at each of 101 recalls is the best at that recall or a higher one. Classes of which
    there is no box do not count; without any box the result is nan.
    """
    there = torch.cat([image.there for image in images])
    scores = torch.cat([image.scores for image in images])
    classes = torch.cat([image.classes for image in images])
    right = torch.cat([image.right for image in images])[:, thresholds]
    areas = []
    for label in there.unique():
        mine = classes == label
        order = scores[mine].argsort(descending=True, stable=True)
        hits = right[mine][order].double().cumsum(0)
        num = torch.arange(1, len(hits) + 1, dtype=torch.float64).unsqueeze(1)
        recall = hits / (there == label).sum()
        best = (hits / num).flip(0).cummax(0).values.flip(0) if len(hits) else hits
        at = torch.from_numpy(np.linspace(0, 1, _RECALLS))
        at = at.expand(recall.shape[1], -1).contiguous()
        place = torch.searchsorted(recall.T.contiguous(), at)
        padded = torch.cat([best, best.new_zeros(1, best.shape[1])]).T
        areas.append(padded.gather(1, place).mean())
    return torch.stack(areas).mean().item() if areas else float("nan")


def precision_meter(processor: Any, thresholds: slice = slice(None)) -> OfAll:
    """The metric of a detector.

    Args:
        processor: The model's own, which makes detections of its outputs.
        thresholds: Which of `THRESHOLDS` count.
    """
    value = partial(average_precision, thresholds=thresholds)
    return OfAll(partial(_detections, processor), value)


def _detections(processor: Any, model: nn.Module, loss: Loss, batch: Any) -> list[Detections]:
    del model
    sizes = [(1, 1)] * len(batch["labels"])  # boxes stay shares of the image
    detected = processor.post_process_object_detection(
        loss.outputs, threshold=0.0, target_sizes=sizes
    )
    images = []
    for image, target in zip(detected, batch["labels"], strict=True):
        boxes = box_convert(target["boxes"].float().cpu(), "cxcywh", "xyxy")
        images.append(
            matched(
                image["scores"].float().cpu(),
                image["labels"].cpu(),
                image["boxes"].float().cpu(),
                target["class_labels"].cpu(),
                boxes,
            )
        )
    return images
