"""What the package uses of huggingface_hub and huggingface_hub does not promise."""

import importlib

from huggingface_hub import get_session
from huggingface_hub.utils import sha


def git_hash(data: bytes) -> str:
    """The id that git gives a file of this content."""
    return sha.git_hash(data)


def transport_error() -> type[Exception]:
    """Base of the errors of whichever HTTP library the client uses."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return library.TransportError
