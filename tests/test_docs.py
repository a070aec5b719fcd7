"""What documents and the files around the code say is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sosp_hub

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/design.md", "recipes/README.md")
PARTS = r"recipes|tests|sosp_hub|docs|model_cards"
PATHS = rf"\]\(([^)#:]+)\)|((?<![\w/.])(?:{PARTS})/[\w./]+)|(\.(?:ci|github)/[\w./]+)"


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document):
    path = ROOT / document
    named = set()
    for link, of_root, hidden in re.findall(PATHS, path.read_text("utf-8")):
        place = path.parent / link if link else ROOT / (of_root or hidden).rstrip(".")
        if "NAME" not in place.name:
            named.add(place)
    assert len(named) > 5
    assert [str(place) for place in sorted(named) if not place.exists()] == []


def test_the_rooms_of_the_design_are_those_of_the_contract():
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    (rooms,) = (contract for contract in contracts if contract["id"] == "rooms")
    wanted = [set(re.findall(r"\w+", layer)) for layer in rooms["layers"]]
    text = (ROOT / "docs/design.md").read_text("utf-8")
    table = text.partition("| rooms, from the top |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == wanted


def test_the_names_in_the_design_are_those_of_the_code():
    text = (ROOT / "docs/design.md").read_text("utf-8")
    code = "\n".join(path.read_text("utf-8") for path in ROOT.glob("sosp_hub/**/*.py"))
    named = set(re.findall(r"`@?([A-Z]\w+(?:\.\w+)?)`", text))
    assert {"CRITERIA.declare", "TARGETS.declare", "DataSection"} <= named
    assert {name for name in named if name not in code} == set()
    assert set(re.findall(r"\bsosp_hub\.(\w+)\(", text)) <= set(sosp_hub.__all__)


FILES = [*sorted(ROOT.glob(".github/**/*.yml")), ROOT / ".pre-commit-config.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_the_repository_is_yaml(path):
    assert yaml.safe_load(path.read_text("utf-8"))


def test_issue_templates_ask_for_what_a_bug_needs():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text("utf-8"))
    fields = {field["id"]: field for field in form["body"]}
    assert {"model", "versions", "graph", "reproduce"} <= fields.keys()
    assert "python -m sosp_hub.doctor" in fields["versions"]["attributes"]["label"]


def test_a_release_needs_no_token():
    text = (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets" not in text


def test_hooks_run_what_the_checks_run():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    checks = (ROOT / ".ci/run").read_text("utf-8")
    assert [repo["repo"] for repo in config["repos"]] == ["local"]  # nothing is fetched
    for hook in config["repos"][0]["hooks"]:
        assert hook["entry"].removesuffix(" --fix") in checks
