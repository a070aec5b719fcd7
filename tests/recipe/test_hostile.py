"""Recipes that were written to do harm: refused with a short, typed error, at once."""

import pytest

from sosp_hub.errors import RecipeError
from sosp_hub.recipe.load import load_recipe, parse_recipe

_LONGEST = 3000  # characters of an error that a person still reads

GOOD = """
model: {library: timm, id: resnet18, task: image-classification}
data: {id: sklearn/digits}
"""


def bomb(levels):
    """Nine aliases of nine aliases of ...: a few hundred characters that stand for 9**levels."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merging_bomb(levels):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def chain(levels):
    """Each alias adds a level of nesting to what it names."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, levels))]
    return "\n".join(lines)


HOSTILE = {
    "nine levels of aliases": GOOD + bomb(9),
    "seven levels of aliases": GOOD + bomb(7),
    "aliases under a known key": GOOD + bomb(5) + "\nseed: *a4",
    "merged aliases": GOOD + merging_bomb(9),
    "a chain of aliases": GOOD + chain(2000),
    "an alias within itself": GOOD + "seed: &a [*a]",
    "5,000 brackets": GOOD + "seed: " + "[" * 5000,
    "5,000 closed brackets": GOOD + "seed: " + "[" * 5000 + "]" * 5000,
    "5,000 braces": GOOD + "seed: " + "{a: " * 5000,
    "5,000 levels of blocks": "\n".join(" " * n + "a:" for n in range(5000)),
    "5,000 questions": GOOD + "? " * 5000,
    "100,000 digits": GOOD + "seed: " + "9" * 100_000,
    "100,000 hexadecimal digits": GOOD + "seed: 0x" + "f" * 100_000,
    "100,000 binary digits": GOOD + "seed: 0b" + "1" * 100_000,
    "base 60": GOOD + "seed: " + ":".join(["1"] * 50_000),
    "a huge float": GOOD + "budget: {macs: " + "9" * 5000 + ".5}",
    "a huge exponent": GOOD + "budget: {macs: 1e99999}",
    "10,000 unknown keys": GOOD + "\n".join(f"k{n}: 1" for n in range(10_000)),
    "a long unknown key": GOOD + "k" * 900 + ": 1",
    "a long value": GOOD + f"seed: '{'x' * 500_000}'",
    "two megabytes": GOOD + "# " + "x" * 2**21,
    "a date that is none": GOOD + "seed: 2001-99-99",
    "a date": GOOD + "seed: 2001-01-01",
    "a tag of Python": GOOD + "seed: !!python/object/apply:os.system [ls]",
    "a truth that is none": GOOD + "seed: !!bool perhaps",
    "no number": GOOD + "seed: !!int ''",
    "no float": GOOD + "seed: !!float x",
    "no binary": GOOD + "seed: !!binary '='",
    "a set": GOOD + "seed: !!set {a, b}",
    "an ordered map": GOOD + "seed: !!omap [a: 1]",
    "a key that is a list": GOOD + "? [a, b]\n: 1",
    "a key that is a number": GOOD + "1: 2",
    "a key that is nothing": GOOD + "~: 2",
    "a key that is a bomb": GOOD + "? " + "[" * 5000,
    "a NUL": GOOD + "seed: \x00",
    "half a character": GOOD + 'output: {dir: "\\ud800"}',
    "a terminal's language": GOOD + 'seed: "\\x1b[2J\\x1b]0;owned\\x07"',
    "text that turns around": GOOD + 'seed: "\\u202edne"',
    "a directive": "%YAML 99.1\n---\n" + GOOD,
    "two documents": GOOD + "\n---\n" + GOOD,
    "a list": "[1, 2]",
    "a word": "word",
    "nothing": "",
    "a model that is a list": "model: [1]\ndata: {id: sklearn/digits}",
    "a criterion that is nothing": GOOD + "criterion: {name: [a]}",
    "a comparison of bombs": GOOD + bomb(4) + "\ncompare: {criteria: [*a3]}",
    "budgets of anything": GOOD + "compare: {criteria: [random], budgets: [{macs: [[1]]}]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_in_few_words(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(HOSTILE[name].encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    check_words(str(caught.value))


def test_what_aliases_stand_for_is_counted_before_anything_is_made_of_it():
    with pytest.raises(RecipeError, match="more than 50000 values, with its aliases written out"):
        parse_recipe(GOOD + bomb(5) + "\nseed: *a4", "recipe.yaml")


def check_words(words):
    assert len(words) < _LONGEST, f"{len(words)} characters: {words[:300]}"
    odd = [c for c in words if not (c.isprintable() or c == "\n")]
    assert not odd, odd


@pytest.mark.parametrize("name", [name for name in HOSTILE if HOSTILE[name].startswith(GOOD)])
def test_a_hostile_override_is_refused_in_few_words(name):
    key, _, value = HOSTILE[name].removeprefix(GOOD).strip().partition(":")
    if not key.isidentifier() or "\n" in value:
        key, value = "seed", HOSTILE[name].removeprefix(GOOD)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD, "recipe.yaml", [f"{key}={value.strip()}"])
    check_words(str(caught.value))


def test_honest_aliases_and_long_comments_are_read():
    text = GOOD + "x: &x {epochs: 2}\nfinetune: *x\n" + "# a remark\n" * 2000
    recipe = parse_recipe(
        text.replace("x: &x {epochs: 2}\nfinetune: *x", "finetune: &x {epochs: 2}"), "a"
    )
    assert recipe.finetune.epochs == 2
    text = GOOD.replace("sklearn/digits}", "sklearn/digits, num_train: &n 64, num_test: *n}")
    assert parse_recipe(text, "a").data.num_test == 64


def test_a_device_that_never_ends_is_not_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match="at most"):
        load_recipe(path)
