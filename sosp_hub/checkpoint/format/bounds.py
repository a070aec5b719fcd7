"""Numbers in a config that its weight files cannot mean, refused before anything is built.

Libraries make layers one by one, and a dictionary of labels, before they look at the files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sosp_hub.checkpoint.format.headers import TensorHeader
from sosp_hub.checkpoint.format.record import KEY
from sosp_hub.errors import CheckpointError

_ALWAYS_ALLOWED = 1000
_LAYERS = re.compile(r"layer|depth|block|stage")
_NO_COUNTS = re.compile(r"size|channel|dim|width|rope|depthwise|_(id|index|token)$")
_OTHERS = {KEY, "delta", "id2label", "label2id", "pretrained_cfg"}
_CODE = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_LABELS = re.compile(r"label|num_classes")


def check_counts(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> None:
    """Refuses more layers than the files have tensors, more labels or experts than a size in them.

    Raises:
        CheckpointError: Names the place in ``config.json``.
    """
    largest = largest_size(tensors)
    for path, number in _numbers(config):
        key = path.rpartition(".")[2].lower()
        if _LABELS.search(key):
            most, limit = largest, f"have no size above {largest}"
        elif "expert" in key and not _NO_COUNTS.search(key):  # a router has a row for each
            most, limit = max(largest, len(tensors)), f"have no size above {largest}"
        elif _LAYERS.search(key) and not _NO_COUNTS.search(key):
            most, limit = len(tensors), f"hold {len(tensors)} tensors"
        else:
            continue
        if number > max(most, _ALWAYS_ALLOWED):
            raise CheckpointError(
                f"config.json: {path}: {_short(number)}, the weight files {limit}"
            )


def check_code(config: Mapping[str, Any]) -> None:
    """Refuses implementations in a config that transformers would fetch from somewhere and run.

    Raises:
        CheckpointError: Names the place in ``config.json``.
    """
    for path, value in _named(config):
        if _CODE.fullmatch(path.rpartition(".")[2]):
            values = value.values() if isinstance(value, Mapping) else (value,)
            for each in values:
                if each is not None and each not in _OWN_IMPLEMENTATIONS:
                    raise CheckpointError(
                        f"config.json: {path}: {ascii(each)[:80]}: a file must not choose code, "
                        f"only {', '.join(_OWN_IMPLEMENTATIONS)}; take the entry out, and pass "
                        f"{path.rpartition('.')[2].strip('_')}= yourself if you trust it"
                    )


def is_widened(config: Mapping[str, Any]) -> bool:
    """Whether a delta makes anything larger than a plain config would."""
    record = config.get(KEY) or _model_args(config).get("delta")
    sections = [record.get(key) for key in ("base", "head")] if isinstance(record, Mapping) else []
    return any(isinstance(each, Mapping) and "growth" in each for each in sections)


def outgrows_files(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether timm, which builds a model before it looks at the files, gets a number above them."""
    own = {"model_args": _model_args(config), "num_classes": config.get("num_classes")}
    largest = largest_size(tensors)
    return "architecture" in config and any(number > largest for _, number in _numbers(own))


def _model_args(config: Mapping[str, Any]) -> Mapping[str, Any]:
    args = config.get("model_args")
    return args if isinstance(args, Mapping) else {}


def largest_size(tensors: Mapping[str, TensorHeader]) -> int:
    """The largest dimension of any tensor."""
    return max((size for each in tensors.values() for size in each.shape), default=0)


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number that may be a size, with its place; a delta has checks of its own."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key not in _OTHERS:
                yield from _numbers(each, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each, path)
    elif isinstance(value, int | float):
        yield path, value


def _named(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of a config and of the configs in it, with its place."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            where = f"{path}.{key}".lstrip(".")
            yield where, each
            yield from _named(each, where)
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _named(each, f"{path}[{i}]")


def _short(number: float) -> str:
    if isinstance(number, int) and number.bit_length() > 128:
        return f"a number of {number.bit_length()} bits"
    return str(number)
