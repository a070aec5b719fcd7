"""What tasks on images, on texts, and on what a model's own processor takes have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import Inputs, Task

if TYPE_CHECKING:
    from sosp_hub.data.rows import Rows, TableRows
    from sosp_hub.data.source import OpenData
    from sosp_hub.data.split import Split


class ImageTask(Task, ABC):
    """A task on images."""

    inputs: ClassVar[Inputs] = "images"

    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> Any:
        """Images of the size of the run."""
        from sosp_hub.tasks.examples import image_inputs

        del num_tokens
        return image_inputs(loaded, batch_size)


class TextTask(Task, ABC):
    """A task on texts."""

    inputs: ClassVar[Inputs] = "texts"

    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """Tokens, and a mask without padding."""
        from sosp_hub.tasks.examples import text_inputs

        return text_inputs(loaded, batch_size, num_tokens)


class LanguageModelTask(TextTask, ABC):
    """Texts without labels, joined and cut into windows of tokens."""

    columns: ClassVar[tuple[str, ...]] = ("text",)
    head: ClassVar[bool] = False
    batch_size: ClassVar[int | None] = 4  # each token has an output for every word there is

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Texts alone."""
        from sosp_hub.data.columns import texts_of
        from sosp_hub.data.rows import TextRows

        return TextRows(texts_of(table, section, "text", where))

    def prepare(self, data: "OpenData") -> "OpenData":
        """As it is: windows are cut first, and then subsets drawn."""
        return data


class OwnTask(Task, ABC):
    """A task whose batches the model's own processor makes of the rows of a table."""

    inputs: ClassVar[Inputs] = "own"

    def prepare(self, data: "OpenData") -> "OpenData":
        """The subsets, and how large the first image is."""
        from dataclasses import replace

        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.source import picked

        data = picked(data)
        assert isinstance(data.train, TableRows)
        images = data.train.columns.get("image")
        if images is None:
            return data
        width, height = images.open(0).size
        return replace(data, info=replace(data.info, first_size=(height, width)))

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Batches that are made when they are asked for."""
        from functools import partial

        from sosp_hub.data.loading import wrong_kind
        from sosp_hub.data.processing import OwnProcessing
        from sosp_hub.data.rows import TableRows
        from sosp_hub.data.split import MadeSplit

        del augment
        rows = data.train if name == "train" else data.test
        if not isinstance(rows, TableRows) or not isinstance(processor, OwnProcessing):
            raise wrong_kind(data)
        make = partial(self.batch, rows, data, processor)
        return MadeSplit(len(rows), make, data.info.class_names)

    @abstractmethod
    def batch(
        self, rows: "TableRows", data: "OpenData", processor: Any, indices: Sequence[int]
    ) -> dict[str, Any]:
        """A batch of these rows, as the model takes it."""

    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """What the processor makes of noise, on the model's device."""
        from sosp_hub.tasks.examples import for_model

        return for_model(loaded, self.example(loaded.processor, batch_size, num_tokens))

    @abstractmethod
    def example(self, processor: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """Inputs for a trace or a timing, the same each time."""
