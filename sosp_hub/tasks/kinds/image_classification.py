"""One class for each image."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import ImageTask

if TYPE_CHECKING:
    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import OpenData
    from sosp_hub.data.split import Split


@register
class ImageClassification(ImageTask):
    """Images with one class each, for timm and transformers."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    by_timm: ClassVar[bool] = True
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("image", "label")
    pixels: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "per_class_accuracy", "perplexity")
    criterion: ClassVar[Mapping[str, Any]] = {
        **{"name": "sosp_i", "selection": "signed", "per": "macs"},
        "max_classes": 1,  # one pass, with a label drawn for each sample, however many there are
    }
    pretrained_rate: ClassVar[float] = 1e-4

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Opened when they are needed."""
        from sosp_hub.data.columns import image_column, labels_of
        from sosp_hub.data.rows import ImageRows

        labels, names = labels_of(table, section.label)
        images = image_column(table, section.image)
        return ImageRows(range(len(table)), images, labels, f"in row {{}} of {where}", names)

    def prepare(self, data: "OpenData") -> "OpenData":
        """Classes are numbers; small images are in memory."""
        from sosp_hub.data.source import classified

        return classified(data)

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """From memory, or opened one by one."""
        from sosp_hub.data.images import FileSplit, PixelSplit
        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import ImageProcessing
        from sosp_hub.data.rows import ImageRows, PixelRows

        rows = data.train if name == "train" else data.test
        match rows, processor:
            case PixelRows(), ImageProcessing():
                return PixelSplit(rows, processor, data.info.class_names, augment)
            case ImageRows(), ImageProcessing():
                return FileSplit(rows, processor, data.info.class_names, augment)
        raise wrong_kind(data)
