"""The recipes that come with the package, by name."""

import functools
from importlib import metadata
from pathlib import Path

_INSTALLED = "share/sosp_hub/recipes/"  # in a wheel; pyproject.toml says the same


@functools.cache
def shipped_recipes() -> dict[str, Path]:
    """Names, such as ``quickstart`` or ``studies/vit_fashion_mnist``, and files."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        folder = checkout / "recipes"
        return {
            path.relative_to(folder).with_suffix("").as_posix(): path
            for path in sorted(folder.rglob("*.yaml"))
            if "results" not in path.parts
        }
    try:
        files = metadata.files("sosp_hub") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for file in sorted(files):
        _, installed, name = file.as_posix().partition(_INSTALLED)
        if installed and name.endswith(".yaml"):
            found[name.removesuffix(".yaml")] = Path(str(file.locate())).resolve()
    return found


def find_recipe(given: str | Path) -> Path:
    """The file of a recipe: a path, or where there is no such file the name of a shipped one."""
    path = Path(given)
    if path.exists():
        return path
    name = path.as_posix().removesuffix(".yaml")
    return shipped_recipes().get(name.removeprefix("recipes/"), path)
