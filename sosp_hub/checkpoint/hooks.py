"""Lets transformers, timm and ``PyTorchModelHubMixin`` load pruned checkpoints.

It begins when ``sosp_hub`` is imported, before or after these libraries. The environment variable
``SOSP_HUB_HOOKS=0`` leaves them alone.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SWITCH = "SOSP_HUB_HOOKS"
_HOOKED = {
    "transformers.modeling_utils": (
        "sosp_hub.checkpoint.transformers.load",
        "sosp_hub.checkpoint.transformers.own_save",
    ),
    "timm": ("sosp_hub.checkpoint.timm.load", "sosp_hub.checkpoint.timm.own_save"),
    "huggingface_hub.hub_mixin": ("sosp_hub.checkpoint.torch.own_save",),
}
"""Module of a library, and ours with ``hook()`` and ``unhook()`` for it."""


def enable() -> None:
    """Makes these libraries read pruned checkpoints, and write what belongs to a cut model.

    Example:
        >>> import sosp_hub
        >>> sosp_hub.enable()  # after a disable(); importing sosp_hub does the same
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name, ours in _HOOKED.items():
        if _is_loaded(name):
            _hook(ours)


def is_enabled() -> bool:
    """Whether libraries that are imported from now on will read pruned checkpoints."""
    return _FINDER in sys.meta_path


def disable() -> None:
    """Leaves these libraries as they come. Models that are already loaded keep working.

    Example:
        >>> import sosp_hub
        >>> sosp_hub.disable()  # AutoModel and timm.create_model read plain checkpoints alone
        >>> sosp_hub.enable()
    """
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for ours in (name for names in _HOOKED.values() for name in names):
        if ours in sys.modules:
            sys.modules[ours].unhook()


def complete(library: str) -> None:
    """Hooks into a library, if hooks are on, now that our first module for it is complete."""
    if is_enabled():
        _hook(_HOOKED[library])


class _Finder(MetaPathFinder):
    """Finds nothing itself; lets the others find, and runs our hook after the module."""

    def find_spec(
        self,
        fullname: str,
        path: Any = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _HOOKED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find and finder is not self else None
            if spec is not None:
                if (execute := getattr(spec.loader, "exec_module", None)) is not None:
                    spec.loader.exec_module = _then_hook(execute, _HOOKED[fullname])
                return spec
        return None


def _then_hook(
    execute: Callable[[ModuleType], None], ours: Sequence[str]
) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        if is_enabled():
            _hook(ours)

    return exec_module


def _hook(ours: Sequence[str]) -> None:
    for name in ours:
        hook = getattr(importlib.import_module(name), "hook", None)
        if hook is None:  # our module is what imports the library; it says when it is `complete`
            return
        hook()


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


_FINDER = _Finder()

if os.environ.get(_SWITCH, "1") != "0":
    enable()
