"""The pruning plan: which structures of which group are kept. The waist of the package."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sosp_hub.errors import PlanError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """Kept indices per group.

    Attributes:
        kept: Sorted kept indices of each group that is cut; a group that is not listed is kept
            whole.
        sizes: Size of each listed group in the model that the plan was made for.
        base_model: Hub id of the model the plan was made for, if it has one.
        base_revision: Commit of that model.
        provenance: Where the plan comes from (criterion, budget, calibration): JSON data, never
            needed to apply it.

    Raises:
        PlanError: Indices that are unsorted, repeated or out of range, or a group that is left
            empty.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    base_model: str | None = None
    base_revision: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", {name: tuple(kept) for name, kept in self.kept.items()})
        object.__setattr__(self, "sizes", dict(self.sizes))
        if self.kept.keys() != self.sizes.keys():
            odd = sorted(self.kept.keys() ^ self.sizes.keys())
            raise PlanError(
                f"plan: `kept` and `sizes` must list the same groups; they differ in {odd}"
            )
        for name, kept in self.kept.items():
            _check_indices(name, kept, self.sizes[name])

    def num_kept(self) -> dict[str, int]:
        """Number of kept structures of each listed group."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def compose(self, second: "PruningPlan") -> "PruningPlan":
        """The one plan that equals applying this plan and then ``second`` to its result."""
        for name, kept in self.kept.items():
            if name in second.sizes and second.sizes[name] != len(kept):
                raise PlanError(
                    f"plan: group {name!r} has {len(kept)} structures after the first plan, "
                    f"but the second plan was made for {second.sizes[name]}"
                )
        kept = dict(self.kept)
        sizes = {**second.sizes, **self.sizes}
        for name, indices in second.kept.items():
            first = self.kept.get(name)
            kept[name] = indices if first is None else tuple(first[i] for i in indices)
        provenance = {"steps": [dict(self.provenance), dict(second.provenance)]}
        return PruningPlan(kept, sizes, self.base_model, self.base_revision, provenance)

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` gives the same plan back."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "sizes": self.sizes,
            "kept": {name: list(kept) for name, kept in self.kept.items()},
            "provenance": dict(self.provenance),
        }
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Reads what ``to_json`` wrote.

        Raises:
            PlanError: Text that is no plan, or a plan of another schema version.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"plan: not JSON ({error})") from error
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            given = (
                record.get("schema_version") if isinstance(record, dict) else type(record).__name__
            )
            raise PlanError(f"plan: schema_version is {given!r}, expected {SCHEMA_VERSION}")
        try:
            return cls(
                kept={str(name): tuple(kept) for name, kept in record["kept"].items()},
                sizes={str(name): size for name, size in record["sizes"].items()},
                base_model=record.get("base_model"),
                base_revision=record.get("base_revision"),
                provenance=record.get("provenance", {}),
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise PlanError(
                f"plan: `kept` and `sizes` must map group names to indices and sizes ({error})"
            ) from error


def _check_indices(name: str, kept: Sequence[int], size: int) -> None:
    if not all(type(i) is int for i in (*kept, size)):
        raise PlanError(
            f"plan: group {name!r} must list whole numbers, got {list(kept)[:8]} of {size!r}"
        )
    if not kept:
        raise PlanError(
            f"plan: group {name!r} would lose all its {size} structures; keep at least one"
        )
    if list(kept) != sorted(set(kept)):
        raise PlanError(
            f"plan: kept indices of group {name!r} must be sorted and distinct: "
            f"got {list(kept)[:8]}..."
        )
    if kept[0] < 0 or kept[-1] >= size:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(
            f"plan: group {name!r} has {size} structures; kept index {wrong} is out of range"
        )
