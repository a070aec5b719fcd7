"""Modules that are run as a command and called as a function under one name."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Lets ``sosp_hub.export(...)`` work although ``sosp_hub.export`` is also the command's module.

    Args:
        name: ``__name__`` of the module.
        function: What a call of it does.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    CallableModule.__doc__ = function.__doc__
    if name in sys.modules and name != "__main__":
        sys.modules[name].__class__ = CallableModule
