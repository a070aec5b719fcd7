"""The plain config that describes a cut model completely, if there is one.

A candidate config is the model's own with one number changed to what the cut suggests; it is kept
when it leaves fewer differences. The result counts only with no difference left, and with the same
output.
"""

import contextlib
import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from sosp_hub.checkpoint.format.modules import own_config, plain_attributes
from sosp_hub.checkpoint.format.record import Delta, Section
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.compat.torch import child_table
from sosp_hub.errors import CheckpointError

_MOST_BUILDS = 64
_MOST_NUMBERS = 16
_NO_NUMBER = "its config has no numbers for these sizes"

_REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, CheckpointError, ImportError),
    *(LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError),
)
"""What building a model from a config that makes no sense can raise."""

_Pair = tuple[int, int]
"""A size before and after the cut."""


def best_skeleton(model: PreTrainedModel) -> tuple[Any, Delta]:
    """The config, among those that the model and its modules hold, that leaves the smallest delta.

    Raises:
        CheckpointError: None of them builds a model that this one could be cut from.
    """
    candidates: list[tuple[int, Any, Delta]] = []
    failed: Exception | None = None
    for config in _configs(model):
        try:
            delta = adapter.delta_of(model, config)
        except _REFUSALS as error:
            failed = failed or error
            continue
        if delta.empty:
            return adapter.plain_config(config), delta
        candidates.append((_num_entries(delta), config, delta))
    if not candidates:
        raise CheckpointError(
            f"{type(model).__name__}: no config builds its skeleton ({failed})"
        ) from failed
    _, config, delta = min(candidates, key=lambda each: each[0])
    return adapter.plain_config(config), delta


def uniform_config(model: PreTrainedModel, config: Any, delta: Delta) -> tuple[Any | None, str]:
    """A config that leaves no difference at all; or None, and what stands against it.

    Args:
        model: The pruned model.
        config: The best config so far.
        delta: What it leaves.
    """
    original, left, builds = config, _num_entries(delta), 0
    obstacle, refused_left = "", left
    while left:
        skeleton = adapter.build_meta(type(model), config)
        pairs = _pairs(skeleton, adapter.base_name(model), delta)
        if pairs is None:
            return None, "layers of one kind differ"
        for position, key, value in _suggestions(config, pairs):
            builds += 1
            if builds > _MOST_BUILDS:
                return None, obstacle or _NO_NUMBER
            try:
                candidate = _with(config, position, key, value)
                remaining = adapter.delta_of(model, candidate, original)
            except _REFUSALS:
                continue
            if _num_entries(remaining) >= left:
                continue
            try:
                _check(candidate)
            except _REFUSALS as error:
                if _num_entries(remaining) < refused_left:
                    refused_left = _num_entries(remaining)
                    obstacle = _refusal(config, position, key, value, error)
                continue
            config, delta, left = candidate, remaining, _num_entries(remaining)
            break
        else:
            return None, obstacle or _NO_NUMBER
    return config, ""


def _refusal(config: Any, position: int, key: str, value: int, error: Exception) -> str:
    """That a config does not take a number, why, and which ones it takes."""
    owner = list(adapter.config_tree(config))[position]
    taken: list[str] = []
    for number in range(1, getattr(owner, key) + 1):
        with contextlib.suppress(*_REFUSALS):
            _check(_with(config, position, key, number))
            taken.append(str(number))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    shown = ", ".join(taken[:_MOST_NUMBERS]) + (", ..." if len(taken) > _MOST_NUMBERS else "")
    return f"{type(owner).__name__} refuses {key}={value} ({lines[-1]}); it takes {shown}"


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    seen = {id(model.config)}
    yield model.config
    others = Counter[int]()
    by_id: dict[int, Any] = {}
    for module in model.modules():
        config = own_config(module)
        if type(config) is type(model.config) and id(config) not in seen:
            others[id(config)] += 1
            by_id[id(config)] = config
    for key, _ in others.most_common(2):
        yield by_id[key]
    yield from _as_modules_say(model)


