"""Hand-chosen mutations as data: one TOML file per room in ``rooms/``, one table per mutation.

``file``: below ``sosp_hub/``. ``old``: its exact text there, once. ``new``: what is put in its
place. ``loses``: what a user would lose. ``tests``: what pytest is given, the files that ought to
notice (the room's own where it is left out). ``select``: for ``pytest -k``. ``first``: as
``select``, of those that are run before the others. ``equivalent``: why no user can see a
difference, for one that survives and may.
"""

import hashlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).parents[2]
_ROOMS = Path(__file__).parent / "rooms"


@dataclass(frozen=True)
class Mutation:
    """One change of the product that a test must notice."""

    room: str
    name: str
    file: str
    old: str
    new: str
    loses: str
    tests: tuple[str, ...]
    select: str = ""
    first: str = ""
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.room}/{self.name}"

    def source(self, tree: Path = TREE) -> Path:
        """The file that it changes."""
        return tree / "sosp_hub" / self.file

    def mutant(self, tree: Path = TREE) -> str:
        """The changed text.

        Raises:
            ValueError: The old text is not there exactly once, nothing changes, or the new text
                is no Python.
        """
        if not self.source(tree).is_file():
            raise ValueError(f"{self}: there is no {self.file}")
        text = self.source(tree).read_text("utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: {self.file} has the old text {text.count(self.old)} times")
        mutant = text.replace(self.old, self.new)
        if mutant == text:
            raise ValueError(f"{self}: old and new text are the same")
        if self.file.endswith(".py"):
            try:
                compile(mutant, self.file, "exec")
            except SyntaxError as error:
                raise ValueError(f"{self}: {error}") from error
        return mutant

    def digest(self, tree: Path = TREE) -> str:
        """Of all that decides the result: the changed file and the tests."""
        parts = [self.mutant(tree), self.select, *self.tests]
        for path in map(tree.joinpath, self.tests):
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            parts += [file.read_text("utf-8") for file in files]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def rooms() -> list[str]:
    """The rooms that have mutations."""
    return sorted(path.stem for path in _ROOMS.glob("*.toml"))


def mutations(room: str) -> Iterator[Mutation]:
    """The mutations of a room."""
    tables = tomllib.loads((_ROOMS / f"{room}.toml").read_text("utf-8"))
    default = tables.pop("tests")
    for name, table in tables.items():
        tests = tuple(table.pop("tests", default))
        yield Mutation(room=room, name=name, tests=tests, **table)
