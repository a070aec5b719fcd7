"""The one description of the delta's JSON: what readers accept, and the schema that is published.

``python -m sosp_hub.checkpoint.format.schema`` writes ``delta.schema.json`` again.
"""

# pyright: reportInvalidTypeForm=false
# Types are made by functions, which a type checker cannot follow.

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from sosp_hub.checkpoint.format.record import (
    KEY,
    LARGEST_GROWTH,
    SCHEMA_VERSION,
    Builder,
    Delta,
)
from sosp_hub.errors import CheckpointError

PUBLISHED = Path(__file__).with_name("delta.schema.json")
LARGEST_SIZE = 2**31 - 1
MOST_ENTRIES = 200_000
_LONGEST_NAME = 512
_LONGEST_VERSION = 64
_MOST_NUMBERS = 4096
_MOST_DIMENSIONS = 8
_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_-]*"  # torchvision's RegNet has a "block1-0"
_PATH = re.compile(rf"(?!__)(?!.*\.__){_PART}(\.{_PART})*")
_HASH = re.compile(r"[0-9a-f]{64}")
_CLASS = re.compile(r"[^\W0-9]\w*")


def parse_delta(record: object, path: str = KEY) -> Delta:
    """Reads a delta from JSON data and refuses everything that the format does not name.

    Args:
        record: The value of the key ``sosp_hub``.
        path: Its place in the file, for messages.

    Raises:
        CheckpointError: Names the JSON path of the first fault.
    """
    record = _migrate(record, path)
    try:
        DeltaRecord.model_validate(record)
    except ValidationError as error:
        raise CheckpointError(_words(error, path)) from None
    delta = Delta.from_json(record)
    num = delta.base.num_entries + (delta.head.num_entries if delta.head else 0)
    if num > MOST_ENTRIES:
        raise CheckpointError(f"{path}: {num} entries, at most {MOST_ENTRIES} are read")
    return delta


def published_schema() -> str:
    """The JSON schema of a delta, as text."""
    schema = DeltaRecord.model_json_schema(by_alias=True)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"sosp_hub/delta/{SCHEMA_VERSION}",
    }
    return json.dumps(head | _plain(schema), indent=2) + "\n"


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From the schema version to a function that rewrites a record of it for the next version."""


def _migrate(record: object, path: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise CheckpointError(f"{path}: {_short(record)}, expected a JSON object")
    record = dict(record)
    version = record.get("schema_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path}.schema_version: {_short(version)}, expected a whole number "
            f"from 1 to {SCHEMA_VERSION}"
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}.schema_version: {_short(version)}, this sosp_hub reads up to "
            f"{SCHEMA_VERSION}; upgrade it: pip install -U sosp_hub"
        )
    while version < SCHEMA_VERSION:
        record = _MIGRATIONS[version](record)
        version += 1
    return record


# ------------------------------------------------------------------------------------------ values


def _refusal(words: str) -> PydanticCustomError:
    return PydanticCustomError("delta", "{words}", {"words": words})


_SIZE_SCHEMA = {"type": "integer", "minimum": 0, "maximum": LARGEST_SIZE}
_NUMBERS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": _MOST_NUMBERS,
    "items": _SIZE_SCHEMA,
}
_NUMBER_SCHEMA = {
    "anyOf": [_SIZE_SCHEMA, {"type": "number", "not": {"type": "integer"}}, _NUMBERS_SCHEMA]
}


def _check_size(value: object, least: int = 0, most: int = LARGEST_SIZE) -> object:
    if type(value) is not int:
        raise _refusal("expected a whole number")
    if not least <= value <= most:
        raise _refusal(f"expected {least} to {most}")
    return value


def _check_numbers(value: object) -> object:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_NUMBERS:
        raise _refusal(f"expected a list of 1 to {_MOST_NUMBERS} whole numbers")
    return [_check_size(each) for each in value]


def _check_number(value: object) -> object:
    if isinstance(value, list):
        return _check_numbers(value)
    if type(value) is float:
        if not math.isfinite(value):
            raise _refusal("expected a finite number")
        return value
    return _check_size(value)


def _text(
    words: str, longest: int, pattern: re.Pattern[str] | None = None, *, empty: bool = False
) -> Any:
    def check(value: object) -> object:
        if empty and value == "":
            return value
        if not isinstance(value, str) or len(value) > longest:
            raise _refusal(f"expected {words}")
        if pattern is not None and not pattern.fullmatch(value):
            raise _refusal(f"expected {words}")
        return value

    schema: dict[str, Any] = {"type": "string", "maxLength": longest}
    if pattern is not None:
        schema["pattern"] = f"^{pattern.pattern}$"
    if empty:
        schema = {"anyOf": [{"const": ""}, schema]}
    return Annotated[Any, PlainValidator(check), WithJsonSchema(schema)]


def _list_of(item: Any, words: str, least: int, most: int, *, distinct: bool = False) -> Any:
    def check(value: object) -> object:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _refusal(f"expected a list of {words}")
        names = [each for each in value if isinstance(each, str)]
        if distinct and len(set(names)) != len(names):
            raise _refusal("names a module twice")
        return value

    limits: dict[str, Any] = {"minItems": least} if least else {}
    limits |= {"maxItems": most} | ({"uniqueItems": True} if distinct else {})
    return Annotated[list[item], BeforeValidator(check), Field(json_schema_extra=limits)]


def _by_name(key: Any, item: Any) -> Any:
    """An object whose keys are names."""
    return Annotated[dict[key, item], _Keys(TypeAdapter(key).json_schema())]


class _Keys:
    """Says in the JSON schema what the keys of an object are."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        made = handler(core)
        patterns = made.get("patternProperties", {})
        items = made.get("additionalProperties") or next(iter(patterns.values()), {})
        return {"type": "object", "propertyNames": self._schema, "additionalProperties": items}


