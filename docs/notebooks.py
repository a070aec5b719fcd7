"""Notebooks of the examples: `python docs/notebooks.py` writes them beside the scripts.

The script is the source. Its docstring and the titles behind ``# %%`` become text, what lies
between them cells of code.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_CELL = re.compile(r"^# %% (.*)\n", re.MULTILINE)


def notebook(script: str) -> dict[str, Any]:
    """The notebook (format 4.5) of a script with cells."""
    _, *rest = _CELL.split(script)
    cells = [
        _cell("markdown", "# " + description(script)),
        _cell("code", "%pip install -q sosp_hub"),
    ]
    for title, code in zip(rest[::2], rest[1::2], strict=True):
        cells += [_cell("markdown", f"## {title}"), _cell("code", code.strip())]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def description(script: str) -> str:
    """A script's docstring, without the command that runs it as a script."""
    return re.sub(r": `python [^`]*`\.", "", ast.get_docstring(ast.parse(script)) or "", count=1)


def _cell(kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": text.splitlines(True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def written(script: Path) -> str:
    """The file of a script's notebook."""
    return json.dumps(notebook(script.read_text("utf-8")), indent=1, ensure_ascii=False) + "\n"


def scripts() -> list[Path]:
    """The examples."""
    return sorted(EXAMPLES.glob("*.py"))


def main() -> None:
    """Writes all of them."""
    for script in scripts():
        script.with_suffix(".ipynb").write_text(written(script), encoding="utf-8")


if __name__ == "__main__":
    main()
