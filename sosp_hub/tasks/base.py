"""What tasks on images, and tasks on texts, have in common."""

from abc import ABC
from typing import Any, ClassVar

from sosp_hub.recipe.tasks import Inputs, Task


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
