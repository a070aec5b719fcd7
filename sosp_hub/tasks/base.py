"""What tasks on images, and tasks on texts, have in common."""

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import Inputs, Task

if TYPE_CHECKING:
    from sosp_hub.data.rows import Rows
    from sosp_hub.data.source import OpenData


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

    def rows(self, table: Any, section: Any, where: str) -> "Rows":
        """Texts alone."""
        from sosp_hub.data.columns import texts_of
        from sosp_hub.data.rows import TextRows

        return TextRows(texts_of(table, section, "text", where))

    def prepare(self, data: "OpenData") -> "OpenData":
        """As it is: windows are cut first, and then subsets drawn."""
        return data
