"""Models and data of a task, made once."""

import pytest

from tests.tasks.made import CASES, make
from tests.zoo.conftest import save, tokenizer_folder

__all__ = ["save", "tokenizer_folder"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder with the model and the data of a case."""
    made = {}

    def of(key):
        if key not in made:
            made[key] = make(CASES[key], tmp_path_factory.mktemp("task"))
        return made[key]

    return of
