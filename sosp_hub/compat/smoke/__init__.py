"""Smoke tests: whether each name that a library does not promise still does what it is used for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

LIBRARIES = ("torch", "transformers", "timm", "huggingface_hub", "accelerate")
"""Those with a module in `sosp_hub.compat`."""

Run = Callable[[], None]


@dataclass(frozen=True)
class Smoke:
    """One test of a library.

    Attributes:
        library: Whose names it tests.
        breaks: What of this package would no longer work.
        run: Raises where the library does something else.
    """

    library: str
    breaks: str
    run: Run


_SMOKE: list[Smoke] = []


def smoke(breaks: str) -> Callable[[Run], Run]:
    """Registers a smoke test of the library that its module is named for.

    Args:
        breaks: What would break.
    """

    def register(run: Run) -> Run:
        _SMOKE.append(Smoke(run.__module__.rpartition(".")[2], breaks, run))
        return run

    return register


def smoke_tests(library: str) -> tuple[Smoke, ...]:
    """The smoke tests of a library; a library whose names cannot even be imported has one."""
    try:
        importlib.import_module(f"sosp_hub.compat.smoke.{library}")
    except Exception as error:  # noqa: BLE001 - the test that stands for them raises it
        failure = error

        def run() -> None:
            raise failure

        return (Smoke(library, "everything that uses it", run),)
    return tuple(test for test in _SMOKE if test.library == library)


def expect(holds: object, otherwise: str) -> None:
    """Fails a smoke test.

    Args:
        holds: What must be true.
        otherwise: What was seen instead.
    """
    if not holds:
        raise AssertionError(otherwise)
