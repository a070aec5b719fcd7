"""From pydantic's faults to sentences that say what to write instead."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from sosp_hub.recipe.declared import Registry
from sosp_hub.recipe.section import Section


def explain(error: ValidationError, root: type[Section], data: Any = None) -> Iterator[str]:
    """One line for each fault: key path, what was given, what was expected, what to write.

    Args:
        error: What pydantic raised.
        root: The section that was read.
        data: What it was read from.
    """
    for fault in error.errors():
        keys = [str(key) for key in fault["loc"]]
        if _is_of_other_form(keys, fault["input"]):
            continue
        keys = [key for key in keys if not _FORM.fullmatch(key)]
        section, registry = _section(root, keys[:-1], data)
        kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
        if kind == "too_short" and given:
            continue  # its items are at fault and reported themselves
        if kind == "unknown_name":
            _, registry = _section(root, keys, data)
            keys.append("name")
            given = given["name"]
        where = ".".join(keys)
        if kind == "extra_forbidden":
            yield f"{where}: {_unknown(keys[-1], section, registry)}"
        elif kind == "missing":
            yield f"{where}: missing; {_meaning(section, keys[-1])}"
        elif kind == "string_pattern_mismatch":
            meaning = section.model_fields[keys[-1]].description
            yield f"{where}: got {given!r}; expected {meaning}"
        elif kind == "value_error":
            yield f"{where}: {context['error']}" if where else str(context["error"])
        elif kind == "unknown_name":
            assert registry is not None  # which has raised it
            names = list(registry.known())
            yield f"{where}: got {given!r}; {_nearest(str(given), names, registry.noun)}"
        elif kind == "literal_error":
            choices = [choice.strip("'") for choice in re.split(r", | or ", context["expected"])]
            choices += ["null"] * _takes_null(section, keys[-1])
            yield f"{where}: got {given!r}; {_nearest(str(given), choices, 'value')}"
        else:
            hint = _hint(where, kind, given)
            yield f"{where}: got {_yaml(given)}; expected {_expected(kind, context)}{hint}"


_FORM = re.compile(r"constrained-\w+|dict\[.*\]")
"""What pydantic puts into the path of a value that may be a number or an object of numbers."""


def _is_of_other_form(keys: Sequence[str], given: Any) -> bool:
    """Whether a fault is of the form that the value does not have."""
    if not keys or not _FORM.fullmatch(keys[-1]):
        return False
    return keys[-1].startswith("dict[") != isinstance(given, dict)


def _yaml(value: Any) -> str:
    """A value as the file spells it."""
    return (
        str(value).lower().replace("none", "null")
        if value is None or value is True or value is False
        else repr(value)
    )


def _section(
    root: type[Section], keys: Sequence[str], data: Any
) -> tuple[type[Section], Registry[Any] | None]:
    """The section that holds a key, by the names above it, and the registry that it is one of."""
    section, registry = root, None
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
        field = section.model_fields.get(key)
        if field is None:
            continue
        if (declared := Registry.of(field)) is not None:
            section, registry = declared.given(data) or declared.base, declared
        elif inner := next(_models(field.annotation), None):
            section, registry = inner, None
    return section, registry


def _takes_null(section: type[Section], key: str) -> bool:
    field = section.model_fields.get(key)
    return field is not None and type(None) in typing.get_args(field.annotation)


def _models(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield typing.cast("type[Section]", annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _models(part)


def _unknown(key: str, section: type[Section], registry: Registry[Any] | None) -> str:
    known = registry.known().items() if registry else ()
    if owners := [name for name, model in known if key in model.model_fields]:
        name = section.model_fields["name"].default
        return f"an option of {', '.join(owners)}, which {name} does not have; leave it out"
    return f"unknown key; {_nearest(key, list(section.model_fields))}"


def _nearest(given: str, known: Sequence[str], noun: str = "key") -> str:
    near = difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.5)
    guess = f"did you mean `{near[0]}`? K" if near else "k"
    return f"{guess}nown {noun}s: {', '.join(known)}".replace("criterions", "criteria")


def _meaning(section: type[Section], key: str) -> str:
    field = section.model_fields[key]
    choices = typing.get_args(field.annotation)
    if field.description is None:
        return "write the section"
    named = choices and all(isinstance(choice, str) for choice in choices)
    return field.description + (f"; one of {', '.join(choices)}" if named else "")


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys with values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "model_attributes_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_short": "at least one entry",
    "tuple_type": "a list such as [a, b]",
}


def _expected(kind: str, context: dict[str, Any]) -> str:
    return _EXPECTED.get(kind, f"another value ({kind.replace('_', ' ')})").format(**context)


def _hint(where: str, kind: str, given: Any) -> str:
    """What to write instead, where it can be told."""
    if where.startswith("budget.") and kind in {"less_than_equal", "float_type"}:
        number = re.fullmatch(r"\s*([0-9.]+)\s*%?\s*", str(given))
        share = float(number[1]) if number else 0.0
        share = share / 100 if share > 10 or "%" in str(given) else share
        example = f"{share:g}" if 0 < share <= 1 else "0.5"
        return f"; a budget is the fraction that is kept, write {example}"
    if where.startswith("budget.") and kind == "greater_than":
        return "; a budget is the fraction that is kept, write 0.5 for one half"
    if where == "finetune" and given is None:
        return "; for no fine-tuning write finetune: {epochs: 0}"
    if where == "rebuild" and given is None:
        return "; for no rebuild write rebuild: {method: null}"
    if kind == "model_type" and given is None:
        return "; leave the section out for its defaults"
    if kind in {"int_type", "float_type"} and isinstance(given, str):
        return "; write the number without quotes" if re.fullmatch(r"[-+0-9.eE]+", given) else ""
    if kind == "int_type" and isinstance(given, float) and given == int(given):
        return f"; write {int(given)}"
    if kind == "tuple_type" and isinstance(given, str):
        return f"; write [{given}]"
    if kind == "string_type" and given is not None and not isinstance(given, (dict, list)):
        return f"; write '{given}' in quotes"
    return ""
