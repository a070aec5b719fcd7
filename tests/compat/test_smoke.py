"""Every name that a library does not promise does what it is used for, and is smoke-tested."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import sosp_hub.compat
from sosp_hub.compat import smoke

FOLDER = Path(inspect.getfile(sosp_hub.compat)).parent
RENAMED = {
    *("BatchNorm", "Convolution", "DispatchMode", "RunningNorm", "TensorTable", "aten"),
}
TESTS = [test for library in smoke.LIBRARIES for test in smoke.smoke_tests(library)]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: f"{test.library}-{test.run.__name__}")
def test_the_library_does_what_it_is_used_for(test):
    test.run()


@pytest.mark.parametrize("library", smoke.LIBRARIES)
def test_every_name_has_a_smoke_test(library):
    names = {
        name
        for name, value in vars(import_module(f"sosp_hub.compat.{library}")).items()
        if not name.startswith("_")
        and (
            getattr(value, "__module__", "") == f"sosp_hub.compat.{library}"
            or isinstance(value, str | frozenset)
            or name in RENAMED
        )
    }
    tree = ast.parse((FOLDER / "smoke" / f"{library}.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "compat"
    }
    assert names
    assert names - used == set()


def test_every_module_has_smoke_tests():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "versions"}
    assert modules == set(smoke.LIBRARIES)


def test_a_library_that_cannot_be_imported_has_a_test_that_says_so():
    (test,) = smoke.smoke_tests("no_such_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        test.run()
