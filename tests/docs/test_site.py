"""The pages: they build without a warning, and every block of code on them runs."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sosp_hub
from sosp_hub.__main__ import COMMANDS, main
from sosp_hub.recipe.load import as_recipe
from sosp_hub.recipe.shipped import shipped_recipes
from sosp_hub.recipe.targets import TARGETS
from tests.browser import ACCESS, needs_browser, open_in_browser
from tests.test_verbs import SMALL

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
WORKFLOW = {
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "ann/small",
    "GITHUB_REF_NAME": "main",
}
PAGES = [
    path
    for path in sorted([*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md")])
    if path.stem not in ("serving", "design")
]
ON_A_MODEL = ("quantise",)  # of a folder that is there: `test_pages` runs them
RUNS = [
    path for path in PAGES if "```python" in path.read_text("utf-8") and path.stem not in ON_A_MODEL
]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BASE = {
    "model": {"library": "timm", "id": "resnet18", "task": "image-classification"},
    "data": {"id": "x/y"},
}


def blocks(page, *languages):
    return [
        (language, text)
        for language, text in _BLOCK.findall(page.read_text("utf-8"))
        if language in languages
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as a workflow of somebody's fork builds it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-E", str(DOCS), str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, env={**os.environ, **WORKFLOW})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site):
    page = (site / "api.html").read_text("utf-8")
    missing = [name for name in sosp_hub.__all__ if f'id="sosp_hub.{name}"' not in page]
    assert missing == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["index", "api", "gallery", "search", "how-to/quality"])
def test_a_page_of_the_site_can_be_read_by_everybody(site, page, dark, tmp_path):
    faults, _ = open_in_browser(site / f"{page}.html", tmp_path, script=ACCESS, dark=dark)
    assert faults == []


@pytest.mark.slow
def test_pages_point_to_the_repository_of_the_workflow(site):
    pages = {page: page.read_text("utf-8") for page in site.rglob("*.html")}
    links = {link for text in pages.values() for link in re.findall(r'href="([^"]+)"', text)}
    files = {link for link in links if link.startswith("https://github.com/ann/small/")}
    assert len(files) > 15
    for link in files:
        kind, ref, path = link.removeprefix("https://github.com/ann/small/").split("/", 2)
        found = ROOT / path.partition("#")[0]
        assert ref == "main"
        assert found.is_dir() if kind == "tree" else found.is_file(), link
    badges = [link for link in links if link.startswith("https://colab.research.google.com/")]
    base = "https://colab.research.google.com/github/ann/small/blob/main/"
    assert sorted(ROOT / link.removeprefix(base) for link in badges) == NOTEBOOKS


@pytest.mark.parametrize("name", sosp_hub.__all__)
def test_every_public_name_has_an_example(name):
    """Doctests run them, but for those that train, or need a hub."""
    words = getattr(sosp_hub, name).__doc__
    assert "Example:" in words
    assert ">>> " in words


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNS, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__page__"}
    for number, (language, text) in enumerate(blocks(page, "python", "bash")):
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sosp"
            if arguments[0] == "prune":
                arguments += SMALL
            assert main(arguments) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_recipes_on_a_page_are_valid(page):
    for _, text in blocks(page, "yaml"):
        sections = {**yaml.safe_load(text)}
        verb = next((verb for verb in ("compare", "expand") if verb in sections), "prune")
        for name, keys in BASE.items():
            sections[name] = {**keys, **sections.get(name, {})}
        as_recipe(sections, [], verb)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_on_a_page_exist_and_so_do_their_options(page, capsys):
    """Also of those that are only shown, since they need a hub or several machines."""
    for _, text in blocks(page, "text"):
        for line in text.replace("\\\n", " ").splitlines():
            words = line.split()
            if words[:1] == ["sosp"]:
                verb, options = words[1], words[2:]
            elif "-m" in words and words[words.index("-m") + 1].startswith("sosp_hub."):
                at = words.index("-m") + 1
                verb, options = words[at].partition(".")[2], words[at + 1 :]
            else:
                continue
            assert verb in COMMANDS, line
            parser = importlib.import_module(f"sosp_hub.{verb}").command_parser()
            known = {name for action in parser._actions for name in action.option_strings}
            assert {word for word in options if word.startswith("--")} <= known, line


def test_every_target_has_a_section_and_a_link_from_the_first_page():
    pages = {name: (DOCS / f"{name}.md").read_text("utf-8") for name in ("serving", "index")}
    for name in TARGETS.known():
        anchor = f"to-{name.replace('_', '-')}"
        assert f"({anchor})=" in pages["serving"], name
        assert name == "deci" or f"(serving.md#{anchor})" in pages["index"], name  # it is mlx's


def test_the_gallery_has_every_card_with_the_recipe_to_start_from(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    tables = importlib.import_module("tables")
    page = tables.gallery()
    cards = [path.parent.name for path in (ROOT / "model_cards").glob("*/sosp_report.json")]
    assert len(cards) >= 5
    for name in cards:
        assert f"\n## {name}\n" in page
        (recipe,) = re.findall(rf"\n## {name}\n.*?`sosp recipes copy (\w+)`", page, re.DOTALL)
        assert recipe in shipped_recipes()


def test_every_page_is_in_a_table_of_contents_and_its_links_are_there():
    index = (DOCS / "index.md").read_text("utf-8")
    for page in [*PAGES, DOCS / "serving.md", DOCS / "design.md"]:
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or re.search(rf"^{name}$", index, re.MULTILINE), name
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in link and "_pictures/" not in link:
                assert (page.parent / link).exists(), f"{name}: {link}"
