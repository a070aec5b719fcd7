"""Where a pruned model will be loaded: what a target asks of a plan, and who writes its files.

Each target is one file in ``sosp_hub/targets``, with its own options.
"""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from sosp_hub.recipe.declared import Declared, Registry


class Target(Declared):
    """What reads a pruned model, and what it asks of one.

    Attributes:
        reads: Who reads the files.
        uniform: Whether all layers need the same sizes.
        suffix: Of the file that is written; empty = a folder.
    """

    reads: ClassVar[str]
    uniform: ClassVar[bool] = False
    suffix: ClassVar[str] = ""

    def counts(self, group: Any) -> Collection[int] | None:
        """How many structures of a group may be kept, besides all of them; None = any number.

        Args:
            group: A ``sosp_hub.structure.groups.Group``.
        """
        del group
        return None

    def check(self, model: Any) -> None:
        """Refuses a model that no plan makes one of this target's; looks at no weight.

        Raises:
            ModelError: A model that this target has no form for.
            CheckpointError: A setting that it has none for.
        """
        del model

    def write(self, model: Any, path: Path, tokenizer: Any = None) -> Path:
        """Writes a pruned model for the reader.

        Args:
            model: The model.
            path: A file or folder that is not there yet.
            tokenizer: Goes into the files, where they hold one.

        Raises:
            ModelError: A model that this target has no form for.
            CheckpointError: A layer that it has none for, or a package that is missing.
        """
        raise NotImplementedError


class StepTarget(Target):
    """A target that can be written as one step of generation."""

    cache: bool = Field(
        default=False, description="a step of generation: keys and values go in and come out again"
    )


def multiples(group: Any, step: int) -> list[int]:
    """The counts below a group's size that are multiples of a step."""
    return list(range(step, group.size, step))


def rows_in_steps(group: Any, step: int) -> list[int]:
    """The counts that leave every matrix which reads the group with rows of whole steps."""
    counts = []
    readers = [member for member in group.members if member.reads]
    for count in range(1, group.size):
        rows = (
            len(member.index) - int((member.index >= 0).sum()) * (group.size - count) // group.size
            for member in readers
        )
        if all(row % step == 0 for row in rows):
            counts.append(count)
    return counts


TARGETS = Registry("sosp_hub.targets", Target, noun="target")


def make_target(name: str, error: Callable[[str], Exception], **options: Any) -> Target:
    """The target with these options; raises what ``error`` makes of a message."""
    model = TARGETS.require(name.replace("-", "_"), error)
    try:
        return model(**options)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        known = sorted(set(model.model_fields) - {"name"})
        raise error(
            f"target {name!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}, got "
            f"{first['input']!r}; its options are {', '.join(known) or 'none'}"
        ) from None


def as_targets(
    given: "str | Target | Iterable[str | Target] | None", error: Callable[[str], Exception]
) -> tuple[Target, ...]:
    """Targets that are given by name or as they are."""
    given = [given] if isinstance(given, str | Target) else list(given or ())
    return tuple(
        each if isinstance(each, Target) else make_target(str(each), error) for each in given
    )


def _listed(given: Any) -> Any:
    """One target or several, by name or with options, as sections."""
    given = () if given is None else given
    given = [given] if isinstance(given, str | dict | Target) else given
    if not isinstance(given, list | tuple):
        return given
    return tuple({"name": one.replace("-", "_")} if isinstance(one, str) else one for one in given)


Targets = Annotated[
    tuple[Annotated[SerializeAsAny[Target], TARGETS], ...], BeforeValidator(_listed)
]
"""The type of ``budget.target``: a name, a section, or a list of these."""
