"""The examples run, at small size, from an empty folder; so do their notebooks."""

import importlib
import json
import runpy
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_from_top_to_bottom(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMALL", "1")
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    (saved,) = (tmp_path / "out").iterdir()
    assert (saved / "model.safetensors").is_file()
    assert "model.safetensors" in capsys.readouterr().out  # what a push would send


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("notebooks")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(example, notebooks):
    """`python docs/notebooks.py` writes them anew."""
    assert example.with_suffix(".ipynb").read_text("utf-8") == notebooks.written(example)
    cells = notebooks.notebook(example.read_text("utf-8"))["cells"]
    code = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    kept = {line.strip() for line in code}
    tree = example.read_text("utf-8").split("# %% ", 1)[1].splitlines()[1:]
    assert [line for line in tree if line.strip() not in kept and line[:4] != "# %%"] == []


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_runs_cell_by_cell(example, tmp_path, monkeypatch):
    """As Colab runs it: three words on the command line, and no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMALL", "1")
    monkeypatch.setattr(sys, "argv", ["colab_kernel_launcher.py", "-f", "kernel.json"])
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for cell in json.loads(example.with_suffix(".ipynb").read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and not text.startswith("%pip"):
            exec(compile(text, f"{example.stem}, {cell['id']}", "exec"), main.__dict__)
    (saved,) = (tmp_path / "out").iterdir()
    assert (saved / "model.safetensors").is_file()


def test_there_are_examples():
    assert len(EXAMPLES) == 5
