"""Loads what a recipe names: any timm or transformers model, with what is known about its origin."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sosp_hub.data.processing import Processing
from sosp_hub.data.source import DataInfo
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.types import Library, Task


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: In eval mode.
        library: Which library built it.
        task: What it is used for.
        processor: How it wants its inputs (for `load_split`).
        num_labels: Outputs of the head; None for causal-lm.
        new_head: The head's weights are random and want training.
        tokenizer: To be saved beside the weights; None for images.
        image_processor: The transformers object, to be saved beside the weights; None for timm and text.
        base_model: Hub id of the weights; None for a local folder or random weights.
        base_revision: Commit of ``base_model``, where known.
        card: What a card inherits from the base's card, where readable: ``license``, ``license_name``,
            ``license_link``, ``language``, ``pipeline_tag``.
    """

    model: nn.Module
    library: Library
    task: Task
    processor: Processing
    num_labels: int | None = None
    new_head: bool = False
    tokenizer: Any = None
    image_processor: Any = None
    base_model: str | None = None
    base_revision: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


def load_model(section: ModelSection, *, data: DataInfo | None = None) -> Loaded:
    """The model of a recipe, with a head that fits the data.

    Raises:
        ModelError: An unknown name, a folder that holds no such model, a head that does not fit the labels.
        HubError: The hub cannot be reached.
    """
    raise NotImplementedError


def example_inputs(loaded: Loaded, batch_size: int = 2) -> tuple[Tensor, ...] | dict[str, Any]:
    """Inputs for a trace: a tuple for timm, a dict for transformers (``use_cache=False`` for causal-lm)."""
    raise NotImplementedError
