"""A vector for each text, such that texts that mean the same are near each other."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.kinds.feature_extraction import FeatureExtraction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import Meter, OfAll


@register
class SentenceSimilarity(FeatureExtraction):
    """Pairs of texts with how alike they are, as in STS-B.

    The loss is that of feature-extraction, to the dense model's embeddings: the scores are measured
    with and not trained with.
    """

    name: ClassVar[str] = "sentence-similarity"
    columns: ClassVar[tuple[str, ...]] = ("first", "second", "score")
    metrics: ClassVar[tuple[str, ...]] = ("spearman", "cosine", "loss")
    of_all: ClassVar[tuple[str, ...]] = ("spearman",)
    counted: ClassVar[str] = "texts"
    has_pipeline: ClassVar[bool] = False

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Both texts and the score of each pair."""
        import math

        from sosp_hub.data.columns import texts_of
        from sosp_hub.data.rows import TableRows
        from sosp_hub.errors import DataError

        first, second = (texts_of(table, section, key, where) for key in ("first", "second"))
        scores = table[section.score][:]
        for row, score in enumerate(scores):
            if isinstance(score, str | bool | None) or not math.isfinite(score):
                raise DataError(
                    f"data.score: row {row} of {where} has {score!r}, expected a finite number"
                )
        return TableRows({"first": first, "second": second, "score": scores}, where)

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """The texts of a pair one after the other; labels are the pair's number and its score."""
        import torch

        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import TextProcessing
        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.texts import EncodedSplit, encode

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TableRows) or not isinstance(processor, TextProcessing):
            raise wrong_kind(data)
        both = zip(rows.columns["first"], rows.columns["second"], strict=True)
        texts = [text for pair in both for text in pair]
        encoded = encode(texts, processor, data.section.max_length)
        scores = torch.tensor(rows.columns["score"], dtype=torch.float64)
        labels = torch.stack([torch.arange(len(scores)).double(), scores], 1)
        targets = {"labels": labels.repeat_interleave(2, 0)}
        return EncodedSplit(encoded, processor.tokenizer, targets)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter | OfAll]":
        """The rank correlation with the scores too."""
        from sosp_hub.tasks.embeddings import spearman

        return {**super().meters(info, processor), "spearman": spearman}
