"""What the package uses of huggingface_hub and huggingface_hub does not promise."""

import importlib
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
