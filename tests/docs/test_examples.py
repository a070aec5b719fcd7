"""The examples run, at small size, from an empty folder."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


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


def test_there_are_examples():
    assert len(EXAMPLES) == 5
