"""What loading a model gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sosp_hub.data.processing import Processing
from sosp_hub.types import Library

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: In eval mode.
        library: Which library built it.
        task: What it is used for.
        processor: How it wants its inputs (for `load_split`).
        num_labels: Outputs of the head; None where labels fix none.
        new_head: The head's weights are random and want training.
        tokenizer: To be saved beside the weights; None for images.
        image_processor: The transformers object, to be saved beside the weights; None for timm
            and text.
        base_model: Hub id of the weights; None for a local folder or random weights.
        base_revision: Commit of ``base_model``, where known.
        card: What a card inherits from the base's card, where readable: ``license``,
            ``license_name``, ``license_link``, ``language``, ``pipeline_tag``.
    """

    model: "nn.Module"
    library: Library
    task: str
    processor: Processing
    num_labels: int | None = None
    new_head: bool = False
    tokenizer: Any = None
    image_processor: Any = None
    base_model: str | None = None
    base_revision: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
