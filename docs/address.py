"""Where the repository lies, as GitHub's workflows say it; links and badges are made of it.

No address stands in the repository, so that a fork's pages and releases point to the fork. Before a
release is built, ``python docs/address.py`` makes README.md's links absolute and gives
pyproject.toml its project URLs, in place: the page of a package has no folders beside it.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath

ROOT = Path(__file__).resolve().parents[1]
# [text](target) of Markdown, where the target is no address and no place on the same page
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_COLAB = "https://colab.research.google.com"


@dataclass(frozen=True)
class Address:
    """A repository at one commit, tag or branch."""

    server: str
    """Such as https://github.com."""
    repository: str
    """OWNER/NAME."""
    ref: str

    @property
    def home(self) -> str:
        """Its first page."""
        return f"{self.server}/{self.repository}"

    def page(self, path: str) -> str:
        """Of a file or folder, by its path in the repository."""
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{self.home}/{kind}/{self.ref}/{path}"

    def badge(self, notebook: str) -> str:
        """Opens a notebook in Colab; Markdown."""
        url = f"{_COLAB}/github/{self.repository}/blob/{self.ref}/{notebook}"
        return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({url})"

    def absolute(self, text: str, folder: str = "", outside: str = "") -> str:
        """Markdown of a file in ``folder`` whose links to files are addresses.

        Those into the folder ``outside`` stay as they are: a site has them as pages.
        """

        def changed(link: re.Match[str]) -> str:
            path = normpath(f"{folder}/{link[1]}".lstrip("/"))
            if outside and f"{path}/".startswith(f"{outside}/"):
                return link[0]
            return f"]({self.page(path)}{link[2] or ''})"

        return _LINK.sub(changed, text)


def address() -> Address | None:
    """Of the workflow that runs; None elsewhere."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_REF_NAME")
    server, repository, ref = (os.environ.get(name, "") for name in names)
    return Address(server, repository, ref) if server and repository and ref else None


def project_urls(at: Address) -> str:
    """A table of pyproject.toml."""
    owner, _, name = at.repository.partition("/")
    urls = {
        "Documentation": f"https://{owner}.github.io/{name}",
        "Source": at.home,
        "Issues": f"{at.home}/issues",
        "Changelog": at.page("CHANGELOG.md"),
    }
    return "\n".join(["[project.urls]", *(f'{key} = "{url}"' for key, url in urls.items()), ""])


def main() -> int:
    """Changes README.md and pyproject.toml; 1 where there is no workflow to ask."""
    at = address()
    if at is None:
        sys.stderr.write("no address: GITHUB_SERVER_URL, GITHUB_REPOSITORY, GITHUB_REF_NAME\n")
        return 1
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    readme.write_text(at.absolute(readme.read_text("utf-8")), encoding="utf-8")
    table = project.read_text("utf-8")
    if "[project.urls]" not in table:
        project.write_text(f"{table.rstrip()}\n\n{project_urls(at)}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
