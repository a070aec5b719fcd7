"""The cells of a comparison: one recipe for each criterion, budget and seed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sosp_hub.recipe.criteria import CRITERIA, Criterion, MaskTrainedCriterion
from sosp_hub.recipe.faults import explain
from sosp_hub.recipe.schema import BUDGETS, Recipe


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        criterion: Its name and what was set for it, such as ``sosp_i surgeon compensate``.
        budget: What is kept, such as ``macs 0.5``.
        seed: Of everything random.
        recipe: What ``prune`` would run for it.
    """

    criterion: str
    budget: str
    seed: int
    recipe: Recipe


def cells_of(recipe: Recipe) -> tuple[list[Cell], list[str]]:
    """The cells of ``recipe.compare`` in the order criterion, budget, seed; and every fault.

    No cells where there is a fault, or no such section.
    """
    section = recipe.compare
    if section is None:
        return [], []
    base = recipe.model_dump(mode="json", exclude={"compare", "push"}, exclude_unset=True)
    faults = ["push: a comparison publishes nothing; leave it out"] if recipe.push else []
    shared = {key: base.get("criterion", {}).get(key) for key in Criterion.model_fields}
    protocol = {key: value for key, value in shared.items() if value is not None}
    rest = {k: v for k, v in base.get("budget", {}).items() if k not in BUDGETS}
    criteria, budgets = [], []
    for number, entry in enumerate(section.criteria):
        own = {key: value for key, value in entry.items() if key != "kinds"}
        changes: dict[str, Any] = {"criterion": {**protocol, **own}}
        if "kinds" in entry:
            changes["structure"] = {**base.get("structure", {}), "kinds": entry["kinds"]}
        made, own_faults = _recipe({**base, **changes}, f"compare.criteria.{number}")
        faults += own_faults
        if made is not None and isinstance(made.criterion, MaskTrainedCriterion):
            name, untrained = made.criterion.name, made.criterion.untrained
            faults.append(
                f"compare.criteria.{number}: {name} trains the model, which is then another than "
                f"the one that the other criteria score; write {untrained}, or run {name} with "
                "python -m sosp_hub.prune"
            )
        elif made is not None:
            criteria.append((_criterion_label(entry), entry, made, changes))
    for number, entry in enumerate(section.budgets or [base.get("budget", {})]):
        any_criterion = {"criterion": {"name": "random"}, "budget": {**rest, **entry}}
        made, own_faults = _recipe({**base, **any_criterion}, f"compare.budgets.{number}")
        faults += own_faults
        if made is not None:  # whole, since a criterion may have another default
            whole = {"budget": made.budget.model_dump(mode="json")}
            budgets.append((_budget_label(made, entry), entry, made, whole))
    criteria, budgets = _told_apart(criteria), _told_apart(budgets)
    faults += _repeated("criteria", [(label, _scored(made)) for label, made, _ in criteria])
    faults += _repeated("budgets", [(label, made.budget) for label, made, _ in budgets])
    faults += _repeated("seeds", [(str(seed), seed) for seed in section.seeds])
    faults += _incomparable([m for _, m, _ in criteria], [m for _, m, _ in budgets])
    if faults:
        return [], faults
    return [
        Cell(
            criterion=criterion,
            budget=budget,
            seed=seed,
            recipe=Recipe.model_validate({**base, **scoring, **cut, "seed": seed}),
        )
        for criterion, _, scoring in criteria
        for budget, _, cut in budgets
        for seed in section.seeds
    ], []


def _recipe(data: Mapping[str, Any], where: str) -> tuple[Recipe | None, list[str]]:
    """The recipe, or its faults by the keys of the comparison."""
    try:
        return Recipe.model_validate(data), []
    except ValidationError as error:
        return None, [_rephrased(fault, where) for fault in explain(error, Recipe, data)]


def _rephrased(fault: str, where: str) -> str:
    section = "criterion" if ".criteria." in where else "budget"
    fault = fault.replace("structure.kinds", "kinds")
    if fault.startswith(f"{section}.") or fault.startswith(f"{section}:"):
        return where + fault.removeprefix(section)
    return f"{where}.{fault}" if fault.startswith("kinds") else f"{where}: {fault}"


def _told_apart(
    entries: Sequence[tuple[str, Mapping[str, Any], Recipe, Any]],
) -> list[tuple[str, Recipe, Any]]:
    """Labels, recipes and changes: a label that two have gives way to all that was written."""
    labels = [label for label, *_ in entries]
    return [
        (label if labels.count(label) == 1 else _in_full(entry), made, changes)
        for label, entry, made, changes in entries
    ]


def _in_full(entry: Mapping[str, Any]) -> str:
    name = [str(entry["name"])] if "name" in entry else []
    return " ".join([*name, *(f"{k}={json.dumps(v)}" for k, v in entry.items() if k != "name")])


def _criterion_label(entry: Mapping[str, Any]) -> str:
    """Name and options: words as they are, switches by their names, numbers with both."""
    return " ".join([str(entry.get("name", CRITERIA.default)), *_words(entry, but=("name",))])


def _budget_label(recipe: Recipe, entry: Mapping[str, Any]) -> str:
    targets = recipe.budget.targets()
    return " ".join(
        [*(f"{key} {share:g}" for key, share in targets.items()), *_words(entry, but=BUDGETS)]
    )


def _words(entry: Mapping[str, Any], but: Sequence[str]) -> Iterator[str]:
    for key, value in entry.items():
        if key in but or value is None:
            continue
        if isinstance(value, bool):
            yield key if value else f"{key}=false"
        elif key == "per":
            yield f"per {value}"
        elif isinstance(value, list | tuple):
            yield "+".join(map(str, value))
        else:
            yield value if isinstance(value, str) else f"{key}={value:g}"


def _scored(recipe: Recipe) -> tuple[Any, ...]:
    """What tells two criteria apart: what is set, and what follows from leaving it out."""
    criterion = recipe.criterion
    compensates = {"compensate": criterion.compensates()}
    return criterion.model_copy(update=compensates), recipe.structure.kinds


def _repeated(key: str, entries: Sequence[tuple[str, Any]]) -> Iterator[str]:
    for number, (label, value) in enumerate(entries):
        first = next(i for i, (_, other) in enumerate(entries) if other == value)
        if first < number:
            yield (
                f"compare.{key}.{number}: {label} is the same as {key}.{first}; "
                "a cell is run once, leave one of them out"
            )


def _incomparable(criteria: Sequence[Recipe], budgets: Sequence[Recipe]) -> Iterator[str]:
    """Criteria of depth and of width cannot share a budget that counts structures alone."""
    deep = [recipe.criterion.name for recipe in criteria if "layer" in recipe.structure.kinds]
    if not deep or len(deep) == len(criteria):
        return
    for number, recipe in enumerate(budgets):
        if set(recipe.budget.targets()) == {"structures"}:
            yield (
                f"compare.budgets.{number}: a share of structures is of layers for {deep[0]} and "
                "of channels, heads or neurons for the others; write macs, params, memory_bytes "
                "or latency_s, or compare criteria of depth alone"
            )
