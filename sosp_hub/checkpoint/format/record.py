"""The delta as data: a closed JSON format, read with strict checks. No torch here.

FORMAT.md specifies it and ``delta.schema.json`` states it for other tools.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sosp_hub.errors import CheckpointError

KEY = "sosp_hub"
"""Key of the delta in ``config.json``."""

SCHEMA_VERSION = 1

Plain = int | float | tuple[int, ...]
Shape = tuple[int | None, ...]
"""Size of every dimension; None where the skeleton's own size stays."""

LARGEST_SIZE = 2**31 - 1
LARGEST_GROWTH = 4
"""No dimension of a widened model is more than so many times the skeleton's."""
MOST_ENTRIES = 200_000
LONGEST_NAME = 512
_KEYS = {"schema_version", "sosp_hub_version", "library", "library_version", "base", "head"}
_KEYS |= {"feature_channels"}
_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Replacement:
    """A module that was taken out; a stand-in without weights sits in its place.

    Attributes:
        kind: ``identity`` hands its first input on, ``mlp`` returns zeros, ``attention`` returns
            zeros and keeps the key-value cache in step.
        tombstone: Name of a weight of the module that was taken out. The stand-in holds an empty
            tensor of that name, so that a loader that does not know the delta stops at its shape.
        layer_idx: Layer of the cache that an ``attention`` keeps in step.
    """

    kind: Literal["identity", "attention", "mlp"]
    tombstone: str | None = None
    layer_idx: int | None = None


@dataclass(frozen=True)
class Section:
    """What differs between one model class and its skeleton; all names are relative to that class.

    Attributes:
        cls: Name of the class.
        modules: New values of plain attributes, by module.
        configs: New values in the module's own copy of its config, by module.
        tensors: Shapes of tensors that do not follow from attributes.
        buffers: Buffers that the weight files hold because they cannot be recomputed.
        biases: Modules without a bias in the skeleton that have one.
        replaced: Modules that were taken out, with their stand-ins.
        dropped: Modules that are gone.
        growth: No size is more than so many times the skeleton's; 1 where nothing was widened.
    """

    cls: str
    modules: Mapping[str, Mapping[str, Plain]] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Plain]] = field(default_factory=dict)
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    replaced: Mapping[str, Replacement] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    growth: int = 1

    @property
    def empty(self) -> bool:
        """Whether the skeleton needs no change."""
        return self.num_entries == 0

    @property
    def num_entries(self) -> int:
        """Number of single differences."""
        values = sum(len(values) for values in (*self.modules.values(), *self.configs.values()))
        sizes = sum(sum(size is not None for size in shape) for shape in self.tensors.values())
        return (
            values
            + sizes
            + len(self.buffers)
            + len(self.biases)
            + len(self.replaced)
            + len(self.dropped)
        )

    def to_json(self) -> dict[str, Any]:
        """The section as JSON data; empty parts are left out."""
        record: dict[str, Any] = {"class": self.cls}
        parts = {
            "modules": {name: _plain_json(values) for name, values in self.modules.items()},
            "configs": {name: _plain_json(values) for name, values in self.configs.items()},
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "buffers": list(self.buffers),
            "biases": list(self.biases),
            "replaced": {name: _replacement_json(one) for name, one in self.replaced.items()},
            "dropped": list(self.dropped),
            "growth": self.growth if self.growth > 1 else None,
        }
        return record | {key: part for key, part in parts.items() if part}


@dataclass(frozen=True)
class Delta:
    """The whole value of the key ``sosp_hub``."""

    library: Literal["transformers", "timm"]
    library_version: str
    sosp_hub_version: str
    base: Section
    head: Section | None = None
    feature_channels: tuple[int, ...] = ()
    """timm only: channels of each entry of ``feature_info``."""

    @property
    def empty(self) -> bool:
        """Whether a plain config says all."""
        return self.base.empty and (self.head is None or self.head.empty)

    def to_json(self) -> dict[str, Any]:
        """The delta as JSON data."""
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "sosp_hub_version": self.sosp_hub_version,
            "library": self.library,
            "library_version": self.library_version,
            "base": self.base.to_json(),
        }
        if self.head is not None:
            record["head"] = self.head.to_json()
        if self.feature_channels:
            record["feature_channels"] = list(self.feature_channels)
        return record


