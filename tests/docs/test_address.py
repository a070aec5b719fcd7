"""A package's page has no folders beside it: its links and project addresses are whole."""

import importlib
import re
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/ann/small"


@pytest.fixture
def address(monkeypatch, tmp_path):
    """The module, beside a copy of the files that it changes."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("address")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in (path for path in ROOT.iterdir() if path.is_dir()):
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_REF_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


def as_workflow(monkeypatch):
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "ann/small")
    monkeypatch.setenv("GITHUB_REF_NAME", "v1.2")


def test_before_a_release_all_links_of_the_readme_are_addresses(address, monkeypatch, tmp_path):
    as_workflow(monkeypatch)
    assert address.main() == 0
    text = (tmp_path / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    before = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text("utf-8"))
    for old, link in zip(before, links, strict=True):
        if old.startswith(("#", "https://")):
            assert link == old
            continue
        kind = "tree" if (ROOT / old.partition("#")[0]).is_dir() else "blob"
        assert link == f"{HOME}/{kind}/v1.2/{old.rstrip('/')}"


def test_before_a_release_the_project_has_its_addresses_once(address, monkeypatch, tmp_path):
    as_workflow(monkeypatch)
    for _ in range(2):
        assert address.main() == 0
        project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))
    urls = project["project"].pop("urls")
    assert urls == {
        "Documentation": "https://ann.github.io/small",
        "Source": HOME,
        "Issues": f"{HOME}/issues",
        "Changelog": f"{HOME}/blob/v1.2/CHANGELOG.md",
    }
    assert project == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_without_a_workflow_nothing_changes(address, tmp_path, capsys):
    assert address.main() == 1
    assert "GITHUB_REPOSITORY" in capsys.readouterr().err
    for name in ("README.md", "pyproject.toml"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize(
    ("link", "page"),
    [
        ("[a](../../recipes)", f"[a]({HOME}/tree/v1.2/recipes)"),
        ("[a](../criteria.md#all)", "[a](../criteria.md#all)"),
        ("[a](https://x.org/y)", "[a](https://x.org/y)"),
        ("[a](#here)", "[a](#here)"),
        ("[a](mailto:ann@x.org)", "[a](mailto:ann@x.org)"),
        ("[a](../../README.md#use)", f"[a]({HOME}/blob/v1.2/README.md#use)"),
    ],
)
def test_links_out_of_the_pages_alone_change(address, monkeypatch, link, page):
    as_workflow(monkeypatch)
    assert address.address().absolute(link, "docs/how-to", outside="docs") == page


def test_a_release_is_built_with_addresses():
    steps = (ROOT / ".github/workflows/release.yml").read_text("utf-8")
    assert steps.index("python docs/address.py") < steps.index("python -m build")
