"""The layer rules of pyproject.toml hold, and each of them is seen to fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

WRONG_IMPORTS = (
    # Rooms import downwards only
    ("sosp_hub.plan", "sosp_hub.structure.groups"),
    ("sosp_hub.structure.groups", "sosp_hub.surgery"),
    ("sosp_hub.structure.groups", "sosp_hub.zoo"),
    ("sosp_hub.criteria", "sosp_hub.surgery"),
    ("sosp_hub.zoo.loss", "sosp_hub.checkpoint"),
    # Plain data loads without torch
    ("sosp_hub.recipe.schema", "torch"),
    ("sosp_hub.errors", "transformers"),
)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    return subprocess.run(
        [*command, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package and its rules, to be broken."""
    shutil.copytree(
        ROOT / "sosp_hub", tmp_path / "sosp_hub", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_rules_hold(copy):
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout


def test_every_wrong_import_is_named(copy):
    for importer, imported in WRONG_IMPORTS:
        path = copy.joinpath(*importer.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        path.write_text(f"{path.read_text()}\nimport {imported}\n")
    done = lint_imports(copy)
    assert done.returncode == 1
    for importer, imported in WRONG_IMPORTS:
        assert f"{importer} -> {imported} (" in done.stdout, f"{importer} -> {imported} passed"


def test_a_new_room_has_to_be_placed(copy):
    (copy / "sosp_hub" / "utils.py").write_text('"""Odds and ends."""\n')
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "utils" in done.stdout
