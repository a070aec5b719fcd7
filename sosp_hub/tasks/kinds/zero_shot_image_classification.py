"""Which of some texts an image goes with: CLIP, SigLIP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.tasks.metrics import OfAll

PROMPT = "This is a photo of {}."
"""What transformers' pipeline makes of the name of a class."""


@register
class ZeroShotImageClassification(OwnTask):
    """Images with a text each, or a class whose name is put into a sentence.

    The loss is the model's own, which contrasts the pairs of a batch: it depends on their number,
    and a sample alone has none. Its curvature is not known, so that `sosp_i` and compensation take
    the empirical Fisher.
    """

    name: ClassVar[str] = "zero-shot-image-classification"
    auto_class: ClassVar[str] = "AutoModelForZeroShotImageClassification"
    auto_processor: ClassVar[str | None] = "AutoProcessor"
    columns: ClassVar[tuple[str, ...]] = ("image",)
    more_columns: ClassVar[tuple[str, ...]] = ("text", "label")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits_per_image", "image_embeds", "text_embeds")
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    of_all: ClassVar[tuple[str, ...]] = ("accuracy",)
    counted: ClassVar[str] = "images"
    pretrained_rate: ClassVar[float] = 1e-5
    sample: ClassVar[tuple[str, ...]] = (
        "from PIL import Image",
        'Image.new("RGB", (224, 224)), candidate_labels=["a cat", "a dog"]',
    )

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """The column of texts where there is one, else that of classes."""
        from sosp_hub.data.columns import check_columns, image_column, labels_of, texts_of
        from sosp_hub.data.labels import listed_classes
        from sosp_hub.data.rows import ImageRows, TableRows

        if section.text in table.column_names:
            texts = texts_of(table, section, "text", where)
        else:
            check_columns(table, section, ("label",), where)
            labels, listed = labels_of(table, section.label)
            lists = [[label] for label in labels]
            names, numbers = listed_classes(lists, listed, where, "label", least=1)
            texts = [PROMPT.format(names[number]) for (number,) in numbers(lists)]
        images = image_column(table, section.image)
        none, numbers = [0] * len(table), range(len(table))
        rows = ImageRows(numbers, images, none, f"in row {{}} of {where}")
        return TableRows({"image": rows, "text": texts}, where)

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Pairs."""
        images = [rows.columns["image"].open(i, "RGB") for i in indices]
        texts = [rows.columns["text"][i] for i in indices]
        return {**_encoded(processor, images, texts), "return_loss": True}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """Noise with a text of six words."""
        from sosp_hub.tasks.examples import noise_images

        del num_tokens
        texts = [PROMPT.format("noise")] * batch_size
        return _encoded(processor, noise_images(batch_size, processor.image_size), texts)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, OfAll]":
        """How often an image's own text is the nearest of all different texts of the split."""
        from sosp_hub.tasks.pairs import retrieval

        del info, processor
        return {"accuracy": retrieval}


def _encoded(processor: Any, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Any]:
    """SigLIP was trained with texts that are padded to its longest."""
    siglip = processor.config.model_type.startswith("siglip")
    encoded = processor.own(
        text=list(texts),
        images=list(images),
        padding="max_length" if siglip else True,
        truncation=True,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in _INPUTS if name in encoded}


_INPUTS = "pixel_values", "input_ids", "attention_mask"