Size = Annotated[Any, PlainValidator(_check_size), WithJsonSchema(_SIZE_SCHEMA)]
Number = Annotated[Any, PlainValidator(_check_number), WithJsonSchema(_NUMBER_SCHEMA)]
Numbers = Annotated[Any, PlainValidator(_check_numbers), WithJsonSchema(_NUMBERS_SCHEMA)]
Growth = Annotated[
    Any,
    PlainValidator(lambda value: _check_size(value, 1, LARGEST_GROWTH)),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": LARGEST_GROWTH}),
]
ModulePath = _text("a name such as 'layers.0.mlp'", _LONGEST_NAME, _PATH)
ModuleOrRoot = _text("a name such as 'layers.0.mlp'", _LONGEST_NAME, _PATH, empty=True)
AttributeName = _text("the name of a plain attribute", _LONGEST_NAME, _NAME)
ClassName = _text("the name of a class", _LONGEST_NAME, _CLASS)
Version = _text("a version such as '1.2.0'", _LONGEST_VERSION)
Outline = _text("a SHA-256 in hexadecimal", 64, _HASH, empty=True)
Names = _list_of(ModulePath, "names", 0, MOST_ENTRIES, distinct=True)
Shape = _list_of(Size | None, f"1 to {_MOST_DIMENSIONS} sizes", 1, _MOST_DIMENSIONS)
Values = _by_name(ModuleOrRoot, _by_name(AttributeName, Number))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ReplacementRecord(_Strict):
    """A module that was taken out, and what sits in its place."""

    kind: Literal["identity", "attention", "mlp"] = Field(alias="as")
    tombstone: ModulePath | None = None
    layer_idx: Size | None = None


class SectionRecord(_Strict):
    """What differs between one model class and its skeleton."""

    cls: ClassName = Field(alias="class")
    modules: Values = {}
    configs: Values = {}
    tensors: _by_name(ModulePath, Shape) = {}
    buffers: Names = []
    biases: Names = []
    replaced: _by_name(ModulePath, ReplacementRecord) = {}
    dropped: Names = []
    growth: Growth = 1


class DeltaRecord(_Strict):
    """Delta of a pruned model; FORMAT.md explains it.

    Value of the key ``sosp_hub`` in the ``config.json`` of transformers or of a plain module, or
    of ``model_args.delta`` in a timm one.
    """

    schema_version: Annotated[Any, WithJsonSchema({"const": SCHEMA_VERSION})]  # was migrated
    sosp_hub_version: Version
    library: Builder
    library_version: Version
    base: SectionRecord
    head: SectionRecord | None = None
    feature_channels: Numbers = []
    outline: Outline = ""


# ------------------------------------------------------------------------------------------- words


def _words(error: ValidationError, path: str) -> str:
    """The first validation error: key path, given value, expected value."""
    fault = error.errors(include_url=False)[0]
    where, key = path, ""
    value: Any = None
    for part in fault["loc"]:
        if part == "[key]":
            value = key
            break
        where += _step(part)
        key = part
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        owner = path + "".join(map(_step, fault["loc"][:-1]))
        known = ", ".join(sorted(_known_keys(fault["loc"])))
        return f"{owner}: unknown key {_short(fault['loc'][-1])}; it knows {known}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "delta":
        return f"{where}: {_short(value)}, {fault['msg']}"
    if kind == "literal_error":
        return f"{where}: {_short(value)}, expected {fault.get('ctx', {})['expected']}"
    return f"{where}: {_short(value)}, expected a JSON object"


def _known_keys(loc: tuple[Any, ...]) -> Iterator[str]:
    model = ReplacementRecord if "replaced" in loc else SectionRecord
    for name, field in (DeltaRecord if len(loc) == 1 else model).model_fields.items():
        yield field.alias or name


def _step(part: Any) -> str:
    if isinstance(part, str) and part.isidentifier() and len(part) <= _LONGEST_NAME:
        return f".{part}"
    return f"[{_short(part)}]"


def _short(value: object) -> str:
    if type(value) is int and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = (
        ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    )
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(schema: Any) -> Any:
    """The schema without the titles and defaults that pydantic adds."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _plain(value)
        for key, value in schema.items()
        if key not in ("title", "default") or isinstance(value, dict)
    }


if __name__ == "__main__":
    PUBLISHED.write_text(published_schema(), encoding="utf-8")
