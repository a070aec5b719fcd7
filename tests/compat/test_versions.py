"""What was tested is declared once, and what is newer is said once."""

import importlib.metadata
import json
import logging
import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from sosp_hub.compat import versions
from sosp_hub.compat.smoke import LIBRARIES
from tests.compat import constraints

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = resources.files("sosp_hub.compat").joinpath("tested.json")


def pins():
    lines = constraints.FILE.read_text().splitlines()
    pairs = [line.partition("==")[::2] for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_constraints_hold_one_version_of_each_package_and_no_address():
    text = constraints.FILE.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert text.startswith(constraints.HEAD)
    assert len(lines) == len(pins()) > 80
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
        assert not line.startswith(constraints.LEFT_OUT), line


def test_constraints_can_be_installed_with_the_oldest_python_that_is_promised():
    """Debian 12 has 3.11.2; a package may ask for more of the same minor version."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asks = {
        name: metadata.get("Requires-Python", "")
        for name, version in pins().items()
        if (metadata := metadata_of(name)) and metadata["Version"] == version
    }
    assert len(asks) > 80
    assert {name for name, asked in asks.items() if oldest not in SpecifierSet(asked)} == set()


def metadata_of(name):
    try:
        return importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_constraints_hold_all_that_is_asked_for():
    extras = PROJECT["optional-dependencies"].values()
    asked = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    for line in asked:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), line


def test_the_package_says_what_was_tested(regenerate):
    names = [Requirement(line).name for line in PROJECT["dependencies"]]
    expected = {name: pins()[canonicalize_name(name)] for name in names}
    if regenerate:
        Path(str(TESTED)).write_text(json.dumps(expected, indent=1) + "\n")
    assert versions.tested() == expected
    assert set(LIBRARIES) <= expected.keys()


def test_what_is_new_is_tried_from_an_empty_cache_and_what_is_checked_is_constrained():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert "schedule" in workflow[True]  # YAML 1.1 reads `on` so
    jobs = workflow["jobs"]
    steps = {name: json.dumps(job["steps"]) for name, job in jobs.items()}
    for job in ("newest", "lower-bounds"):
        assert "actions/cache" not in steps[job]
        assert "constraints.txt" not in steps[job]
    included = jobs["newest"]["strategy"]["matrix"]["include"]
    assert [each["options"] for each in included] == ["", "--pre"]
    assert "constraints.txt" in steps["checks"]
    command = "pip install -e '.[test]' -c constraints.txt && pytest"
    assert command in (ROOT / "README.md").read_text()
    assert "--constraint constraints.txt" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def said(monkeypatch, caplog):
    """What is said when these versions are installed."""

    def say(**found):
        monkeypatch.setattr(versions, "installed", lambda name: found.get(name))
        versions.tell_newer.cache_clear()
        with caplog.at_level(logging.WARNING, "sosp_hub"):
            versions.tell_newer()
            versions.tell_newer()
        return [record.getMessage() for record in caplog.records]

    yield say
    versions.tell_newer.cache_clear()


def test_newer_libraries_are_told_in_one_line(said):
    known = versions.tested()
    newer = f"{Version(known['timm']).major + 1}.0"
    (line,) = said(**{**known, "timm": newer, "torch": "99.0.0a1+cpu"})
    assert f"timm {newer} (tested: {known['timm']})" in line
    assert "torch 99.0.0a1+cpu" in line
    assert "transformers" not in line
    assert "python -m sosp_hub.doctor" in line


def test_nothing_is_told_of_what_was_tested_and_of_what_is_older(said):
    known = versions.tested()
    build = f"{known['torch']}+cu130"
    assert said(**{**known, "torch": build, "timm": "1.0.20", "accelerate": "unknown"}) == []


def test_tracing_saving_and_loading_tell_it(monkeypatch, tmp_path):
    """Whichever comes first."""
    import torch
    from torch import nn

    import sosp_hub
    from sosp_hub.errors import SospHubError

    told = []
    for module in ("structure.trace", "checkpoint.io", "cut"):
        monkeypatch.setattr(f"sosp_hub.{module}.tell_newer", lambda: told.append(1))
    sosp_hub.trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), (torch.zeros(1, 2),))
    assert len(told) == 1
    for call in (
        lambda: sosp_hub.save_pretrained("model", tmp_path / "a"),
        lambda: sosp_hub.from_pretrained(tmp_path),
    ):
        before = len(told)
        with pytest.raises(SospHubError):
            call()
        assert len(told) > before
