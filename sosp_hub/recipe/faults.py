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
    for keys, kind, given, context in _faults(error, data):
        section, registry = _section(root, keys[:-1], data)
        if kind == "too_short" and given:
            continue  # its items are at fault and reported themselves
        if kind == "unknown_name":
            _, registry = _section(root, keys, data)
            keys.append("name")
            given = given["name"]
        where = ".".join(keys)
        if kind == "extra_forbidden":
            yield f"{where}: {_unknown(keys[-1], section, registry, root)}"
        elif kind == "invalid_key":
            yield f"{where}: unknown key; {_nearest(keys[-1], list(section.model_fields))}"
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
            yield f"{where}: got {_yaml(given)}; {_nearest(str(given), names, registry.noun)}"
        elif kind == "literal_error":
            choices = [choice.strip("'") for choice in re.split(r", | or ", context["expected"])]
            choices += ["null"] * _takes_null(section, keys[-1])
            yield f"{where}: got {given!r}; {_nearest(str(given), choices, 'value')}"
        else:
            hint = _hint(where, kind, given) or _form(root, keys, kind, given)
            yield f"{where}: got {_yaml(given)}; expected {_expected(kind, context)}{hint}"


_Fault = tuple[list[str], str, Any, dict[str, Any]]
"""Keys above and of a value, pydantic's name of the fault, the value, and what it says of it."""

_FORM = re.compile(r"constrained-\w+|(dict|list|literal|nullable|tuple)\[.*\]|bool|float|int|str")
"""What pydantic puts into the path of a value that may have several forms, for each of them."""


def _faults(error: ValidationError, data: Any) -> Iterator[_Fault]:
    """Of a value that may have several forms, the faults of its own, or one that names all."""
    of_forms: dict[tuple[str, ...], list[tuple[bool, _Fault]]] = {}
    for fault in error.errors():
        keys: list[str] = []
        form, value, above = None, None, ()
        at: Any = data
        for key in fault["loc"]:
            if (isinstance(at, dict) and key in at) or (
                isinstance(at, list) and isinstance(key, int)
            ):
                keys.append(str(key))
                at = at[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
            elif _FORM.fullmatch(str(key)):
                form, value, above = str(key), at, tuple(keys)
            else:
                keys.append(str(key))
                at = None
        found = keys, fault["type"], fault["input"], fault.get("ctx", {})
        if form is None:
            yield found
        else:
            value = value if len(keys) > len(above) else fault["input"]
            of_forms.setdefault(above, []).append((_of_form(value, form), found))
    for above, faults in of_forms.items():
        own = [found for fits, found in faults if fits]
        inside = any(len(keys) > len(above) for keys, *_ in own)
        if len(own) == 1 or inside:
            yield from own
        elif not any(other[: len(above)] == above for other in of_forms.keys() - {above}):
            forms = own or [found for _, found in faults]
            expected = dict.fromkeys(_expected(kind, context) for _, kind, _, context in forms)
            yield [*above], "one_of", forms[0][2], {"expected": _either([*expected])}


def _of_form(value: Any, form: str) -> bool:
    """Whether a value has the form that a label of pydantic stands for."""
    given = "dict" if isinstance(value, dict) else "list" if isinstance(value, list) else ""
    return given == {"dict": "dict", "list": "list", "tuple": "list"}.get(
        form.partition("[")[0], ""
    )


def _either(forms: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(forms[:-1]), forms[-1])))


def _yaml(value: Any) -> str:
    """A value as the file spells it."""
    return (
        str(value).lower().replace("none", "null")
        if value is None or value is True or value is False
        else repr(value)
    )


def _section(
    root: type[Section], keys: Sequence[str], data: Any = None
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


def _unknown(
    key: str, section: type[Section], registry: Registry[Any] | None, root: type[Section]
) -> str:
    known = registry.known().items() if registry else ()
    if owners := [name for name, model in known if key in model.model_fields]:
        name = section.model_fields["name"].default
        return f"an option of {', '.join(owners)}, which {name} does not have; leave it out"
    elsewhere = [
        f"{name}.{key}"
        for name in root.model_fields
        if (model := _section(root, [name])[0]) is not root and key in model.model_fields
    ]
    if elsewhere and not difflib.get_close_matches(key, section.model_fields, cutoff=0.8):
        return f"unknown key here; write {' or '.join(elsewhere)}"
    return f"unknown key; {_nearest(key, list(section.model_fields))}"


_OTHER_NAMES = {"flops": "macs", "lr": "learning_rate"}
"""What others call a key."""


def _nearest(given: str, known: Sequence[str], noun: str = "key") -> str:
    near = [name for name in (_OTHER_NAMES.get(given.lower()),) if name in known]
    near = near or difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.5)
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
    "greater_than": "more than {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "int_type": "a whole number",
    "less_than": "less than {lt:.10g}",
    "list_type": "a list such as [a, b]",
    "less_than_equal": "at most {le:.10g}",
    "model_attributes_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "one_of": "{expected}",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_short": "at least one entry",
    "tuple_type": "a list such as [a, b]",
}


def _expected(kind: str, context: dict[str, Any]) -> str:
    if kind == "literal_error":
        return context["expected"].replace("'", "")
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
    off = given is None or given is False
    if where == "finetune" and off:
        return "; for no fine-tuning write finetune: {epochs: 0}"
    if where == "rebuild" and off:
        return "; for no rebuild write rebuild: {method: null}"
    if kind == "model_type" and given is None:
        return "; leave the section out for its defaults"
    if kind in {"int_type", "float_type"} and isinstance(given, str):
        return "; write the number without quotes" if re.fullmatch(r"[-+0-9.eE]+", given) else ""
    if kind == "int_type" and isinstance(given, float) and given == int(given):
        return f"; write {int(given)}"
    if kind == "string_type" and given is not None and not isinstance(given, (dict, list)):
        return f"; write '{given}' in quotes"
    return ""


_MAIN_KEYS = {
    "model": "id", "data": "path", "calibration": "path", "others": "path", "criterion": "name",
    "budget": "macs", "finetune": "epochs", "train": "epochs", "teacher": "id", "lora": "rank",
    "blocks": "most", "schedule": "rounds", "output": "dir", "push": "repo_id",
}  # fmt: skip
"""The key that is meant where a section is written as a single value."""


def _form(root: type[Section], keys: Sequence[str], kind: str, given: Any) -> str:
    """How to write a value as a section or a list."""
    section, _ = _section(root, keys[:-1])
    named = next((key for key in reversed(keys) if not key.isdecimal()), "")
    plain = isinstance(given, str | int | float) and not isinstance(given, bool)
    field = section.model_fields.get(keys[-1]) if keys else None
    if kind == "tuple_type" and isinstance(given, str):
        entry = next((each for each in typing.get_args(field and field.annotation)), None)
        of_sections = isinstance(entry, type) and issubclass(entry, BaseModel)
        return (
            f"; write [{{{_MAIN_KEYS[named]}: {given}}}]" if of_sections else f"; write [{given}]"
        )
    if kind != "model_type":
        return ""
    if plain and named in _MAIN_KEYS:
        example = f"{{{_MAIN_KEYS[named]}: {given}}}"
        return f"; write {example}" if keys[-1].isdecimal() else f"; write {keys[-1]}: {example}"
    inner, _ = _section(root, keys)
    if given is True and not any(each.is_required() for each in inner.model_fields.values()):
        return f"; write {keys[-1]}: {{}} for its defaults"
    if given is False and _takes_null(section, keys[-1]):
        return f"; write {keys[-1]}: null"
    return f": {', '.join(inner.model_fields)}"
