"""JSON of strangers: plans, reports, configs and front matter that were written to do harm."""

import json

import pytest

from sosp_hub.errors import (
    HubError,
    ModelError,
    PlanError,
    RecipeError,
    SospHubError,
    VerificationError,
)
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.report.schema import read_report
from sosp_hub.report.snippets import read_checkpoint
from sosp_hub.untrusted import UnreadableError, front_matter, parse_json, parse_yaml
from sosp_hub.zoo.load import load_model

_LONGEST = 3000

PLAN = {"schema_version": 1, "kept": {"a": [0, 2]}, "sizes": {"a": 4}}

DAMAGED = {
    "nothing": "",
    "cut short": '{"a": [1, 2',
    "no JSON": "{'a': 1}",
    "a list": "[1]",
    "a word": '"word"',
    "null": "null",
    "100,000 brackets": "[" * 100_000,
    "100,000 brackets, closed": "[" * 100_000 + "]" * 100_000,
    "900 brackets, closed": '{"a": ' + "[" * 900 + "]" * 900 + "}",
    "100,000 objects": '{"a":' * 100_000,
    "100,000 digits": '{"a": ' + "9" * 100_000 + "}",
    "half a character": '{"a": "\\ud800"}',
    "half a character as key": '{"\\ud800": 1}',
    "no UTF-8": b'{"a": "\xff"}',
    "a mark of UTF-16": '{"a": 1}'.encode("utf-16"),
}


def read_plan(folder, text):
    return PruningPlan.from_json(text.decode("latin1") if isinstance(text, bytes) else text)


def read_a_report(folder, text):
    put(folder / "sosp_report.json", text)
    return read_report(folder)


def read_config(folder, text):
    put(folder / "config.json", text)
    return read_checkpoint(folder)


def load_timm_folder(folder, text):
    put(folder / "config.json", text)
    section = ModelSection(library="timm", id=str(folder), task="image-classification")
    return load_model(section)


def load_transformers_folder(folder, text):
    put(folder / "config.json", text)
    return load_model(ModelSection(library="transformers", id=str(folder), task="causal-lm"))


def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


READERS = {
    read_plan: PlanError,
    read_a_report: HubError,
    read_config: HubError,
    load_timm_folder: ModelError,
    load_transformers_folder: ModelError,
}


def few_printable_words(error):
    words = str(error)
    assert len(words) < _LONGEST, f"{len(words)} characters: {words[:300]}"
    assert not [c for c in words if not (c.isprintable() or c == "\n")], words


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json_is_a_typed_error_of_few_words(tmp_path, reader, name):
    with pytest.raises(READERS[reader]) as caught:
        reader(tmp_path, DAMAGED[name])
    few_printable_words(caught.value)


ODD = (None, 5, -1, 1.5, True, "x", "\x1b[2J", [], [[]], [None], ["x"], {}, {"x": {}}, 10**39)


def paths(record, above=()):
    """Every place in a record."""
    for key, value in record.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def with_value(record, path, value):
    changed = json.loads(json.dumps(record))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("path", list(paths(PLAN)), ids=lambda path: ".".join(path))
def test_a_plan_with_an_odd_value_is_refused_or_read(path):
    refused = 0
    for value in ODD:
        try:
            plan = PruningPlan.from_json(json.dumps(with_value(PLAN, path, value)))
        except PlanError as error:
            few_printable_words(error)
            refused += 1
        else:
            assert PruningPlan.from_json(plan.to_json()) == plan
    assert refused > 5


@pytest.mark.parametrize("key", ["base_model", "base_revision", "provenance", "gates", "shifts"])
def test_optional_parts_of_a_plan(key):
    for value in ODD:
        try:
            plan = PruningPlan.from_json(json.dumps({**PLAN, key: value}))
        except PlanError as error:
            few_printable_words(error)
        else:
            assert PruningPlan.from_json(plan.to_json()) == plan
            assert isinstance(plan.base_model, str | None)
            assert isinstance(plan.base_revision, str | None)


def test_honest_json_is_read_as_it_is():
    record = {"a": [1, -2.5, "x", None, True, {"b": []}], "c": 2**63}
    assert parse_json(json.dumps(record)) == record
    assert parse_json('{"a": Infinity}') == {"a": float("inf")}
    assert parse_yaml("a: &x [1, yes]\nb: *x") == {"a": [1, True], "b": [1, True]}


FRONT = {
    "a tag of Python": "!!python/object/apply:os.system [ls]",
    "a NUL": "license: \x00",
    "a list": "- a\n- b",
    "a word": "license",
    "a number": "5",
    "keys that are numbers": "1: 2",
    "deep": "a: " + "[" * 5000,
    "a bomb": "\n".join(
        ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    ),
    "digits": "a: " + "9" * 100_000,
    "a date that is none": "a: 2001-99-99",
    "unbalanced": "a: [",
}


@pytest.mark.parametrize("name", FRONT)
def test_odd_front_matter_is_refused(name):
    with pytest.raises(UnreadableError) as caught:
        front_matter(f"---\n{FRONT[name]}\n---\n# A model\n")
    few_printable_words(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# A model\n\n---\nno: metadata\n---\n", {}),
        ("---\n---\n", {}),
        ("---\n\n---\ntext", {}),
        ("---\nlicense: mit\n---\ntext", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
    ],
)
def test_front_matter(text, expected):
    assert front_matter(text) == expected


def test_an_error_is_short_and_safe_to_print():
    for error in (
        SospHubError("x" * 100_000 + "\x1b[2J\u202e\ud800"),
        PlanError("a\x1b]0;owned\x07\nb\tc\r"),
        VerificationError("x\x9b2J", ["a"]),
        RecipeError("a\x1b", ["x" * 100_000] * 100_000),
    ):
        assert len(str(error)) < 20_000
        assert not [c for c in str(error) if not (c.isprintable() or c in "\n\t")]
        str(error).encode()
    assert str(PlanError("a\x1b]0;owned\x07\nb\tc\r")) == "a\\x1b]0;owned\\x07\nb\tc\\r"
    assert str(PlanError("ä ± 5 % 漢字 → ✓")) == "ä ± 5 % 漢字 → ✓"
