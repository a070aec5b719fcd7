"""An answer to a question on an image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import OwnTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.tasks.metrics import Meter


@register
class ImageTextToText(OwnTask):
    """Images with a question and an answer each; only the answer's tokens count.

    Texts are written by the processor's chat template, or, where it has none, as the image's token,
    the question and the answer on a line each.
    """

    name: ClassVar[str] = "image-text-to-text"
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    auto_processor: ClassVar[str | None] = "AutoProcessor"
    columns: ClassVar[tuple[str, ...]] = ("image", "source", "target")
    outputs: ClassVar[tuple[str, ...] | None] = ("logits",)
    head: ClassVar[bool] = False
    batch_size: ClassVar[int | None] = 4
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "accuracy", "exact_match", "loss")
    counted: ClassVar[str] = "tokens"
    pretrained_rate: ClassVar[float] = 2e-5

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Images, opened when they are needed, and both texts."""
        from sosp_hub.data.columns import image_column, texts_of
        from sosp_hub.data.rows import ImageRows, TableRows
        from sosp_hub.errors import DataError

        answers = texts_of(table, section, "target", where)
        empty = next((row for row, answer in enumerate(answers) if not answer.strip()), None)
        if empty is not None:
            raise DataError(f"data.target: row {empty} of {where} is empty; take it out")
        images = image_column(table, section.image)
        none, numbers = [0] * len(table), range(len(table))
        columns: dict[str, Any] = {
            "image": ImageRows(numbers, images, none, f"in row {{}} of {where}"),
            "source": texts_of(table, section, "source", where),
            "target": answers,
        }
        return TableRows(columns, where)

    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """Question and answer in one text; labels are the tokens behind the question."""
        import torch

        from sosp_hub.data.ignored import IGNORED
        from sosp_hub.errors import DataError

        columns = rows.columns
        images = [columns["image"].open(i, "RGB") for i in indices]
        questions = [_asked(processor.own, columns["source"][i]) for i in indices]
        answers = [columns["target"][i] for i in indices]
        tokenizer = processor.own.tokenizer
        end = tokenizer.eos_token or ""
        texts = [q + a + end for q, a in zip(questions, answers, strict=True)]
        encoded = _encoded(processor.own, images, texts)
        tokens, mask = encoded["input_ids"], encoded["attention_mask"].bool()
        labels = torch.full_like(tokens, IGNORED)
        for row, (index, image, question) in enumerate(
            zip(indices, images, questions, strict=True)
        ):
            whole = tokens[row][mask[row]]
            start = _encoded(processor.own, [image], [question])["input_ids"][0]
            num = len(start)
            if not torch.equal(whole[:num], start) or num == len(whole):
                raise DataError(
                    f"data.target: row {columns['image'].sources[index]} of {rows.where} has the "
                    f"answer {answers[row][:80]!r}, which gives no tokens of its own"
                )
            mine = torch.full_like(whole, IGNORED)
            mine[num:] = whole[num:]
            labels[row, mask[row]] = mine
        return {**encoded, "labels": labels}

    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """Noise with a question of six words."""
        from sosp_hub.tasks.examples import noise_images

        del num_tokens
        question = _asked(processor.own, "What is there to be seen?")
        return _encoded(
            processor.own, noise_images(batch_size, processor.image_size), [question] * batch_size
        )

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """How often each token of an answer is right, the true ones before it given."""
        from sosp_hub.tasks.metrics import whole_answers

        del info, processor
        return {"exact_match": whole_answers}


def _asked(own: Any, question: str) -> str:
    """What stands before an answer."""
    if getattr(own, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        return own.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return f"{own.image_token}\n{question}\n"


def _encoded(own: Any, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Any]:
    encoded = own(
        images=[[image] for image in images],
        text=list(texts),
        padding=True,
        return_tensors="pt",
    )
    return dict(encoded)
