"""How the pages of this folder become a site: `sphinx-build -W docs OUT`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import pictures  # noqa: E402  drawn anew with each build
import tables  # noqa: E402

import sosp_hub  # noqa: E402

pictures.draw_all(HERE / "_pictures")
tables.write_all(HERE / "_generated")

project = "sosp_hub"
author = "the sosp_hub authors"
version = release = sosp_hub.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
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
