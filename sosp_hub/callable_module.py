"""Modules that are run as a command and called as a function under one name."""

import inspect
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

    if name in sys.modules and name != "__main__":
        module: Any = sys.modules[name]
        module.__class__ = CallableModule
        module.__doc__ = function.__doc__  # what help() and notebooks show
        module.__signature__ = inspect.signature(function)
