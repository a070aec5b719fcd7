"""A vector for each image, as of DINO. Needs no labels."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import find_task, register
from sosp_hub.tasks.base import ImageTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import Meter
    from sosp_hub.types import LossFn


@register
class ImageFeatureExtraction(ImageTask):
    """Images alone; the loss is 1 - cosine to the dense model's embeddings.

    The embedding is the model's ``pooler_output``, or the mean over places where it has none; of
    timm's models what ``num_classes=0`` returns.
    """

    name: ClassVar[str] = "image-feature-extraction"
    auto_class: ClassVar[str] = "AutoModel"
    by_timm: ClassVar[bool] = True
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("image",)
    pixels: ClassVar[bool] = True
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("cosine", "loss")
    learns: ClassVar[bool] = False
    sample: ClassVar[tuple[str, ...]] = (
        "from PIL import Image",
        'Image.new("RGB", (224, 224))',
    )

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """As of `self`."""
        return find_task("self").rows(table, section, where)

    def prepare(self, data: "OpenData") -> "OpenData":
        """As of `self`."""
        return find_task("self").prepare(data)

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """As of `self`."""
        return find_task("self").split(data, name, processor, augment=augment)

    def loss_fn(self, model: Any, dense: Any = None) -> "LossFn":
        """Of the model's own vector."""
        from sosp_hub.tasks.embeddings import OwnEmbedding

        del model
        return OwnEmbedding("pooler", dense)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """How near the embeddings are."""
        from sosp_hub.tasks.embeddings import cosine

        del info, processor
        return {"cosine": cosine}
