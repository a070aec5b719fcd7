"""The schema as text: what ``--help`` prints, made from the fields themselves."""

import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.declared import Declared, Registry
from sosp_hub.recipe.schema import FinetuneSection, Recipe
from sosp_hub.recipe.section import Section
from sosp_hub.recipe.tasks import tasks
from sosp_hub.recipe.training import DenseTrainSection, TrainSection

_NAMES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    type(None): "null",
}
_WIDTH = 110


def list_sections() -> str:
    """Each section and top key of a recipe, in a line."""
    return "\n".join(
        f"  {name:<12}{_summary(field)}" for name, field in Recipe.model_fields.items()
    )


def describe_recipe(section: str | None = None) -> str:
    """Every key with what it takes, its default and its meaning.

    Args:
        section: Name of a section or top key; None = all of them.
    """
    names = list(Recipe.model_fields) if section is None else [section]
    return "\n\n".join("\n".join(block) for name in names for block in _blocks(name))


def _summary(field: FieldInfo) -> str:
    section = Registry.of(field)
    kind = section.base if section else _section(field.annotation)
    text = (kind.__doc__ or "").partition("\n")[0].rstrip(".") if kind else field.description
    return (text or "").replace("``", "")


def _blocks(name: str) -> Iterator[list[str]]:
    field = Recipe.model_fields[name]
    if registry := Registry.of(field):
        unnamed = _of_tasks() if registry is CRITERIA else []
        yield [f"{name}:", *unnamed, *_rows(registry.base, skip=Declared)]
        for declared in registry.known().values():
            summary = f"   ({declared.summary()})".replace("``", "")
            rows = _rows(declared, skip=registry.base)
            yield [f"  name: {declared.key()}{summary}", *rows]
            for key, own in declared.model_fields.items():
                if key not in registry.base.model_fields and (inner := _section(own.annotation)):
                    yield [f"    {key}:   (and all keys of model.train)", *_rows(inner)]
    elif section := _section(field.annotation):
        skip = TrainSection if section is FinetuneSection else None
        note = f"   ({field.description}; default: null)" if field.description else ""
        note = "   (and all keys of model.train)" if skip else note
        yield [f"{name}:{note}", *_rows(section, skip)]
        if name == "model":
            yield [
                "  train:   (the same keys, and more, under finetune)",
                *_rows(DenseTrainSection),
            ]
        if section is FinetuneSection:
            for key in ("lora", "teacher"):
                if inner := _section(section.model_fields[key].annotation):
                    yield [f"  {key}:", *_rows(inner)]
    else:
        yield [_row(name, field, indent="")]


def _of_tasks() -> list[str]:
    """What scores where a recipe names no criterion."""
    own = {task: kind.criterion for task, kind in tasks().items() if kind.criterion}
    lines = [
        f"    {task}: {{{', '.join(f'{key}: {value}' for key, value in section.items())}}}"
        for task, section in own.items()
    ]
    return ["  where no name is given:", *lines, f"    all other tasks: {CRITERIA.default}", ""]


def _rows(section: type[Section], skip: type[Section] | None = None) -> list[str]:
    left_out = set(skip.model_fields) if skip else set()
    return [
        _row(name, field) for name, field in section.model_fields.items() if name not in left_out
    ]


def _row(name: str, field: FieldInfo, indent: str = "    ") -> str:
    if field.is_required():
        default = "required"
    else:
        default = f"default: {_yaml(field.get_default(call_default_factory=True))}"
    head = f"{indent}{name:<21} "
    head = head if len(name) < 22 else f"{indent}{name}  "
    text = f"{field.description} ({_type(field)}; {default})"
    return textwrap.fill(
        text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(field: FieldInfo) -> str:
    if registry := Registry.of(field):
        return f"of {', '.join(registry.known())}"
    spelled = _spell(field.annotation)
    bounds = [
        f"{symbol} {getattr(bound, key):g}"
        for bound in _metadata(field)
        for key, symbol in _BOUNDS.items()
        if hasattr(bound, key)
    ]
    return " ".join([spelled.removesuffix(" | null"), *bounds]) + (
        " | null" if spelled.endswith(" | null") else ""
    )


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Bounds of a field, also those inside ``X | None``."""
    yield from field.metadata
    for part in typing.get_args(field.annotation):
        if typing.get_origin(part) is typing.Annotated:
            for info in part.__metadata__:
                yield from getattr(info, "metadata", ())


def _spell(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _spell(args[0])
    if origin is typing.Literal:
        return " | ".join(args)
    if origin is tuple:
        return f"list of {_spell(args[0])}"
    if origin is dict:
        plain = args[1] is not Any
        return "keys with plain values" if plain else "sections"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_spell(arg) for arg in args)
    return "keys as below" if _section(annotation) else _NAMES[annotation]


def _section(annotation: Any) -> type[Section] | None:
    parts = typing.get_args(annotation) or (annotation,)
    return next(
        (part for part in parts if isinstance(part, type) and issubclass(part, Section)), None
    )
