"""Where in a text the answer to a question stands."""

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
class QuestionAnswering(TextTask):
    """Extractive answers as in SQuAD; one without an answer stands at the first token."""

    name: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match", "loss")
    has_pipeline: ClassVar[bool] = False  # no longer

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Each answer has to stand where it is said to."""
        from sosp_hub.data.columns import texts_of, values_of
        from sosp_hub.data.rows import TableRows
        from sosp_hub.errors import DataError

        columns: dict[str, Any] = {
            key: texts_of(table, section, key, where) for key in ("question", "context")
        }
        answers = values_of(table, section, "answers", where, dict, "an object")
        places = []
        for row, (answer, context) in enumerate(zip(answers, columns["context"], strict=True)):
            texts, starts = answer.get("text"), answer.get("answer_start")
            if not isinstance(texts, list) or not isinstance(starts, list):
                raise DataError(
                    f"data.answers: row {row} of {where} has {answer!r}; expected "
                    '{"text": [...], "answer_start": [...]}'
                )
            if not texts:
                places.append(None)
                continue
            start, end = starts[0], starts[0] + len(texts[0])
            if context[start:end] != texts[0] or start < 0:
                raise DataError(
                    f"data.answers: row {row} of {where}: {texts[0]!r} does not stand at "
                    f"character {start} of its context, where {context[max(start, 0) : end]!r} is"
                )
            places.append((start, end))
        return TableRows({**columns, "answers": places}, where)

    def prepare(self, data: "OpenData") -> "OpenData":
        """The subsets."""
        from sosp_hub.data.source import picked

        return picked(data)

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Question and context, whose end is cut where both are too long."""
        import torch

        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import TextProcessing
        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.texts import EncodedSplit, allowed_length
        from sosp_hub.errors import ModelError

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TableRows) or not isinstance(processor, TextProcessing):
            raise wrong_kind(data)
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast or tokenizer.padding_side != "right":
            raise ModelError(
                f"model: {type(tokenizer).__name__} does not say where a token stands, or pads on "
                "the left; give a model with a fast tokenizer (tokenizer.json) that pads on the "
                "right"
            )
        encoded = tokenizer(
            list(rows.columns["question"]),
            list(rows.columns["context"]),
            truncation="only_second",
            max_length=allowed_length(processor, data.section.max_length),
        )
        ends = [_tokens_of(encoded, row, at) for row, at in enumerate(rows.columns["answers"])]
        starts, stops = torch.tensor(ends, dtype=torch.int64).view(-1, 2).unbind(1)
        targets = {"start_positions": starts, "end_positions": stops}
        return EncodedSplit(encoded, tokenizer, targets)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """By tokens."""
        from sosp_hub.tasks.metrics import exact_span, f1_of_answers

        del info, processor
        return {"f1": f1_of_answers, "exact_match": exact_span}

    def use(self) -> list[str]:
        """The answer as text."""
        return [
            'inputs = tokenizer("Who came?", "On Monday Ann came.", return_tensors="pt")',
            "outputs = model(**inputs)",
            "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
            "print(tokenizer.decode(inputs['input_ids'][0, start : end + 1]))",
        ]


def _tokens_of(encoded: Any, row: int, at: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token of an answer; the first of all where there is none, or it is cut off."""
    if at is None:
        return 0, 0
    first = encoded.char_to_token(row, at[0], sequence_index=1)
    last = encoded.char_to_token(row, at[1] - 1, sequence_index=1)
    return (0, 0) if first is None or last is None else (first, last)
