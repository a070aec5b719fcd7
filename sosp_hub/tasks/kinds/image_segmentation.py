"""A class for each pixel (semantic segmentation)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.tasks.metrics import Meter, OfAll


@register
class ImageSegmentation(OwnTask):
    """Images with a mask of class numbers each; 255 counts for nothing.

    How many classes there are the model says: ``model.num_labels``, else its config.
    """

    name: ClassVar[str] = "image-segmentation"
    aliases: ClassVar[tuple[str, ...]] = ("semantic-segmentation",)
    auto_class: ClassVar[str] = "AutoModelForSemanticSegmentation"
    auto_processor: ClassVar[str | None] = "AutoImageProcessor"
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("image", "mask")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits",)
    metrics: ClassVar[tuple[str, ...]] = ("mean_iou", "accuracy", "loss")
    of_all: ClassVar[tuple[str, ...]] = ("mean_iou",)
    counted: ClassVar[str] = "pixels"
    sample: ClassVar[tuple[str, ...]] = (
        "from PIL import Image",
        'Image.new("RGB", (512, 512))',
    )

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Images and masks, opened when they are needed."""
        from sosp_hub.data.columns import image_column
        from sosp_hub.data.rows import ImageRows, TableRows

        none, numbers = [0] * len(table), range(len(table))
        columns = {
            key: ImageRows(
                numbers, image_column(table, getattr(section, key)), none, f"in row {{}} of {where}"
            )
            for key in ("image", "mask")
        }
        return TableRows(columns, where)

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Images of one size with masks of the same."""
        from sosp_hub.data.ignored import IGNORED_PIXEL
        from sosp_hub.errors import DataError

        images = [rows.columns["image"].open(i, "RGB") for i in indices]
        masks = [rows.columns["mask"].levels(i, "data.mask") for i in indices]
        for index, image, mask in zip(indices, images, masks, strict=True):
            if mask.shape != (image.height, image.width):
                raise DataError(
                    f"data.mask: row {rows.columns['mask'].sources[index]} of {rows.where} has a "
                    f"mask of {mask.shape[1]} x {mask.shape[0]} pixels for an image of "
                    f"{image.width} x {image.height}; give masks of the images' size"
                )
        encoded = processor.own(images=images, segmentation_maps=masks, return_tensors="pt")
        labels, num = encoded["labels"], processor.config.num_labels
        odd = ((labels >= num) & (labels != IGNORED_PIXEL)).flatten(1).any(1)
        if odd.any():
            first = int(odd.int().argmax())
            largest = int(labels[first][labels[first] != IGNORED_PIXEL].max())
            row = rows.columns["mask"].sources[indices[first]]
            raise DataError(
                f"data.mask: row {row} of {rows.where} has the class {largest} for a model with "
                f"{num} outputs; write model.num_labels: {largest + 1} or more with a model.train "
                "section, or 255 where no class is meant"
            )
        return {"pixel_values": encoded["pixel_values"], "labels": labels.long()}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """As made of images as large as the first of the data."""
        from sosp_hub.tasks.examples import noise_images

        del num_tokens
        encoded = processor.own(
            images=noise_images(batch_size, processor.image_size), return_tensors="pt"
        )
        return {"pixel_values": encoded["pixel_values"]}

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter | OfAll]":
        """Over classes, of all pixels together."""
        from sosp_hub.tasks.maps import mean_iou, pixel_accuracy

        del info, processor
        return {"mean_iou": mean_iou, "accuracy": pixel_accuracy}
