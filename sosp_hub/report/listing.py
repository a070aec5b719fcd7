"""The files of an output folder: their names, what each is, and how they are listed."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rich.console import Console

from sosp_hub.checkpoint.format.weight_files import is_weight_file
from sosp_hub.report import numbers
from sosp_hub.report.markup import escaped

CARD = "README.md"
PAGE = "report.html"
REPORT = "sosp_report.json"
SALIENCY = "saliency.safetensors"
CURVATURE = "curvature.safetensors"
RECIPE = "recipe.private.yaml"
"""The recipe with the paths of this machine, for --from-scores; it stays where it is."""
CALIBRATION = "calibration.safetensors"
DENSE = "dense"
"""Folder of the dense weights that a run made itself; they stay where they are."""

_WORDS: Mapping[str, str] = {
    CALIBRATION: "inputs of the rebuild, for any budget",
    CARD: "model card",
    CURVATURE: "correlations of structures",
    DENSE: "dense model, for --from-scores",
    PAGE: "the same as a page",
    REPORT: "plan, metrics, costs, timings, versions",
    RECIPE: "recipe with local paths; not published",
    SALIENCY: "scores of all structures",
    "config.json": "configuration",
    "figures": "kept widths, saliency, recovery",
    "results.csv": "a row for each cell",
    "results.json": "every number",
    "table.md": "tables and findings",
    "tokenizer.json": "tokenizer",
}
_NAME_WIDTH = 24
_WIDTH = 120  # of what is not shown in a terminal


def new_console(file: IO[str] | None = None) -> Console:
    """Where results are printed; nothing in their words is read as markup.

    Args:
        file: What is written to; None = standard output.
    """
    console = Console(file=file, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def show_files(console: Console, output: Path) -> None:
    """Prints the files of a finished output with their sizes."""
    console.out(escaped(f"{output}/", "terminal"), style="bold", highlight=False)
    for path in sorted(output.iterdir()):
        words = _WORDS.get(path.name, "weights" if is_weight_file(path.name) else "")
        size = numbers.size(path.stat().st_size) if path.is_file() else ""
        name = escaped(path.name + ("/" if path.is_dir() else ""), "terminal")
        line = f"  {name:<{_NAME_WIDTH}}{size:>9}  {words}"
        console.out(line.rstrip(), highlight=False)
