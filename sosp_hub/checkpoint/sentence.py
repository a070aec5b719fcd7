"""Saves a SentenceTransformer in its own layout: it writes and reads its folder itself.

The transformers model inside carries its delta, so that sentence-transformers loads it as any other
once ``sosp_hub`` is imported.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.errors import CheckpointError


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether sentence-transformers builds the model, from the modules that its folder lists."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)


def write(model: Any, folder: Path) -> str:
    """Writes the folder (``modules.json``, a subfolder for each module), and reads it again.

    Returns:
        Why no plain config says all: not asked here, so empty.

    Raises:
        CheckpointError: The folder would not load as the model.
    """
    model.save_pretrained(str(folder), create_model_card=False)
    try:
        again = type(model)(str(folder), device="cpu").state_dict()
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__}: the folder that it writes does not load again: {error}"
        ) from error
    state = model.state_dict()
    for name in sorted(state.keys() | again.keys()):
        ours, theirs = state.get(name), again.get(name)
        if ours is None or theirs is None or not torch.equal(ours.cpu(), theirs.to(ours.dtype)):
            raise CheckpointError(
                f"{type(model).__name__}: tensor {name!r} of the folder that it writes is another "
                "one when it is loaded again"
            )
    return ""
