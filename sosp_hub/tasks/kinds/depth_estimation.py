"""How far away each pixel of an image is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.tasks.metrics import Meter
    from sosp_hub.types import LossFn


@register
class DepthEstimation(OwnTask):
    """Images with a map of distances each; where it is 0 nothing is known.

    The loss is the mean squared error over the pixels that are known: transformers' models of depth
    have none of their own. For a model of inverse depth give maps of that.
    """

    name: ClassVar[str] = "depth-estimation"
    auto_class: ClassVar[str] = "AutoModelForDepthEstimation"
    auto_processor: ClassVar[str | None] = "AutoImageProcessor"
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("image", "depth")
    outputs: ClassVar[tuple[str, ...] | None] = ("predicted_depth",)
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("relative_error", "root_mean_squared_error", "loss")
    counted: ClassVar[str] = "images"
    sample: ClassVar[tuple[str, ...]] = (
        "from PIL import Image",
        'Image.new("RGB", (640, 480))',
    )

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Images, and maps as images of 16 or 32 bits or as lists of rows."""
        from sosp_hub.data.columns import image_column
        from sosp_hub.data.rows import ImageRows, TableRows

        none, numbers = [0] * len(table), range(len(table))
        images = image_column(table, section.image)
        first = table[0][section.depth]
        if isinstance(first, list):
            depths: Any = table[section.depth][:]
        else:
            named = f"in row {{}} of {where}"
            depths = ImageRows(numbers, image_column(table, section.depth), none, named)
        columns = {
            "image": ImageRows(numbers, images, none, f"in row {{}} of {where}"),
            "depth": depths,
        }
        return TableRows(columns, where)

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Maps of the size of what the model is given."""
        import numpy as np
        import torch
        import torch.nn.functional as F

        from sosp_hub.data.rows import ImageRows
        from sosp_hub.errors import DataError

        images = [rows.columns["image"].open(i, "RGB") for i in indices]
        pixels = processor.own(images=images, return_tensors="pt")["pixel_values"]
        depths, column = [], rows.columns["depth"]
        for index, image in zip(indices, images, strict=True):
            levels = (
                column.levels(index, "data.depth")
                if isinstance(column, ImageRows)
                else np.asarray(column[index], np.float32)
            )
            row = rows.columns["image"].sources[index]
            if levels.shape != (image.height, image.width):
                raise DataError(
                    f"data.depth: row {row} of {rows.where} has a map of shape "
                    f"{list(levels.shape)} for an image of {image.width} x {image.height} pixels"
                )
            if not np.isfinite(levels).all() or (levels < 0).any() or not levels.any():
                raise DataError(
                    f"data.depth: row {row} of {rows.where} has distances that are negative or not "
                    "finite, or none at all; write 0 where nothing is known"
                )
            depth = torch.from_numpy(levels.astype(np.float32)) * data.section.depth_scale
            depths.append(F.interpolate(depth[None, None], pixels.shape[-2:], mode="nearest")[0, 0])
        return {"pixel_values": pixels, "labels": torch.stack(depths)}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """As made of images as large as the first of the data."""
        from sosp_hub.tasks.examples import noise_images

        del num_tokens
        encoded = processor.own(
            images=noise_images(batch_size, processor.image_size), return_tensors="pt"
        )
        return {"pixel_values": encoded["pixel_values"]}

    def loss_fn(self, model: Any, dense: Any = None) -> "LossFn":
        """Squared, over what is known."""
        from sosp_hub.tasks.maps import depth_error

        del model, dense
        return depth_error

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """Of distances, over what is known."""
        from sosp_hub.tasks.maps import relative_error
        from sosp_hub.tasks.metrics import squared_error

        del info, processor
        return {"relative_error": relative_error, "root_mean_squared_error": squared_error}