def _as_modules_say(model: PreTrainedModel) -> Iterator[Any]:
    """The config with words that its model has changed since, such as a kind of attention.

    A model that runs otherwise than it was configured builds other modules for it, and its config
    does not always follow.
    """
    words = {key: value for key, value in vars(model.config).items() if isinstance(value, str)}
    said: dict[str, set[str]] = defaultdict(set)
    for module in model.modules():
        for key in words.keys() & vars(module).keys():
            if isinstance(vars(module)[key], str):
                said[key].add(vars(module)[key])
    changed = {key: value for key, (value, *_) in said.items() if value != words[key]}
    if changed and all(len(said[key]) == 1 for key in changed):
        config = copy.deepcopy(model.config)
        vars(config).update(changed)
        yield config


def _num_entries(delta: Delta) -> int:
    return delta.base.num_entries + (delta.head.num_entries if delta.head else 0)


def _pairs(skeleton: nn.Module, base: str, delta: Delta) -> Counter[_Pair] | None:
    """Sizes before and after, with how often; None where layers of one pattern differ."""
    pairs = Counter[_Pair]()
    seen: dict[str, set[_Pair]] = defaultdict(set)
    for section, root in sections(skeleton, base, delta):
        if section.replaced or section.biases:
            return None
        for name, key, old, new in _changes(section, root):
            seen[re.sub(r"\d+", "*", f"{name}.{key}")].add((old, new))
            pairs[old, new] += 1
        gone = Counter(name.rpartition(".")[0] for name in section.dropped)
        for parent, num in gone.items():
            size = len(child_table(root.get_submodule(parent)))
            pairs[size, size - num] += num
    return None if any(len(each) > 1 for each in seen.values()) else pairs


def sections(skeleton: nn.Module, base: str, delta: Delta) -> Iterator[tuple[Section, nn.Module]]:
    """The parts of a delta, each with the module that its names are relative to."""
    yield delta.base, skeleton.get_submodule(base)
    if delta.head is not None:
        yield delta.head, skeleton


def _changes(section: Section, root: nn.Module) -> Iterator[tuple[str, str, int, int]]:
    for name, values in section.modules.items():
        before = plain_attributes(root.get_submodule(name))
        for key, value in values.items():
            yield from _zip(name, key, before[key], value)
    for name, values in section.configs.items():
        before = vars(own_config(root.get_submodule(name)))
        for key, value in values.items():
            yield from _zip(name, key, before[key], value)
    for name, shape in section.tensors.items():
        owner, _, key = name.rpartition(".")
        was = getattr(root.get_submodule(owner), key).shape
        for dim, size in enumerate(shape):
            if size is not None:
                yield owner, f"{key}[{dim}]", was[dim], size


def _zip(name: str, key: str, old: Any, new: Any) -> Iterator[tuple[str, str, int, int]]:
    old, new = (value if isinstance(value, tuple | list) else (value,) for value in (old, new))
    for i, (was, now) in enumerate(zip(old, new, strict=True)):
        if isinstance(was, int) and isinstance(now, int) and was != now:
            yield name, f"{key}[{i}]", was, now


def _suggestions(config: Any, pairs: Counter[_Pair]) -> Iterator[tuple[int, str, int]]:
    """Config numbers that could express the new sizes, directly or in proportion."""
    support = Counter[tuple[int, str, int]]()
    for position, each in enumerate(adapter.config_tree(config)):
        for key, value in vars(each).items():
            if type(value) is not int or value < 2 or key.startswith("_") or key.endswith("_id"):
                continue
            for (old, new), num in pairs.items():
                if not new:  # a block that was cut whole
                    continue
                if old == value:
                    support[position, key, new] += 2 * num
                elif (
                    old and old % value == 0 and (value * new) % old == 0 and value * new // old > 0
                ):
                    support[position, key, value * new // old] += num
    for suggestion, _ in support.most_common():
        yield suggestion


def _with(config: Any, position: int, key: str, value: int) -> Any:
    config = copy.deepcopy(config)
    each = list(adapter.config_tree(config))[position]
    setattr(each, key, value)
    return config


def _check(config: Any) -> None:
    """The checks of a config that is read from a file."""
    type(config).from_dict(config.to_dict())
