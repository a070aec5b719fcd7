"""Where a pruned model will be loaded: what a target asks of a plan, and who writes its files.

Each target is one file in ``sosp_hub/targets``, with its own options.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

    def counts(self, group: Any, others: Sequence[Any] = ()) -> Collection[int] | None:
        """How many structures of a group may be kept, besides all of them; None = any number.

        Args:
            group: A ``sosp_hub.structure.groups.Group``.
            others: All groups that may be cut, this one too: several may cut one axis.
        """
        del group, others
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


def rows_in_steps(group: Any, step: int, others: Sequence[Any] = ()) -> list[int]:
    """The counts that leave every matrix which reads the group with rows of whole steps.

    Where several groups cut one axis, such as KV heads and the query heads of each, the first gets
    its counts as if the next stayed whole, and the next those that fit all counts of the first.

    Args:
        group: Whose counts these are.
        step: Values of a row that belong together.
        others: All groups that may be cut.
    """
    ahead = list(itertools.takewhile(lambda other: other is not group, others))
    readers = []
    for member in group.members:
        if member.reads:
            same = [other for other in ahead if _reads(other, member.tensor, member.dim)]
            least = [math.gcd(other.size, *rows_in_steps(other, step, others)) for other in same]
            whole = group.size * math.prod(other.size for other in same)
            own = int((member.index >= 0).sum())
            readers.append((len(member.index) - own, own * math.prod(least), whole))

    def fits(count: int) -> bool:
        return all(
            not own * count % whole and not (rest + own * count // whole) % step
            for rest, own, whole in readers
        )

    return [count for count in range(1, group.size) if fits(count)]


def _reads(group: Any, tensor: str, dim: int) -> bool:
    return any(each.reads and (each.tensor, each.dim) == (tensor, dim) for each in group.members)


TARGETS = Registry("sosp_hub.targets", Target, noun="target")


def make_target(name: Any, error: Callable[[str], Exception], /, **options: Any) -> Target:
    """The target with these options; raises what ``error`` makes of a message."""
    model = TARGETS.require(name.replace("-", "_") if isinstance(name, str) else name, error)
    try:
        return model(**options)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        known = sorted(set(model.model_fields) - {"name"})
        key = ".".join(map(str, first["loc"]))
        wrong = (
            f"no option {key!r}{_meant(key, known)}"
            if first["type"] == "extra_forbidden"
            else f"{key}: {first['msg']}, got {first['input']!r}"
        )
        raise error(
            f"target {name!r}: {wrong}; its options are {', '.join(known) or 'none'}"
        ) from None


def _meant(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def as_targets(given: Any, error: Callable[[str], Exception]) -> tuple[Target, ...]:
    """Targets by name, as sections of a recipe (``{"name": "gguf", ...}``), or as they are."""

    def made(each: Any) -> Target:
        if isinstance(each, Mapping):
            options = dict(each)
            return make_target(options.pop("name", None), error, **options)
        return each if isinstance(each, Target) else make_target(each, error)

    given = () if given is None else given
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping | Target)
    return tuple(made(each) for each in (given if several else [given]))


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
