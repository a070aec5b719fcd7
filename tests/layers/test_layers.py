"""The layer rules of pyproject.toml hold, and each of them is seen to fail."""

import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent.parent

WRONG_IMPORTS = (
    # Rooms import downwards only
    ("sosp_hub.plan", "sosp_hub.structure.groups"),
    ("sosp_hub.structure.groups", "sosp_hub.surgery"),
    ("sosp_hub.structure.groups", "sosp_hub.zoo"),
    ("sosp_hub.criteria", "sosp_hub.surgery"),
    ("sosp_hub.tasks.loss", "sosp_hub.checkpoint"),
    ("sosp_hub.recipe.schema", "sosp_hub.data"),
    ("sosp_hub.data.source", "sosp_hub.distributed"),
    ("sosp_hub.structure.groups", "sosp_hub.cost"),
    ("sosp_hub.allocation", "sosp_hub.criteria"),
    ("sosp_hub.evaluate", "sosp_hub.training"),
    ("sosp_hub.push", "sosp_hub.prune"),
    # What cuts, trains and publishes never asks what decides
    ("sosp_hub.report.card", "sosp_hub.criteria"),
    ("sosp_hub.training", "sosp_hub.gates"),
    # Only the zoo and the checkpoints know timm and transformers
    ("sosp_hub.surgery.apply", "timm"),
    ("sosp_hub.gates", "transformers"),
    # Deciding and cutting know nothing of processes
    ("sosp_hub.derivatives", "accelerate"),
    # Criteria never import each other
    ("sosp_hub.criteria.sosp_h", "sosp_hub.criteria.taylor"),
    # Plain data loads without torch
    ("sosp_hub.recipe.schema", "torch"),
    ("sosp_hub.errors", "transformers"),
)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},  # no line is broken
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


CIRCLES = (  # an import that closes a circle inside a room, and the function around it
    ("sosp_hub.report.numbers", "sosp_hub.report.card", "def late():\n    "),
    ("sosp_hub.surgery.layers", "sosp_hub.surgery.apply", ""),
    # through rooms: format is below timm
    ("sosp_hub.checkpoint.format.delta", "sosp_hub.checkpoint.timm.load", "def late():\n    "),
)


@pytest.mark.parametrize(("importer", "imported", "around"), CIRCLES)
def test_a_circle_is_named(copy, importer, imported, around):
    path = copy.joinpath(*importer.split(".")).with_suffix(".py")
    path.write_text(f"{path.read_text()}\n{around}import {imported}\n")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "No cycles are allowed in sosp_hub." in done.stdout


def test_no_circle_runs_through_what_a_package_loads():
    """The contract compares neighbours, and a package's own file has none."""
    graph = grimp.build_graph("sosp_hub", exclude_type_checking_imports=True, cache_dir=None)
    imports = {file: graph.find_modules_directly_imported_by(file) for file in graph.modules}
    assert len(imports) > 100
    graphlib.TopologicalSorter(imports).prepare()  # a CycleError names the files


def test_a_new_room_has_to_be_placed(copy):
    (copy / "sosp_hub" / "utils.py").write_text('"""Odds and ends."""\n')
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "utils" in done.stdout
