"""Data that is gone through more than once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sosp_hub.errors import CriterionError

if TYPE_CHECKING:
    from sosp_hub.types import Batches


def several_passes(batches: "Batches", criterion: str) -> "Batches":
    """The same batches; raises CriterionError where they can be gone through only once."""
    if isinstance(batches, Iterator):
        raise CriterionError(
            f"criterion {criterion!r} goes through the data more than once and was given a "
            f"{type(batches).__name__}; give a list of batches or a data loader"
        )
    return batches
