"""A tag for each word: named entities, parts of speech."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import Meter


@register
class TokenClassification(TextTask):
    """Lists of words with a list of tags; the first piece of a word counts for it."""

    name: ClassVar[str] = "token-classification"
    aliases: ClassVar[tuple[str, ...]] = ("ner",)
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    columns: ClassVar[tuple[str, ...]] = ("tokens", "tags")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "span_f1", "loss")
    counted: ClassVar[str] = "words"

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Words and tags, as many of the one as of the other."""
        from sosp_hub.data.columns import labels_of, values_of
        from sosp_hub.data.rows import TableRows
        from sosp_hub.errors import DataError

        words = values_of(table, section, "tokens", where, list, "a list of words")
        values_of(table, section, "tags", where, list, "a list of tags")
        tags, names = labels_of(table, section.tags)
        for row, (some, others) in enumerate(zip(words, tags, strict=True)):
            if len(some) != len(others):
                raise DataError(
                    f"data.tags: row {row} of {where} has {len(some)} words and {len(others)} "
                    "tags; give one for each word"
                )
        return TableRows({"tokens": words, "tags": tags}, where, class_names=names)

    def prepare(self, data: "OpenData") -> "OpenData":
        """Tags are numbers."""
        from sosp_hub.data.source import picked, with_listed_classes

        return picked(with_listed_classes(data, "tags", "tags"))

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """The tag of a word at its first piece, nothing at the others."""
        import torch

        from sosp_hub.data.ignored import IGNORED
        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import TextProcessing
        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.texts import EncodedSplit, allowed_length
        from sosp_hub.errors import ModelError

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TableRows) or not isinstance(processor, TextProcessing):
            raise wrong_kind(data)
        if not processor.tokenizer.is_fast:
            raise ModelError(
                f"model: {type(processor.tokenizer).__name__} does not say which word a token is "
                "of; give a model with a fast tokenizer (tokenizer.json)"
            )
        encoded = processor.tokenizer(
            list(rows.columns["tokens"]),
            is_split_into_words=True,
            truncation=True,
            max_length=allowed_length(processor, data.section.max_length),
        )
        order = processor.label_order
        outputs = torch.arange(len(data.info.class_names)) if order is None else torch.tensor(order)
        labels = []
        for row, tags in enumerate(rows.columns["tags"]):
            words, mine, last = encoded.word_ids(row), [], None
            for word in words:
                first = word is not None and word != last
                mine.append(int(outputs[tags[word]]) if first else IGNORED)
                last = word
            labels.append(mine)
        names = data.info.class_names
        return EncodedSplit({**encoded, "labels": labels}, processor.tokenizer, {}, names)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """F1 of whole entities."""
        from sosp_hub.tasks.metrics import f1_of_spans

        del processor
        return {"span_f1": f1_of_spans(info.class_names)}
