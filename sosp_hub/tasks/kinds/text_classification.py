"""One class, several, or a number for each text."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import TextTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import Meter

_OF_PROBLEM = {"multi_label": ("f1", "accuracy"), "regression": ("mean_absolute_error", "loss")}
_IN_CONFIG = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


@register
class TextClassification(TextTask):
    """Texts, or pairs of them, with a label each: a class, a list of classes, or a number."""

    name: ClassVar[str] = "text-classification"
    aliases: ClassVar[tuple[str, ...]] = ("sentiment-analysis",)
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    more_columns: ClassVar[tuple[str, ...]] = ("text_pair",)
    metrics: ClassVar[tuple[str, ...]] = (
        *("accuracy", "loss", "per_class_accuracy", "perplexity"),
        *("f1", "mean_absolute_error", "root_mean_squared_error"),
    )

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Texts and labels as the table has them."""
        from sosp_hub.data.columns import check_columns, labels_of, texts_of
        from sosp_hub.data.rows import TextRows

        pairs = None
        if section.text_pair is not None:
            check_columns(table, section, ("text_pair",), where)
            pairs = texts_of(table, section, "text_pair", where)
        labels, names = labels_of(table, section.label)
        return TextRows(texts_of(table, section, "text", where), labels, names, pairs)

    def prepare(self, data: "OpenData") -> "OpenData":
        """What the labels say: lists are of several classes, fractions are numbers to meet."""
        from sosp_hub.data.labels import problem_of
        from sosp_hub.data.source import classified, with_several, with_values

        problem = problem_of(data.train, data.section.problem, data.name)
        return {"multi_label": with_several, "regression": with_values}.get(problem, classified)(
            data
        )

    def configure(self, config: Any, data: "DataInfo | None") -> None:
        """The loss that transformers takes."""
        if data is not None:
            config.problem_type = _IN_CONFIG[data.problem]

    def default_metrics(self, info: "DataInfo | None") -> tuple[str, ...]:
        """By what the labels are."""
        return _OF_PROBLEM.get(info.problem if info else "", self.metrics)[:1]

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """For several classes, and for numbers."""
        from sosp_hub.tasks import metrics

        del info, processor
        return {
            "f1": metrics.f1_of_labels,
            "mean_absolute_error": metrics.absolute_error,
            "root_mean_squared_error": metrics.squared_error,
        }

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Padded to the longest of a batch."""
        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import TextProcessing
        from sosp_hub.data.rows import TextRows
        from sosp_hub.data.texts import LabelledTextSplit

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TextRows) or not isinstance(processor, TextProcessing):
            raise wrong_kind(data)
        return LabelledTextSplit(
            rows, processor, data.info.class_names, data.section.max_length, data.info.problem
        )
