"""From a YAML file and ``key.path=value`` overrides to a ``Recipe``, or to every fault at once."""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sosp_hub.command_name import command_name
from sosp_hub.errors import RecipeError, shortened
from sosp_hub.recipe.criteria import CRITERIA, Criterion
from sosp_hub.recipe.faults import explain
from sosp_hub.recipe.schema import Recipe, Verb, with_criterion
from sosp_hub.recipe.shipped import find_recipe, shipped_recipes
from sosp_hub.recipe.study_grid import cells_of
from sosp_hub.untrusted import (
    MOST_YAML_BYTES,
    LimitedLoader,
    UnreadableError,
    parse_yaml,
    read_text,
)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), verb: Verb | None = None
) -> Recipe:
    """Reads a recipe.

    Args:
        path: YAML file, or the name of a recipe that comes with the package.
        overrides: ``key.path=value`` each, the value parsed as YAML; goes before the file.
        verb: What the recipe is for; None = anything.

    Raises:
        RecipeError: Anything that keeps the recipe from being valid; all faults at once.
    """
    path = find_recipe(path)
    recipe = parse_recipe(_read(path), str(path), overrides, output_dir=f"runs/{path.stem}")
    if verb is not None and (faults := list(_misplaced(recipe, verb))):
        raise RecipeError(str(path), faults)
    return recipe


def as_recipe(
    given: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str], verb: Verb
) -> Recipe:
    """A recipe as the verbs of Python take it.

    Args:
        given: Path or name of a recipe, its sections as dictionaries, or a recipe.
        overrides: As for `load_recipe`.
        verb: What it is for.

    Raises:
        RecipeError: As `load_recipe`.
    """
    if isinstance(given, str | Path):
        return load_recipe(given, overrides, verb)
    if not isinstance(given, Mapping | Recipe):
        fault = "expected a path, a name, sections as dictionaries or a Recipe"
        raise RecipeError(f"a recipe of type {type(given).__name__}", [fault])
    text = dump_recipe(given, whole=False) if isinstance(given, Recipe) else _as_yaml(given)
    recipe = parse_recipe(text, "the recipe", overrides, output_dir=f"runs/{verb}")
    if faults := list(_misplaced(recipe, verb)):
        raise RecipeError("the recipe", faults)
    return recipe


def _as_yaml(sections: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(sections))
    except yaml.YAMLError as error:
        fault = (
            f"holds what no YAML file could ({error}); write numbers, texts, lists, dictionaries"
        )
        raise RecipeError("the recipe", [shortened(fault)]) from None


def parse_recipe(
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | None = None,
    criterion: str | None = None,
) -> Recipe:
    """A recipe from its text, such as ``dump_recipe`` makes.

    Args:
        text: YAML.
        source: Where the text comes from, for errors.
        overrides: As for `load_recipe`.
        output_dir: The output folder where neither says one.
        criterion: What is meant where none is named; None = what the task scores with.

    Raises:
        RecipeError: As `load_recipe`.
    """
    data = _parse(text, source)
    if not isinstance(data, dict):
        given = "nothing" if data is None else f"a {type(data).__name__}"
        fault = f"holds {given}; expected the sections `model:` and `data:` at least"
        raise RecipeError(source, [fault])
    faults = list[str]()
    for override in overrides:
        try:
            _override(data, override)
        except ValueError as error:
            faults.append(str(error))
    data = with_criterion(data, criterion)
    output = data.setdefault("output", {})
    if isinstance(output, dict) and output.get("dir") is None:
        output["dir"] = output_dir
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(source, [*faults, *explain(error, Recipe, data)]) from None
    faults.extend(cells_of(recipe)[1])
    if faults:
        raise RecipeError(source, faults)
    return recipe


def _misplaced(recipe: Recipe, verb: Verb) -> Iterator[str]:
    """A section that another verb reads, or the lack of this verb's own."""
    for name, example in (
        ("compare", "{criteria: [random, magnitude, sosp_h]}"),
        ("expand", "{widen: 2.0, seeds: [0, 1, 2]}"),
    ):
        section = getattr(recipe, name)
        if verb == name and section is None:
            yield f"{name}: missing; write {name}: {example}"
        if verb != name and section is not None:
            yield (
                f"{name}: this recipe is not for {verb}; run {command_name(name)} instead, "
                f"or add {name}=null"
            )


def dump_recipe(recipe: Recipe, *, whole: bool = True) -> str:
    """The recipe as YAML, from which ``load_recipe`` reads it again.

    Args:
        recipe: The recipe.
        whole: Write every key, not only those that were given.
    """
    record = recipe.model_dump(mode="json", exclude_unset=not whole)
    return yaml.safe_dump(record, sort_keys=False, default_flow_style=None)


class _Loader(LimitedLoader):
    """Plain YAML that refuses repeated keys, where 1e-3 is a number and ``no`` is a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                message = f"the key `{key.value}` is written twice; keep one of the two"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read(path: Path) -> str:
    source = str(path)
    if not path.exists():
        names = ", ".join(name for name in shipped_recipes() if "/" not in name)
        fault = (
            f"no such file, and no recipe of that name comes with the package ({names}); for a "
            "model without a recipe give --task and --data"
        )
        raise RecipeError(source, [fault])
    if path.is_dir():
        fault = (
            "is a folder; write the path of a recipe or, for the folder of a model, give --task "
            "and --data too"
        )
        raise RecipeError(source, [fault])
    try:
        return read_text(path, MOST_YAML_BYTES)
    except UnreadableError as error:
        fault = f"{error}; write the path of a recipe, which is YAML in UTF-8"
        raise RecipeError(source, [fault]) from None


def _parse(text: str, source: str) -> Any:
    try:
        return parse_yaml(text, _Loader)
    except UnreadableError as error:
        raise RecipeError(source, [str(error)]) from None


def _override(data: dict[str, Any], override: str) -> None:
    """Sets one key; raises ValueError with a fault."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"override {override!r}: expected key.path=value, such as budget.macs=0.3")
    try:
        value = _parse(text, override)
    except RecipeError as error:
        raise ValueError(f"override {override!r}: {error.faults[0]}") from None
    for key in keys[:-1]:
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise ValueError(
                f"override {override!r}: `{key}` holds {data!r} and has no keys of its own"
            )
    if keys == ["criterion", "name"]:
        for key in _options_of_another(data, value):
            del data[key]
    data[keys[-1]] = value


def _options_of_another(section: Mapping[str, Any], name: Any) -> set[str]:
    """Keys of ``criterion`` that were meant for the criterion that was there before ``name``."""
    if "name" in section:
        return set() if section["name"] == name else section.keys() - Criterion.model_fields.keys()
    known = CRITERIA.known()  # it was the task's, whichever that is
    own = known[name].model_fields.keys() if name in known else section.keys()
    return (section.keys() - own) & {key for each in known.values() for key in each.model_fields}
