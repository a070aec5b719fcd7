"""One class for each recording."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import OpenData


@register
class AudioClassification(OwnTask):
    """Recordings with a class each, padded to the longest of a batch."""

    name: ClassVar[str] = "audio-classification"
    auto_class: ClassVar[str] = "AutoModelForAudioClassification"
    auto_processor: ClassVar[str | None] = "AutoFeatureExtractor"
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("audio", "label")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits",)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "per_class_accuracy")
    counted: ClassVar[str] = "recordings"
    sample: ClassVar[tuple[str, ...]] = ("import numpy", "numpy.zeros(16_000)")

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Recordings, read when they are needed."""
        from sosp_hub.data.audio import audio_column
        from sosp_hub.data.columns import labels_of
        from sosp_hub.data.rows import TableRows

        labels, names = labels_of(table, section.label)
        columns = {
            "audio": audio_column(table, section.audio, where),
            "label": [[label] for label in labels],
        }
        return TableRows(columns, where, class_names=names)

    def prepare(self, data: "OpenData") -> "OpenData":
        """Classes are numbers."""
        from sosp_hub.data.source import with_listed_classes

        return super().prepare(with_listed_classes(data, "label", "label"))

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Recordings of one length."""
        import torch

        own, order = processor.own, processor.label_order
        waves = [rows.columns["audio"].read(i, own.sampling_rate) for i in indices]
        labels = [rows.columns["label"][i][0] for i in indices]
        labels = labels if order is None else [order[label] for label in labels]
        return {**_features(own, waves), "labels": torch.tensor(labels)}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """A second of noise."""
        from sosp_hub.tasks.examples import noise_audio

        del num_tokens
        rate = processor.own.sampling_rate
        return _features(processor.own, noise_audio(batch_size, rate))


def _features(own: Any, waves: Sequence[Any]) -> dict[str, Any]:
    """As long as the longest; models of one fixed length (AST, Whisper) have their own default."""
    fixed = "input_values" not in own.model_input_names or hasattr(own, "max_length")
    padding = {} if fixed else {"padding": True}
    encoded = own(list(waves), sampling_rate=own.sampling_rate, return_tensors="pt", **padding)
    return {name: encoded[name] for name in own.model_input_names if name in encoded}
