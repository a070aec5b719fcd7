"""The delta as data. No torch here.

FORMAT.md specifies its JSON, and ``schema.py`` reads it with strict checks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

KEY = "sosp_hub"
"""Key of the delta in ``config.json``."""

SCHEMA_VERSION = 1

Builder = Literal["transformers", "timm", "torch"]
"""Who builds the skeleton: a library from its config, or the reader's own code."""

Plain = int | float | tuple[int, ...]
Shape = tuple[int | None, ...]
"""Size of every dimension; None where the skeleton's own size stays."""

LARGEST_GROWTH = 4
"""No dimension of a widened model is more than so many times the skeleton's."""


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

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Section":
        """What `to_json` gave; nothing is checked."""
        return cls(
            cls=record["class"],
            modules=_values(record.get("modules", {})),
            configs=_values(record.get("configs", {})),
            tensors={name: tuple(shape) for name, shape in record.get("tensors", {}).items()},
            buffers=tuple(record.get("buffers", ())),
            biases=tuple(record.get("biases", ())),
            replaced={
                name: Replacement(one["as"], one.get("tombstone"), one.get("layer_idx"))
                for name, one in record.get("replaced", {}).items()
            },
            dropped=tuple(record.get("dropped", ())),
            growth=record.get("growth", 1),
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

    library: Builder
    library_version: str
    sosp_hub_version: str
    base: Section
    head: Section | None = None
    feature_channels: tuple[int, ...] = ()
    """timm only: channels of each entry of ``feature_info``."""
    outline: str = ""
    """torch only: hash of the names and classes of the skeleton's modules."""

    @property
    def empty(self) -> bool:
        """Whether the delta is empty: a plain config describes the model."""
        return self.base.empty and (self.head is None or self.head.empty)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Delta":
        """What `to_json` gave; nothing is checked, for which there is ``schema.parse_delta``."""
        head = record.get("head")
        return cls(
            library=record["library"],
            library_version=record["library_version"],
            sosp_hub_version=record["sosp_hub_version"],
            base=Section.from_json(record["base"]),
            head=None if head is None else Section.from_json(head),
            feature_channels=tuple(record.get("feature_channels", ())),
            outline=record.get("outline", ""),
        )

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
        if self.outline:
            record["outline"] = self.outline
        return record


def library_in(config: Mapping[str, Any]) -> Builder:
    """Who builds the model of a ``config.json``; ``torch`` = the code of whoever reads it."""
    record = config.get(KEY)
    if isinstance(record, Mapping) and record.get("library") == "torch":
        return "torch"
    is_timm = "architecture" in config and "model_type" not in config
    return "timm" if is_timm else "transformers"


def _values(record: Mapping[str, Any]) -> dict[str, dict[str, Plain]]:
    return {
        name: {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for name, values in record.items()
    }


def _plain_json(values: Mapping[str, Plain]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }


def _replacement_json(one: Replacement) -> dict[str, Any]:
    parts = {"as": one.kind, "tombstone": one.tombstone, "layer_idx": one.layer_idx}
    return {key: value for key, value in parts.items() if value is not None}