def parse_delta(record: object, path: str = KEY) -> Delta:
    """Reads a delta from JSON data and refuses everything that the format does not name.

    Args:
        record: The value of the key ``sosp_hub``.
        path: Its place in the file, for messages.

    Raises:
        CheckpointError: Names the JSON path of the first fault.
    """
    record = _migrate(_object(record, path), path)
    _only(record, _KEYS, path)
    library = record.get("library")
    if library not in ("transformers", "timm"):
        raise CheckpointError(
            f"{path}.library: {_short(library)}, expected 'transformers' or 'timm'"
        )
    versions = {}
    for key in ("library_version", "sosp_hub_version"):
        value = record.get(key)
        if not isinstance(value, str) or len(value) > 64:
            raise CheckpointError(
                f"{path}.{key}: {_short(value)}, expected a version such as '1.2.0'"
            )
        versions[key] = value
    base = _parse_section(record.get("base"), f"{path}.base")
    head = record.get("head")
    channels = record.get("feature_channels", ())
    if channels != ():
        channels = _parse_plain(channels, f"{path}.feature_channels")
        if not isinstance(channels, tuple):
            raise CheckpointError(f"{path}.feature_channels: expected a list of numbers")
    delta = Delta(
        library=library,
        base=base,
        head=None if head is None else _parse_section(head, f"{path}.head"),
        feature_channels=channels,
        **versions,
    )
    if (num := base.num_entries + (delta.head.num_entries if delta.head else 0)) > MOST_ENTRIES:
        raise CheckpointError(f"{path}: {num} entries, at most {MOST_ENTRIES} are read")
    return delta


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From the schema version to a function that rewrites a record of it for the next version."""


def _migrate(record: dict[str, Any], path: str) -> dict[str, Any]:
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


def _parse_section(record: object, path: str) -> Section:
    record = _object(record, path)
    parts = {"class", "modules", "configs", "tensors", "buffers", "biases", "replaced", "dropped"}
    _only(record, parts | {"growth"}, path)
    growth = _parse_int(record.get("growth", 1), f"{path}.growth")
    if not 1 <= growth <= LARGEST_GROWTH:
        raise CheckpointError(f"{path}.growth: {growth}, expected 1 to {LARGEST_GROWTH}")
    cls = record.get("class")
    if not isinstance(cls, str) or len(cls) > LONGEST_NAME or not cls.isidentifier():
        raise CheckpointError(f"{path}.class: {_short(cls)}, expected the name of a class")
    return Section(
        cls=cls,
        modules=_parse_values(record.get("modules", {}), f"{path}.modules"),
        configs=_parse_values(record.get("configs", {}), f"{path}.configs"),
        tensors={
            name: _parse_shape(shape, f"{path}.tensors[{name!r}]")
            for name, shape in _named(record.get("tensors", {}), f"{path}.tensors").items()
        },
        buffers=_parse_names(record.get("buffers", []), f"{path}.buffers"),
        biases=_parse_names(record.get("biases", []), f"{path}.biases"),
        replaced={
            name: _parse_replacement(one, f"{path}.replaced[{name!r}]")
            for name, one in _named(record.get("replaced", {}), f"{path}.replaced").items()
        },
        dropped=_parse_names(record.get("dropped", []), f"{path}.dropped"),
        growth=growth,
    )


def _parse_values(record: object, path: str) -> dict[str, dict[str, Plain]]:
    parsed: dict[str, dict[str, Plain]] = {}
    for name, values in _named(record, path, root=True).items():
        where = f"{path}[{name!r}]"
        parsed[name] = {}
        for key, value in _object(values, where).items():
            if len(key) > LONGEST_NAME or not _NAME.fullmatch(key):
                raise CheckpointError(f"{where}[{_short(key)}]: not the name of a plain attribute")
            parsed[name][key] = _parse_plain(value, f"{where}.{key}")
    return parsed


def _parse_plain(value: object, path: str) -> Plain:
    if isinstance(value, list):
        if not value or len(value) > 4096:
            raise CheckpointError(f"{path}: {len(value)} numbers, expected 1 to 4096")
        return tuple(_parse_int(one, f"{path}[{i}]") for i, one in enumerate(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{path}: {value}, expected a finite number")
        return value
    return _parse_int(value, path)


def _parse_int(value: object, path: str) -> int:
    if type(value) is not int:
        raise CheckpointError(f"{path}: {_short(value)}, expected a whole number")
    if not 0 <= value <= LARGEST_SIZE:
        raise CheckpointError(f"{path}: {_short(value)}, expected 0 to {LARGEST_SIZE}")
    return value


def _parse_shape(value: object, path: str) -> Shape:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise CheckpointError(f"{path}: {_short(value)}, expected a list of 1 to 8 sizes")
    return tuple(
        None if one is None else _parse_int(one, f"{path}[{i}]") for i, one in enumerate(value)
    )


def _parse_names(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MOST_ENTRIES:
        raise CheckpointError(f"{path}: {_short(value)}, expected a list of names")
    for i, name in enumerate(value):
        _check_path(name, f"{path}[{i}]")
    if len(set(value)) != len(value):
        raise CheckpointError(f"{path}: names a module twice")
    return tuple(value)


def _parse_replacement(record: object, path: str) -> Replacement:
    record = _object(record, path)
    _only(record, {"as", "tombstone", "layer_idx"}, path)
    kind = record.get("as")
    if kind not in ("identity", "attention", "mlp"):
        raise CheckpointError(
            f"{path}.as: {_short(kind)}, expected 'identity', 'attention' or 'mlp'"
        )
    tombstone = record.get("tombstone")
    if tombstone is not None:
        _check_path(tombstone, f"{path}.tombstone")
    layer_idx = record.get("layer_idx")
    if layer_idx is not None:
        layer_idx = _parse_int(layer_idx, f"{path}.layer_idx")
    return Replacement(kind, tombstone, layer_idx)


def _named(record: object, path: str, *, root: bool = False) -> dict[str, Any]:
    record = _object(record, path)
    for name in record:
        if not (root and name == ""):
            _check_path(name, f"{path}[{_short(name)}]")
    return record


def _check_path(name: object, path: str) -> None:
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not _PATH.fullmatch(name):
        raise CheckpointError(f"{path}: {_short(name)}, expected a name such as 'layers.0.mlp'")
    if any(part.startswith("__") for part in name.split(".")):
        raise CheckpointError(f"{path}: {_short(name)}, names that start with '__' are refused")


def _object(record: object, path: str) -> dict[str, Any]:
    if not isinstance(record, Mapping) or not all(isinstance(key, str) for key in record):
        raise CheckpointError(f"{path}: {_short(record)}, expected a JSON object")
    return dict(record)


def _only(record: Mapping[str, Any], allowed: set[str], path: str) -> None:
    for key in record:
        if key not in allowed:
            raise CheckpointError(
                f"{path}: unknown key {_short(key)}; it knows {', '.join(sorted(allowed))}"
            )


def _short(value: object) -> str:
    if type(value) is int and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = (
        ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    )
    return text if len(text) <= 80 else text[:77] + "..."


def _plain_json(values: Mapping[str, Plain]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }


def _replacement_json(one: Replacement) -> dict[str, Any]:
    parts = {"as": one.kind, "tombstone": one.tombstone, "layer_idx": one.layer_idx}
    return {key: value for key, value in parts.items() if value is not None}
