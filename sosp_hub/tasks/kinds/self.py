"""No labels: how far a model is from what the dense model makes of the same inputs."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import Inputs, Task, register

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import DataInfo, OpenData
    from sosp_hub.data.split import Split
    from sosp_hub.tasks.metrics import Meter
    from sosp_hub.types import LossFn


@register
class Self(Task):
    """Texts or images alone, for any model: the dense model's outputs are the targets.

    The class of the model is that of its weights. The divergence is that of distributions where the
    model gives logits, else a squared distance. Criteria of first order refuse it: the dense model
    is at its minimum.
    """

    name: ClassVar[str] = "self"
    auto_class: ClassVar[str] = ""
    by_timm: ClassVar[bool] = True
    inputs: ClassVar[Inputs] = "texts"
    columns: ClassVar[tuple[str, ...]] = ()
    more_columns: ClassVar[tuple[str, ...]] = ("image", "text")
    pixels: ClassVar[bool] = True
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("divergence", "agreement", "loss")
    learns: ClassVar[bool] = False
    has_pipeline: ClassVar[bool] = False

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Texts, or images, whichever column there is."""
        from sosp_hub.data.columns import check_columns, image_column, texts_of
        from sosp_hub.data.rows import ImageRows, TextRows

        if section.image in table.column_names:
            images = image_column(table, section.image)
            none = [0] * len(table)
            return ImageRows(range(len(table)), images, none, f"in row {{}} of {where}")
        check_columns(table, section, ("text",), where)
        return TextRows(texts_of(table, section, "text", where))

    def prepare(self, data: "OpenData") -> "OpenData":
        """Without labels, small images in memory."""
        from dataclasses import replace

        from sosp_hub.data.rows import ImageRows, PixelRows, TextRows
        from sosp_hub.data.source import in_memory, picked

        if isinstance(data.train, TextRows):
            return picked(replace(data, info=replace(data.info, inputs="texts")))

        def alone(rows: Any) -> Any:
            assert isinstance(rows, ImageRows | PixelRows)
            return replace(rows, labels=[0] * len(rows), class_names=())

        train = alone(data.train)
        test = train if data.test is data.train else alone(data.test)
        info = replace(data.info, inputs="images")
        return in_memory(replace(data, info=info, train=train, test=test))

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Inputs as the model takes them."""
        from sosp_hub.data.images import FileSplit, PixelSplit
        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import ImageProcessing, TextProcessing
        from sosp_hub.data.rows import ImageRows, PixelRows, TextRows
        from sosp_hub.data.split import InputsAlone
        from sosp_hub.data.texts import EncodedSplit, encode

        rows = data.train if name == "train" else data.test
        match rows, processor:
            case TextRows(), TextProcessing():
                encoded = encode(rows.texts, processor, data.section.max_length)
                return EncodedSplit(encoded, processor.tokenizer, {})
            case PixelRows(), ImageProcessing():
                return InputsAlone(PixelSplit(rows, processor, (), augment))
            case ImageRows(), ImageProcessing():
                return InputsAlone(FileSplit(rows, processor, (), augment))
        raise wrong_kind(data)

    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> Any:
        """Images or tokens, as the model takes them."""
        from sosp_hub.data.processing import ImageProcessing
        from sosp_hub.tasks.examples import image_inputs, text_inputs

        if isinstance(loaded.processor, ImageProcessing):
            return image_inputs(loaded, batch_size)
        inputs = text_inputs(loaded, batch_size, num_tokens)
        return {**inputs, "use_cache": False} if loaded.model.can_generate() else inputs

    def loss_fn(self, model: Any, dense: Any = None) -> "LossFn":
        """Distributions of logits; timm's classifiers return these without a name."""
        from sosp_hub.tasks.own_outputs import OwnOutputs

        return OwnOutputs("softmax" if getattr(model, "num_classes", 0) else None, dense=dense)

    def meters(self, info: "DataInfo", processor: Any = None) -> "Mapping[str, Meter]":
        """What the loss is more than the least it can be; how often the likeliest is the same."""
        from sosp_hub.tasks.metrics import agreement, divergence

        del info, processor
        return {"divergence": divergence, "agreement": agreement}

    def use(self) -> list[str]:
        """What the model returns."""
        return [
            'inputs = tokenizer("The weather today is", return_tensors="pt")',
            "print(model(**inputs)[0])",
        ]
