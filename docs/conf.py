"""How the pages of this folder become a site: `sphinx-build -W docs OUT`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pictures  # noqa: E402  drawn anew with each build
import tables  # noqa: E402
from address import address  # noqa: E402

import sosp_hub  # noqa: E402

pictures.draw_all(HERE / "_pictures")
tables.write_all(HERE / "_generated")

project = "sosp_hub"
author = "the sosp_hub authors"
version = release = sosp_hub.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme_options = {"top_of_page_buttons": []}  # "view this page" stands outside of all landmarks
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"sosp_hub {version}"
html_static_path = []
html_show_copyright = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # attributes of docstrings are not described twice
napoleon_custom_sections = [("Differs from the paper", "notes")]
nitpicky = False
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, checked by a test

# What axe-core finds in the theme's own markup: (what it writes, what it should have written)
ACCESS = (
    ('<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'),
    ('<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="All pages">'),
    ('<aside class="toc-drawer">', '<aside class="toc-drawer" aria-label="On this page">'),
    (
        '<div class="table-wrapper ',
        '<div tabindex="0" class="table-wrapper ',
    ),  # they scroll sideways
    ("<pre>", '<pre tabindex="0">'),
    ('<div id="search-results">', '<h1>Search</h1><div id="search-results">'),
)


def point_to_the_repository(_app, page, text):
    """Links to files that are no pages go to the repository, where its address is known."""
    at = address()
    if at is not None:
        folder = (Path("docs") / page).parent.as_posix()
        text[0] = at.absolute(text[0], folder, outside="docs")


def mend_markup(app, fault):
    """Makes the pages right for readers of screens."""
    if fault is not None or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text("utf-8")
        for written, right in ACCESS:
            text = text.replace(written, right)
        page.write_text(text, encoding="utf-8")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", point_to_the_repository)
    app.connect("build-finished", mend_markup)
