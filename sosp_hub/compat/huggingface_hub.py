"""What the package uses of huggingface_hub and huggingface_hub does not promise."""

import dataclasses
import importlib
import sys
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.utils import sha


def git_hash(data: bytes) -> str:
    """The id that git gives a file of this content."""
    return sha.git_hash(data)


def transport_error() -> type[Exception]:
    """Base of the errors of whichever HTTP library the client uses."""
    return _http_library().TransportError


def byte_stream() -> type[Any]:
    """Base of what the client reads the body of an answer from."""
    return _http_library().SyncByteStream


def _http_library() -> Any:
    return importlib.import_module(type(get_session()).__module__.partition(".")[0])


MIXIN_STEPS = ("save_pretrained", "_from_pretrained", "_load_as_safetensor")
"""What of ``PyTorchModelHubMixin`` can be exchanged: saving, building, loading the weight file."""


def get_mixin_step(name: str) -> Any:
    """One of `MIXIN_STEPS`, as the class holds it (``classmethod`` objects and all)."""
    return vars(_owner(name))[name]


def set_mixin_step(name: str, step: Any) -> None:
    """Puts another in the place of `get_mixin_step`."""
    setattr(_owner(name), name, step)


def is_mixin(model: Any) -> bool:
    """Whether a model, or a class, saves and loads itself by ``PyTorchModelHubMixin``."""
    cls = model if isinstance(model, type) else type(model)
    return _MIXIN in sys.modules and issubclass(cls, _mixin())


def mixin_config(model: Any) -> dict[str, Any] | None:
    """What such a model writes into its config; None for other models."""
    if not is_mixin(model):
        return None
    config: Any = model._hub_mixin_config
    named: dict[str, Any] = dataclasses.asdict(config) if hasattr(config, _FIELDS) else config or {}
    return dict(named)


_FIELDS = "__dataclass_fields__"
_MIXIN = "huggingface_hub.hub_mixin"


def _mixin() -> Any:
    return importlib.import_module(_MIXIN).PyTorchModelHubMixin


def _owner(name: str) -> type:
    return next(cls for cls in _mixin().__mro__ if name in vars(cls))
