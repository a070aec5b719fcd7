"""A vector for each text: the mean over its tokens. Needs no labels."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import Meter, OfAll
    from sosp_hub.types import LossFn


@register
class FeatureExtraction(TextTask):
    """Texts alone; the loss is 1 - cosine to the dense model's embeddings."""

    name: ClassVar[str] = "feature-extraction"
    auto_class: ClassVar[str] = "AutoModel"
    columns: ClassVar[tuple[str, ...]] = ("text",)
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("cosine", "loss")
    learns: ClassVar[bool] = False

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Texts alone."""
        from sosp_hub.data.columns import texts_of
        from sosp_hub.data.rows import TextRows

        return TextRows(texts_of(table, section, "text", where))

    def prepare(self, data: "OpenData") -> "OpenData":
        """The subsets."""
        from sosp_hub.data.source import picked

        return picked(data)

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Padded to the longest of a batch."""
        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import TextProcessing
        from sosp_hub.data.rows import TextRows
        from sosp_hub.data.texts import EncodedSplit, encode

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TextRows) or not isinstance(processor, TextProcessing):
            raise wrong_kind(data)
        encoded = encode(rows.texts, processor, data.section.max_length)
        return EncodedSplit(encoded, processor.tokenizer, {})

    def loss_fn(self, model: Any, dense: Any = None) -> "LossFn":
        """Of the mean over tokens."""
        from sosp_hub.tasks.embeddings import OwnEmbedding

        del model
        return OwnEmbedding("mean", dense)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter | OfAll]":
        """How near the embeddings are."""
        from sosp_hub.tasks.embeddings import cosine

        del info, processor
        return {"cosine": cosine}

    def use(self) -> list[str]:
        """The embedding of a text."""
        return [
            'inputs = tokenizer("The weather today is", return_tensors="pt")',
            "print(model(**inputs).last_hidden_state.mean(1))",
        ]
