"""What holds for the package as a whole."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import sosp_hub

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "timm", "datasets", "accelerate", "sklearn", "matplotlib")


@pytest.mark.parametrize(
    "module",
    ["sosp_hub", "sosp_hub.plan", "sosp_hub.errors", "sosp_hub.recipe.schema", "sosp_hub.types"],
)
def test_an_import_that_must_be_cheap_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", sosp_hub.__all__)
def test_every_public_name_is_there(name):
    assert callable(getattr(sosp_hub, name))
    assert name in dir(sosp_hub)


@pytest.mark.slow
def test_loading_a_name_leaves_random_numbers_as_they_were():
    code = (
        "import random, sys, sosp_hub; state = random.getstate(); "
        "[getattr(sosp_hub, name) for name in sosp_hub.__all__]; "
        "assert random.getstate() == state; assert 'rich.style' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tasks.OwnOutputs", "tasks.squared", "errors.PlanError"])
def test_public_rooms_need_no_import_of_their_own(name):
    code = f"import sosp_hub; print(sosp_hub.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [name.partition(".")[2]], done.stderr


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(AttributeError, match=r"'prune_it'.*allocate.*trace"):
        _ = sosp_hub.prune_it


def test_the_version_is_the_installed_one():
    assert sosp_hub.__version__ == metadata.version("sosp_hub")


def test_dependencies_have_lower_bounds_and_no_upper_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert len(wanted) > 20
    for requirement in (each.partition(";")[0] for each in wanted):
        assert ">=" in requirement, requirement
        assert not any(sign in requirement for sign in ("<", "==", "~=", "@", "://")), requirement


def test_the_version_stands_in_one_place():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    source = pyproject["tool"]["setuptools"]["dynamic"]["version"]
    assert source == {"attr": "sosp_hub.__version__"}
    citation = (ROOT / "CITATION.cff").read_text()
    assert not re.search(r"^version:", citation, re.MULTILINE)


def test_every_file_of_the_package_is_shipped():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / "sosp_hub"
    patterns = pyproject["tool"]["setuptools"]["package-data"]["sosp_hub"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert package / "py.typed" in shipped  # type checkers read the annotations
    assert {path for path in files if path.suffix != ".py"} == shipped
