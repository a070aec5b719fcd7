"""What can be reached and what to write when it cannot: local paths and the hub."""

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sosp_hub.errors import HubError, SospHubError

_UNREACHABLE = (
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "TransportError",
)
_UNKNOWN = (
    "GatedRepoError",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "DatasetNotFoundError",
)


def nearest_existing(path: Path) -> Path:
    """The deepest folder above ``path`` that exists."""
    path = path.expanduser().absolute()
    return next((parent for parent in path.parents if parent.exists()), Path(path.anchor))


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path, since no hub id is written like that."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


@contextmanager
def reaching_hub(section: str, name: str) -> Iterator[None]:
    """Turns what the hub's clients raise into a `HubError` that says what to do; other errors pass.

    Asks first whether the hub answers at all: the clients would repeat each request for half a
    minute.

    Args:
        section: ``model`` or ``data``: the section of the recipe that names it.
        name: The hub id.
    """
    if not hub_answers():
        raise HubError(_offline_advice(section, name))
    try:
        yield
    except SospHubError:
        raise
    except Exception as error:
        kinds = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
        if kinds.intersection(_UNKNOWN):
            raise HubError(
                f"{section}.id: the hub has no {name!r} (at this revision) that you can "
                f"access. Check the spelling and `{section}.revision`; for a private or gated "
                "repository log in with `hf auth login`. No local folder has this name either."
            ) from error
        if kinds.intersection(_UNREACHABLE):
            raise HubError(_offline_advice(section, name)) from error
        raise


def hub_is_off() -> bool:
    """Whether the user turned the hub off with ``HF_HUB_OFFLINE``."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def only_cached() -> bool:
    """Whether nothing but the cache is at hand: the hub is turned off, or does not answer.

    To be asked before the hub's clients are, which repeat each request for half a minute.
    """
    return hub_is_off() or not hub_answers()


def hub_answers() -> bool:
    """Whether anything answers at the hub's address; also where the hub is turned off."""
    if hub_is_off():
        return True  # nothing will be asked; the cache may have it
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    for _ in range(2):
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError as error:
            # Anything but a dead line (a proxy, a certificate) is for the hub's client to judge.
            reason = getattr(error, "reason", error)
            if not isinstance(reason, socket.gaierror | ConnectionError | TimeoutError):
                return True
    return False


def _offline_advice(section: str, name: str) -> str:
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    other = "`model.path=FOLDER`" if section == "model" else "`data.path=FOLDER_OR_FILE`"
    if hub_is_off():
        return (
            f"{section}.id: {name!r} is not in the cache in {cache}, and offline mode keeps the "
            f"hub from being asked: unset HF_HUB_OFFLINE, or give a local copy ({other})."
        )
    return (
        f"{section}.id: {name!r} is not on this disk and the hub cannot be reached. Offline, "
        f"either give a local copy ({other}), or, where {name!r} was downloaded before, set "
        f"HF_HUB_OFFLINE=1 to use the cache in {cache} (HF_HOME moves it)."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:  # causes may go round in a circle
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
