"""The pruning plan: which structures of which group are kept. The waist of the package."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from sosp_hub.errors import PlanError, shortened
from sosp_hub.summary import Summarised, Summary, alike, span
from sosp_hub.untrusted import UnreadableError, parse_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PruningPlan(Summarised):
    """Kept indices per group.

    Attributes:
        kept: Sorted kept indices of each group that is cut; an unlisted group is kept whole.
        sizes: Size of each listed group in the model that the plan was made for.
        base_model: Hub id of the model the plan was made for, if it has one.
        base_revision: Commit of that model.
        provenance: Where the plan comes from (criterion, budget, calibration): JSON data, never
            needed to apply it.
        gates: For groups whose kept structures make up for the removed ones: a factor for each
            kept structure, folded into the weights that read it.
        shifts: For biases of layers that have read removed structures: what is added to each of
            their values, before any of them is cut.

    Raises:
        PlanError: Indices that are unsorted, repeated or out of range, a group that is left empty,
            gates that do not fit their group, or numbers that are not finite.

    Example:
        >>> plan = PruningPlan(kept={"0:neuron": (0, 3)}, sizes={"0:neuron": 4})
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
        >>> print(plan)
        plan: 2 of 4 structures kept in 1 groups; all other groups stay whole
        group     groups  size  kept  share
        0:neuron       1     4     2    50%
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    base_model: str | None = None
    base_revision: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    gates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shifts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kept", "gates", "shifts"):
            lists = {group: tuple(values) for group, values in getattr(self, name).items()}
            object.__setattr__(self, name, lists)
        object.__setattr__(self, "sizes", dict(self.sizes))
        if self.kept.keys() != self.sizes.keys():
            odd = sorted(self.kept.keys() ^ self.sizes.keys())
            raise PlanError(f"plan: `kept` and `sizes` must list the same groups, not {odd}")
        for name, kept in self.kept.items():
            _check_indices(name, kept, self.sizes[name])
        for name, gates in self.gates.items():
            _check_gates(name, gates, len(self.kept.get(name, ())))
        for name, values in self.shifts.items():
            _check_finite(f"the shift of {name!r}", values)

    def summary(self) -> Summary:
        """A row for the groups that are alike: how many structures they keep."""
        kept, sizes = self.num_kept(), self.sizes
        head = f"plan: {sum(kept.values()):,} of {sum(sizes.values()):,} structures kept in "
        head += f"{len(kept)} groups; all other groups stay whole"
        rows = [
            (
                pattern,
                len(names),
                span([sizes[name] for name in names]),
                span([kept[name] for name in names]),
                f"{sum(kept[name] for name in names) / sum(sizes[name] for name in names):.0%}",
            )
            for pattern, names in alike(kept).items()
        ]
        columns = ("group", "groups", "size", "kept", "share")
        return Summary((head,), columns, rows, (costs,) if (costs := self._costs()) else ())

    def _costs(self) -> str:
        """What it was predicted to cost, for an input of which size."""
        cost = self.provenance.get("predicted")
        if not isinstance(cost, Mapping) or not isinstance(cost.get("macs"), int):
            return ""
        size = f" for one input of {cost['of_one']}" if cost.get("of_one") else ""
        return (
            f"leaves {cost['macs']:,} multiply-accumulates{size}, {cost['params']:,} parameters, "
            f"{cost['bytes']:,} bytes"
        )

    def num_kept(self) -> dict[str, int]:
        """Number of kept structures of each listed group."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def compose(self, second: "PruningPlan") -> "PruningPlan":
        """The one plan that equals applying this plan and then ``second`` to its result.

        Raises:
            PlanError: The second plan does not fit the first one's result, shifts biases, or cuts
                inside layers that have other numbers since the first one.
        """
        if second.shifts:
            raise PlanError(
                f"plan: the second plan shifts {next(iter(second.shifts))!r}, of which the first "
                "may have left a part; apply one after the other"
            )
        for name, kept in self.kept.items():
            stack, _, kind = name.rpartition(":")
            if kind == "layer" and len(kept) < self.sizes[name]:
                inside = f"{stack}." if stack else ""
                moved = [each for each in second.kept if each != name and each.startswith(inside)]
                if moved:
                    raise PlanError(
                        f"plan: the first plan drops layers of {stack!r}, so the second plan's "
                        f"{moved[0]!r} is of another layer than before; apply one after the other"
                    )
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
        gates: dict[str, tuple[float, ...]] = {}
        for name in self.gates.keys() | second.gates.keys():
            one = self.gates.get(name, (1.0,) * len(self.kept.get(name, range(sizes[name]))))
            two = second.gates.get(name, (1.0,) * len(second.kept.get(name, one)))
            chosen = second.kept.get(name, range(len(one)))
            gates[name] = tuple(one[i] * factor for i, factor in zip(chosen, two, strict=True))
        provenance = {"steps": [dict(self.provenance), dict(second.provenance)]}
        return PruningPlan(
            kept, sizes, self.base_model, self.base_revision, provenance, gates, self.shifts
        )

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` gives the same plan back."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "sizes": self.sizes,
            "kept": {name: list(kept) for name, kept in self.kept.items()},
            "gates": {name: list(gates) for name, gates in self.gates.items()},
            "shifts": {name: list(values) for name, values in self.shifts.items()},
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
            record = parse_json(text)
        except UnreadableError as error:
            raise PlanError(f"plan: {error}") from error
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            given = (
                record.get("schema_version") if isinstance(record, dict) else type(record).__name__
            )
            given = shortened(repr(given))
            raise PlanError(f"plan: schema_version is {given}, expected {SCHEMA_VERSION}")
        for key in ("base_model", "base_revision"):
            if not isinstance(record.get(key), str | None):
                given = shortened(repr(record[key]))
                raise PlanError(f"plan: {key} is {given}, expected text or null")
        try:
            return cls(
                kept={str(name): tuple(kept) for name, kept in record["kept"].items()},
                sizes={str(name): size for name, size in record["sizes"].items()},
                base_model=record.get("base_model"),
                base_revision=record.get("base_revision"),
                provenance=dict(record.get("provenance", {})),
                gates=record.get("gates", {}),
                shifts=record.get("shifts", {}),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(
                "plan: `kept` and `sizes` must map group names to indices and sizes "
                f"({shortened(str(error))})"
            ) from error


@dataclass(frozen=True)
class GrowthPlan:
    """Copies per group: the opposite of a cut.

    Attributes:
        copies: How often each structure of a group is there in the wider model, itself included;
            an unlisted group keeps its width.

    Raises:
        PlanError: A structure without a copy, or a number of copies that is none.
    """

    copies: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        lists = {group: tuple(numbers) for group, numbers in self.copies.items()}
        object.__setattr__(self, "copies", lists)
        for name, numbers in lists.items():
            wrong = [number for number in numbers if type(number) is not int or number < 1]
            if wrong or not numbers:
                raise PlanError(
                    f"growth: group {name!r} must have at least one copy of each structure, "
                    f"got {wrong[0] if wrong else 'no structures'!r}; "
                    "only a PruningPlan takes structures away"
                )

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """For each structure of the wider group the one it is a copy of, in order."""
        return {
            name: tuple(i for i, number in enumerate(numbers) for _ in range(number))
            for name, numbers in self.copies.items()
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each listed group in the model that the plan was made for."""
        return {name: len(numbers) for name, numbers in self.copies.items()}

    def num_kept(self) -> dict[str, int]:
        """Number of structures of each listed group in the wider model."""
        return {name: sum(numbers) for name, numbers in self.copies.items()}


