"""JSON and YAML that strangers wrote: read within limits of size, depth and aliases.

All faults are one error with few words; whoever reads the file says which it is.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MOST_JSON_BYTES = 100_000_000  # a report with a plan of an 8B model has about 20 million
MOST_YAML_BYTES = 1_000_000
MOST_CARD_BYTES = 20_000_000
_MOST_DEPTH = 64
_MOST_NODES = 50_000  # values of a YAML text once its aliases are written out
_MOST_DIGITS = 40  # of a whole number; the largest of 64 bits has 20
_FRONT_MATTER = re.compile(r"^\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


class UnreadableError(ValueError):
    """A text that cannot be read, or that is larger or deeper than anything honest."""


def read_text(path: Path, most_bytes: int) -> str:
    """A text file of limited size.

    Raises:
        UnreadableError: No such file, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror})") from error
    if len(raw) > most_bytes:
        raise UnreadableError(f"larger than {most_bytes} bytes, and at most so many are read")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not text in UTF-8 (byte {error.start})") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UnreadableError: As `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, MOST_JSON_BYTES))


def parse_json(text: str | bytes, object_pairs_hook: Callable[[Any], Any] | None = None) -> Any:
    """What a JSON text says.

    Raises:
        UnreadableError: No JSON, nested too deeply, a number of too many digits, or half a
            character.
    """
    try:
        record = json.loads(text, parse_int=_whole_number, object_pairs_hook=object_pairs_hook)
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except ValueError as error:
        raise UnreadableError(f"not JSON ({error})") from error
    _check_values(record)
    return record


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise UnreadableError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _check_values(record: Any) -> None:
    """Refuses what later code could not take: deep nesting, and text that has no UTF-8."""
    level = [record]
    for _ in range(_MOST_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    _check_text(key)
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, str):
                _check_text(value)
        level = inner
        if not level:
            return
    raise UnreadableError(_TOO_DEEP)


_TOO_DEEP = f"nested more than {_MOST_DEPTH} levels deep"
_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_text(value: object) -> None:
    if isinstance(value, str) and _SURROGATE.search(value):
        raise UnreadableError("text with half a character (a lone surrogate)")


class LimitedLoader(yaml.SafeLoader):
    """Plain YAML with limits of depth, of what aliases stand for, and of digits."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._num_nodes = 0
        self._heights = [0]  # of the nodes that are being composed: their highest child so far
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; counts what it holds with every alias written out."""
        event: Any = self.peek_event()
        alias, before = isinstance(event, yaml.AliasEvent), self._num_nodes
        if self._depth >= _MOST_DEPTH:
            raise _fault(_TOO_DEEP, event)
        self._depth += 1
        self._heights.append(0)
        node = super().compose_node(parent, index)
        height = self._heights.pop() + 1
        self._depth -= 1
        if alias:
            if id(node) not in self._sizes:
                raise _fault(f"the alias *{event.anchor} stands within what it names", event)
            size, height = self._sizes[id(node)]
            self._num_nodes += size
            if self._depth + height > _MOST_DEPTH:
                raise _fault(_TOO_DEEP, event)
        else:
            self._num_nodes += 1
            self._sizes[id(node)] = (self._num_nodes - before, height)
        if self._num_nodes > _MOST_NODES:
            raise _fault(f"more than {_MOST_NODES} values, with its aliases written out", event)
        self._heights[-1] = max(self._heights[-1], height)
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar."""
        number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        if number and len(node.value) > 10 * _MOST_DIGITS:
            raise _fault(f"a number of {len(node.value)} digits", node)
        text = super().construct_scalar(node)
        if isinstance(text, str) and _SURROGATE.search(text):
            raise _fault("text with half a character (a lone surrogate)", node)
        return text


def _fault(words: str, where: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, words, where.start_mark)


def parse_yaml(text: str, loader: type[LimitedLoader] = LimitedLoader) -> Any:
    """What a YAML text says.

    Args:
        text: The text.
        loader: Says how plain words are read.

    Raises:
        UnreadableError: No YAML, or beyond a limit.
    """
    if len(text) > MOST_YAML_BYTES:
        raise UnreadableError(f"YAML of {len(text)} characters; at most {MOST_YAML_BYTES} are read")
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UnreadableError(f"not valid YAML: {where}{problem}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise UnreadableError(f"not valid YAML: {type(error).__name__} in a value") from None
    except ValueError as error:  # a date of month 99
        raise UnreadableError(f"not valid YAML: {error}") from None


def front_matter(text: str) -> dict[str, Any]:
    """The metadata at the top of a card; none where there is no such block.

    Raises:
        UnreadableError: A block that is no YAML, or that holds anything but keys with values.
    """
    block = _FRONT_MATTER.match(text)
    if block is None:
        return {}
    record = parse_yaml(block[1])
    if record is None:
        return {}
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        kind = "keys that are no text" if isinstance(record, dict) else type(record).__name__
        raise UnreadableError(f"the metadata at the top hold {kind}; expected `key: value` lines")
    return record
