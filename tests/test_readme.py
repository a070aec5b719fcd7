"""README and recipes/README tell the truth: code runs, tables are made from what is there.

`pytest tests/test_readme.py --regenerate` writes the tables anew.
"""

import re
from pathlib import Path

import pytest
import torch

import sosp_hub
from sosp_hub.cost import cost
from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.load import load_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured(path: Path) -> str:
    """Whether a recipe's header says what was measured."""
    header = path.read_text().split("\nmodel:")[0]
    (text,) = re.findall(r"^# measured:\s*(.*(?:\n#  .*)*)", header, re.MULTILINE)
    text = " ".join(re.sub(r"^#", "", text, flags=re.MULTILINE).split())
    return "not run" if text.startswith("not measured") else "in its header"


def recipe_table() -> str:
    rows = []
    for path in RECIPES:
        recipe = load_recipe(path)
        budget = ", ".join(
            f"scores from {share:g}" if name == "threshold" else f"{share:.0%} of {name}"
            for name, share in recipe.budget.targets().items()
        )
        data = recipe.data.id or recipe.data.path
        link = f"[{path.stem}]({path.name})"
        rows.append((link, f"`{recipe.model.id}`", f"`{data}`", budget, measured(path)))
    return table(("recipe", "model", "data", "keeps", "measured"), rows)


def criteria_table() -> str:
    rows = []
    for name, criterion in CRITERIA.known().items():
        what = criterion.summary().replace("``", "`")
        rows.append((f"`{name}`", what, criterion.needs, criterion.paper))
    return table(("criterion", "what it is", "needs", "paper"), rows)


@pytest.mark.slow
def test_the_ten_lines_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = code_blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(code, str(README), "exec"), names)
    graph, plan, images = names["graph"], names["plan"], names["images"]
    assert 0.4 < cost(graph, plan).macs / cost(graph).macs <= 0.5
    assert (tmp_path / "out/resnet18-small/model.safetensors").stat().st_size > 0
    loaded, cut = names["pruned"], sosp_hub.apply(names["model"], graph, plan)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), cut(images), rtol=0, atol=1e-6)


TABLES = {
    "recipes": (ROOT / "recipes/README.md", recipe_table),
    "criteria": (README, criteria_table),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_current(name, regenerate):
    path, make = TABLES[name]
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    text = path.read_text()
    before, rest = text.split(begin)
    found, after = rest.split(end)
    wanted = f"\n{make()}\n"
    if regenerate:
        path.write_text(f"{before}{begin}{wanted}{end}{after}")
    else:
        assert found == wanted, "run `pytest tests/test_readme.py --regenerate`"