Plan = PruningPlan | GrowthPlan
"""Both say which old structure each new one is: ``kept``, ``sizes``, ``num_kept()``."""


def _check_indices(name: str, kept: Sequence[int], size: int) -> None:
    if not all(type(i) is int for i in (*kept, size)):
        raise PlanError(
            f"plan: group {name!r} must list whole numbers, got {list(kept)[:8]} of {size!r}"
        )
    if list(kept) != sorted(set(kept)):
        raise PlanError(
            f"plan: kept indices of group {name!r} must be sorted and distinct: "
            f"got {list(kept)[:8]}..."
        )
    if kept and (kept[0] < 0 or kept[-1] >= size):
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(
            f"plan: group {name!r} has {size} structures; kept index {wrong} is out of range"
        )


def _check_gates(name: str, gates: Sequence[float], num_kept: int) -> None:
    if len(gates) != num_kept:
        raise PlanError(
            f"plan: group {name!r} keeps {num_kept} structures but has {len(gates)} gates"
        )
    _check_finite(f"gates of group {name!r}", gates)


def _check_finite(name: str, numbers: Sequence[float]) -> None:
    wrong = [n for n in numbers if not isinstance(n, int | float) or not isfinite(n)]
    if wrong:
        raise PlanError(f"plan: {name} must be finite numbers, got {wrong[0]!r}")
