"""Takes the cards of finished runs into this folder and writes its index.

python model_cards/collect.py runs/quickstart [...]     add or replace cards
python model_cards/collect.py                           render all cards and the index again
"""

import shutil
import sys
from pathlib import Path

from sosp_hub.report.card import render_card
from sosp_hub.report.facts import collect, overall_metrics
from sosp_hub.report.numbers import metric_value
from sosp_hub.report.schema import read_report

HERE = Path(__file__).parent
_KEPT = (
    "README.md",
    "config.json",
    "sosp_report.json",
    "saliency.safetensors",
    "tokenizer_config.json",
)
_HEAD = """\
# Model cards

Cards of real runs of the recipes in [`recipes/`](../recipes), as a run writes them beside its
weights. Written by `python model_cards/collect.py`; the tests render each again and compare.

| card | parameters | MACs | metric | dense | pruned |
|---|---:|---:|---|---:|---:|
"""


def cards(folder: Path = HERE) -> list[Path]:
    """Folders of the cards."""
    return sorted(path.parent for path in folder.glob("*/sosp_report.json"))


def add(run: Path, folder: Path = HERE) -> Path:
    """Takes the card of a run, without its weights."""
    target = folder / run.name
    target.mkdir(exist_ok=True)
    for name in _KEPT:
        if (run / name).is_file():
            shutil.copyfile(run / name, target / name)
    render(target)
    return target


def render(card: Path) -> str:
    """The card and its figures once more, from the report."""
    return render_card(card, run=False).read_text(encoding="utf-8")


def index(folder: Path = HERE) -> str:
    """The index page: one row a card."""
    return _HEAD + "".join(_row(card) for card in cards(folder))


def _row(card: Path) -> str:
    report = read_report(card) or {}
    costs = {name: change for name, _, _, change in collect(report).costs.rows}
    name = overall_metrics(report["metrics"])[0]
    dense, final = (report["metrics"][stage][name]["value"] for stage in ("dense", "final"))
    macs = next((change for row, change in costs.items() if row.startswith("Multiply")), "")
    cells = [f"[{card.name}]({card.name}/README.md)", costs.get("Parameters", ""), macs, name]
    cells += [metric_value(name, value) for value in (dense, final)]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        add(Path(argument))
    for path in cards():
        render(path)
    (HERE / "README.md").write_text(index(), encoding="utf-8")
