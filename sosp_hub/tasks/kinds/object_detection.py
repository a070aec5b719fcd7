"""Boxes around the things in an image, each with its class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.tasks.metrics import OfAll

_OUTSIDE = 1.0  # pixels that a box may be too large by rounding; it is then cut at the edge


@register
class ObjectDetection(OwnTask):
    """Images with lists of boxes and classes; the loss is the model's own set matching.

    Its curvature is not known, so that `sosp_i` and compensation take the empirical Fisher.
    """

    name: ClassVar[str] = "object-detection"
    auto_class: ClassVar[str] = "AutoModelForObjectDetection"
    auto_processor: ClassVar[str | None] = "AutoImageProcessor"
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("image", "objects")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits", "pred_boxes")
    metrics: ClassVar[tuple[str, ...]] = ("mean_average_precision", "average_precision_50", "loss")
    of_all: ClassVar[tuple[str, ...]] = ("mean_average_precision", "average_precision_50")
    pretrained_rate: ClassVar[float] = 5e-5
    random_rate: ClassVar[float] = 5e-4
    sample: ClassVar[tuple[str, ...]] = (
        "from PIL import Image",
        'Image.new("RGB", (640, 480))',
    )

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Boxes as left, top, width, height in pixels; as many as classes."""
        from sosp_hub.data.columns import image_column
        from sosp_hub.data.rows import ImageRows, TableRows

        objects = table[section.objects][:]
        pairs = [_boxes(row, each, section.boxes, where) for row, each in enumerate(objects)]
        images = image_column(table, section.image)
        none = [0] * len(table)
        columns = {
            "image": ImageRows(range(len(table)), images, none, f"in row {{}} of {where}"),
            "boxes": [boxes for boxes, _ in pairs],
            "classes": [classes for _, classes in pairs],
        }
        names = _names(table.features[section.objects])
        return TableRows(columns, where, class_names=names)

    def prepare(self, data: "OpenData") -> "OpenData":
        """Classes are numbers."""
        from sosp_hub.data.source import with_listed_classes

        return super().prepare(with_listed_classes(data, "classes", "objects", least=1))

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Images of one size, and the boxes of each."""
        columns, images, annotations = rows.columns, [], []
        order = processor.label_order
        for index in indices:
            image = columns["image"].open(index, "RGB")
            source = columns["image"].sources[index]
            boxes = columns["boxes"][index]
            boxes = [_inside(box, image.size, source, rows.where) for box in boxes]
            things = [
                {
                    "bbox": box,
                    "category_id": label if order is None else order[label],
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                for box, label in zip(boxes, columns["classes"][index], strict=True)
            ]
            images.append(image)
            annotations.append({"image_id": index, "annotations": things})
        encoded = processor.own(images=images, annotations=annotations, return_tensors="pt")
        labels = [
            {"class_labels": each["class_labels"], "boxes": each["boxes"]}
            for each in encoded["labels"]
        ]
        return {**_images(encoded), "labels": labels}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """As made of images as large as the first of the data."""
        from sosp_hub.tasks.examples import noise_images

        del num_tokens
        return _images(
            processor.own(
                images=noise_images(batch_size, processor.image_size), return_tensors="pt"
            )
        )

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, OfAll]":
        """As COCO has it, over overlaps from 0.5 to 0.95, and at 0.5."""
        from sosp_hub.tasks.average_precision import precision_meter

        del info
        own = getattr(processor, "own", None)
        return {
            "mean_average_precision": precision_meter(own),
            "average_precision_50": precision_meter(own, slice(1)),
        }


def _images(encoded: Any) -> dict[str, Any]:
    return {name: encoded[name] for name in ("pixel_values", "pixel_mask") if name in encoded}


def _names(feature: Any) -> tuple[str, ...]:
    """Of the classes, where the table lists them."""
    from datasets import ClassLabel

    while hasattr(feature, "feature"):
        feature = feature.feature
    for key in _CLASSES:
        inner: Any = feature.get(key) if isinstance(feature, dict) else None
        while hasattr(inner, "feature"):
            inner = inner.feature
        if isinstance(inner, ClassLabel):
            return tuple(inner.names)
    return ()


_CLASSES = "category", "category_id", "label"


def _boxes(row: int, objects: Any, form: str, where: str) -> tuple[list[list[float]], list[Any]]:
    """Boxes and classes of a row: a dict of two lists, or a list of dicts."""
    from sosp_hub.errors import DataError

    if isinstance(objects, list) and all(isinstance(each, dict) for each in objects):
        keys = {key for each in objects for key in each}
        objects = {key: [each.get(key) for each in objects] for key in keys} or {"bbox": []}
    named = objects if isinstance(objects, dict) else {}
    boxes = named.get("bbox")
    key = next((key for key in _CLASSES if key in named), None)
    classes = named.get(key) if key else [] if boxes == [] else None
    if boxes is None or classes is None or len(boxes) != len(classes):
        shown = "other lengths" if boxes and classes else repr(objects)[:200]
        raise DataError(
            f"data.objects: row {row} of {where} has {shown}; expected "
            '{"bbox": [[left, top, width, height], ...], "category": [...]}, as many of each'
        )
    checked = []
    for box in boxes:
        left, top, right, bottom = box if len(box) == 4 else (0, 0, 0, 0)
        width, height = (right, bottom) if form == "xywh" else (right - left, bottom - top)
        if not (width > 0 and height > 0):
            raise DataError(
                f"data.objects: row {row} of {where} has the box {box}, which is empty read as "
                f"{form}; write data.boxes: {'xyxy' if form == 'xywh' else 'xywh'} where it is "
                "that, or take it out"
            )
        checked.append([float(left), float(top), float(width), float(height)])
    return checked, list(classes)


def _inside(box: list[float], size: tuple[int, int], row: Any, where: str) -> list[float]:
    """A box cut at the edge of the image, where it is not farther out than rounding explains."""
    from sosp_hub.errors import DataError

    left, top, width, height = box
    right, bottom = left + width, top + height
    farthest = max(-left, -top, right - size[0], bottom - size[1])
    if farthest > _OUTSIDE:
        raise DataError(
            f"data.objects: row {row} of {where} has the box {box} in an image of {size[0]} x "
            f"{size[1]} pixels; boxes are read as left, top, width, height: write data.boxes: xyxy "
            "where they are left, top, right, bottom"
        )
    left, top = max(left, 0.0), max(top, 0.0)
    return [left, top, min(right, size[0]) - left, min(bottom, size[1]) - top]
