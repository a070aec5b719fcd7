"""A run inside a process that is somebody else's."""

from collections.abc import Iterator
from contextlib import contextmanager

from sosp_hub.compat.accelerate import process_state_kept
from sosp_hub.structure.isolation import random_numbers_kept


@contextmanager
def as_guest() -> Iterator[None]:
    """Random numbers and Accelerate's state are afterwards as they were, also after an error."""
    with random_numbers_kept(), process_state_kept():
        yield
