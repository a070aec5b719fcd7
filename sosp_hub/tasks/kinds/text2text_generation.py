"""A text of another text: summaries, translations, answers."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import OfAll


@register
class Text2Text(TextTask):
    """Pairs of texts, for encoder-decoders; the loss is that of each token after the true ones."""

    name: ClassVar[str] = "text2text-generation"
    aliases: ClassVar[tuple[str, ...]] = ("text2text", "summarization", "translation")
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    columns: ClassVar[tuple[str, ...]] = ("source", "target")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits",)
    head: ClassVar[bool] = False
    batch_size: ClassVar[int | None] = 4
    of_all: ClassVar[tuple[str, ...]] = (
        *("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "word_error_rate", "exact_match"),
    )
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "accuracy", *of_all, "loss")
    counted: ClassVar[str] = "tokens"
    has_pipeline: ClassVar[bool] = False

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Both texts."""
        from sosp_hub.data.columns import texts_of
        from sosp_hub.data.rows import TableRows

        return TableRows(
            {key: texts_of(table, section, key, where) for key in ("source", "target")}, where
        )

    def prepare(self, data: "OpenData") -> "OpenData":
        """The subsets."""
        from sosp_hub.data.source import picked

        return picked(data)

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Both padded to the longest of a batch, cut at ``data.max_length``."""
        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import TextProcessing
        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.texts import EncodedSplit, allowed_length, encode
        from sosp_hub.errors import DataError

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TableRows) or not isinstance(processor, TextProcessing):
            raise wrong_kind(data)
        texts = [data.section.prefix + text for text in rows.columns["source"]]
        encoded = encode(texts, processor, data.section.max_length)
        length = allowed_length(processor, data.section.max_length)
        targets = processor.tokenizer(
            text_target=list(rows.columns["target"]), truncation=True, max_length=length
        )["input_ids"]
        empty = next((row for row, text in enumerate(rows.columns["target"]) if not text), None)
        if empty is not None:
            raise DataError(f"data.target: sample {empty} of {rows.where} is empty; take it out")
        return EncodedSplit({**encoded, "labels": targets}, processor.tokenizer, {})

    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """Tokens for both sides, and no cache."""
        from sosp_hub.tasks.examples import text_inputs

        inputs = text_inputs(loaded, batch_size, num_tokens)
        return {**inputs, "decoder_input_ids": inputs["input_ids"], "use_cache": False}

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, OfAll]":
        """Of texts that are generated greedily, no longer than the true ones are."""
        from sosp_hub.tasks.words import word_metrics

        del info
        return word_metrics(getattr(processor, "tokenizer", None), self.of_all)

    def use(self) -> list[str]:
        """Twenty tokens."""
        return [
            'inputs = tokenizer("The weather today is", return_tensors="pt")',
            "tokens = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(tokens[0]))",
        ]
