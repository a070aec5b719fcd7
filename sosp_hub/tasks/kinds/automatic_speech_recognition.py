"""The words that are spoken in a recording."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.tasks.metrics import OfAll


@register
class SpeechRecognition(OwnTask):
    """Recordings with their texts, for CTC (Wav2Vec2) and encoder-decoders (Whisper).

    The loss is the model's own; that of CTC has no curvature that is known, so that `sosp_i` and
    compensation take the empirical Fisher.
    """

    name: ClassVar[str] = "automatic-speech-recognition"
    auto_class: ClassVar[str] = "AutoModelForCTC"
    other_auto_classes: ClassVar[tuple[str, ...]] = ("AutoModelForSpeechSeq2Seq",)
    auto_processor: ClassVar[str | None] = "AutoProcessor"
    tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("audio", "text")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits",)
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("word_error_rate", "exact_match", "loss")
    of_all: ClassVar[tuple[str, ...]] = ("word_error_rate", "exact_match")
    counted: ClassVar[str] = "recordings"
    sample: ClassVar[tuple[str, ...]] = ("import numpy", "numpy.zeros(16_000)")

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Recordings, read when they are needed."""
        from sosp_hub.data.audio import audio_column
        from sosp_hub.data.columns import texts_of
        from sosp_hub.data.rows import TableRows

        columns = {
            "audio": audio_column(table, section.audio, where),
            "text": texts_of(table, section, "text", where),
        }
        return TableRows(columns, where)

    def configure(self, config: Any, data: "DataInfo | None") -> None:
        """CTC's loss as a mean: the usual sum would depend on the size of the batch."""
        del data
        if hasattr(config, "ctc_loss_reduction"):
            config.ctc_loss_reduction = "mean"

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Recordings padded to the longest, or to the model's own length; texts as tokens."""
        from sosp_hub.data.ignored import IGNORED
        from sosp_hub.errors import DataError

        features, tokenizer = processor.own.feature_extractor, processor.own.tokenizer
        column, texts = rows.columns["audio"], [rows.columns["text"][i] for i in indices]
        waves = [column.read(i, features.sampling_rate) for i in indices]
        inputs = _features(features, waves)
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
        start = getattr(processor.config, "decoder_start_token_id", None)
        if start is not None and bool((labels[:, 0] == start).all()):
            labels = labels[:, 1:]  # the model puts it there itself
        for index, text in zip(indices, texts, strict=True):
            known = set(tokenizer(text, add_special_tokens=False)["input_ids"])
            if known <= {tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("|")}:
                raise DataError(
                    f"data.text: row {column.positions[index]} of {rows.where} has the text "
                    f"{text[:80]!r}, of which the tokenizer knows no character; write it as the "
                    f"tokenizer has it: {''.join(list(tokenizer.get_vocab())[:40])}"
                )
        return {**inputs, "labels": labels}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """A second of noise; as many tokens as of a text."""
        import torch

        from sosp_hub.tasks.examples import noise_audio

        features = processor.own.feature_extractor
        inputs = _features(features, noise_audio(batch_size, features.sampling_rate))
        if not processor.config.is_encoder_decoder:
            return inputs
        most = getattr(processor.config, "max_target_positions", None) or num_tokens
        tokens = torch.ones(batch_size, min(num_tokens, most), dtype=torch.int64)
        return {**inputs, "decoder_input_ids": tokens * processor.config.decoder_start_token_id}

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, OfAll]":
        """Of what is generated greedily, or read by CTC without a language model."""
        from sosp_hub.tasks.words import word_metrics

        del info
        own = getattr(processor, "own", None)
        return word_metrics(getattr(own, "tokenizer", None), self.of_all)


def _features(features: Any, waves: Sequence[Any]) -> dict[str, Any]:
    """As long as the longest; models of one fixed length (Whisper) have their own default."""
    fixed = "input_features" in features.model_input_names
    encoded = features(
        list(waves),
        sampling_rate=features.sampling_rate,
        return_tensors="pt",
        **({} if fixed else {"padding": True}),
    )
    return {name: encoded[name] for name in features.model_input_names if name in encoded}
