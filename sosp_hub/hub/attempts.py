"""Asking a hub that may fail: what to try again and how long to wait, and what to tell the user."""

import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sosp_hub.compat.huggingface_hub import transport_error
from sosp_hub.errors import HubError
from sosp_hub.report.facts import without_tokens

Result = TypeVar("Result")
log = logging.getLogger(__name__)

_PASSING = (408, 425, 429, 500, 502, 503, 504)
CONFLICT = (409, 412)
_HINT_S = 10.0  # an error message does not wait longer
_TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Patience:
    """How often to try, and how long to wait in between.

    Attributes:
        attempts: Tries in all.
        first_wait_s: Wait after the first failure; doubled after each further one.
        longest_wait_s: Longest wait of its own; a hub that names a time in ``Retry-After`` gets it.
        longest_silence_s: A hub that neither sends nor takes anything for so long has failed.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    longest_silence_s: float = 100.0

    def wait(self, attempt: int, error: Exception, what: str) -> None:
        """Sleeps after a failed attempt (counted from 1)."""
        asked = _retry_after(error)
        own = min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1))
        seconds = asked if asked is not None else own * random.uniform(0.75, 1.25)
        log.warning(
            "%s: %s; attempt %d of %d, again in %.1f s",
            what,
            without_tokens(_first_line(error)),
            attempt,
            self.attempts,
            seconds,
        )
        time.sleep(seconds)


@contextlib.contextmanager
def answering_within(seconds: float) -> Iterator[None]:
    """A time limit for the client, which has none of its own and would wait for ever.

    Its one session serves the whole process, so the limit is counted: the last to leave takes it
    off.

    Args:
        seconds: Longest time without a byte in either direction.
    """
    session = get_session()
    with _LOCK:
        depth, before = _LIMITED.get(id(session), (0, session.timeout))
        _LIMITED[id(session)] = (depth + 1, before)
        session.timeout = seconds
    try:
        yield
    finally:
        with _LOCK:
            depth, before = _LIMITED.pop(id(session))
            if depth > 1:
                _LIMITED[id(session)] = (depth - 1, before)
            else:
                session.timeout = before


_LOCK = threading.Lock()
_LIMITED: dict[int, tuple[int, Any]] = {}


def persistently(call: Callable[[], Result], what: str, patience: Patience) -> Result:
    """The result of a call that may be repeated, tried again after failures that pass."""
    for attempt in range(1, patience.attempts):
        try:
            with answering_within(patience.longest_silence_s):
                return call()
        except Exception as error:
            if not is_passing(error):
                raise
            patience.wait(attempt, error, what)
    with answering_within(patience.longest_silence_s):
        return call()


def status_of(error: BaseException) -> int | None:
    """HTTP status behind an error, wherever the client has wrapped it; None if no answer came."""
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return link.response.status_code
    return None


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help: an overloaded hub, a cut connection, a gateway's page."""
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    return any(isinstance(link, _cut_connections()) for link in _chain(error))


def explain(error: Exception, repo_id: str, api: HfApi) -> HubError:
    """The error in words that say what to do. Never holds a token."""
    words = without_tokens(_words(error, repo_id, api))
    secret = api.token if isinstance(api.token, str) else None
    return HubError(words.replace(secret, "[token removed]") if secret else words)


def _words(error: Exception, repo_id: str, api: HfApi) -> str:
    status = status_of(error)
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return f"{repo_id}: offline mode is on; unset HF_HUB_OFFLINE to reach {api.endpoint}"
    if isinstance(error, LocalTokenNotFoundError):
        return no_token(repo_id)
    if status == 401 and not _is_missing(error):
        return (
            f"{repo_id}: the hub does not accept the token (it is wrong, expired or was revoked); "
            f"make a new one at {_TOKENS} and run `hf auth login`"
        )
    if status in (401, 403):
        return f"{repo_id}: {_role_hint(repo_id, api)}"
    if any(isinstance(link, RevisionNotFoundError) for link in _chain(error)):
        return f"{repo_id}: the hub has no such revision ({_first_line(error)})"
    if any(isinstance(link, RepositoryNotFoundError) for link in _chain(error)):
        return f"{repo_id}: no such repository, or a private one that the token cannot see"
    if status in _PASSING:
        return f"{repo_id}: the hub answered {status} at every attempt; try again later"
    if status is not None:
        return f"{repo_id}: the hub answered {status}: {_first_line(error)}"
    if is_passing(error):
        return (
            f"{repo_id}: {api.endpoint} cannot be reached ({type(error).__name__}); check the "
            "network and HF_ENDPOINT, or keep the folder and push later"
        )
    lines = dict.fromkeys(_first_line(link) for link in _chain(error))
    return f"{repo_id}: {' / '.join(lines)}"


def no_token(repo_id: str) -> str:
    """What to do where nobody is logged in."""
    return (
        f"{repo_id}: no token was found; make one with write access at {_TOKENS} and run "
        "`hf auth login`, or set HF_TOKEN"
    )


def _role_hint(repo_id: str, api: HfApi) -> str:
    """Why the token may not write, as far as the hub says who it belongs to."""
    try:
        with answering_within(_HINT_S):
            me = api.whoami()
    except Exception as error:  # noqa: BLE001 - the hint is an extra; the refusal itself is told
        log.debug("whoami failed: %s", type(error).__name__)
        return f"the token may not write here; make one with write access at {_TOKENS}"
    owner = repo_id.partition("/")[0]
    return lacks(me, repo_id) or (
        f"the token of {me['name']!r} (role {_role(me)!r}) may not write here; "
        f"give it write access to {owner!r} at {_TOKENS}"
    )


def lacks(me: Mapping[str, Any], repo_id: str) -> str | None:
    """Why the owner of a token cannot write to a repository; None where nothing speaks against it.

    Args:
        me: What the hub says of the token (``whoami``).
        repo_id: ``NAMESPACE/NAME``.
    """
    owner, _, name = repo_id.partition("/")
    if owner not in [me["name"], *(org["name"] for org in me.get("orgs", []))]:
        return (
            f"the token belongs to {me['name']!r}, who may not write to {owner!r}; "
            f"use {me['name']}/{name}, or ask to join the organisation"
        )
    if _role(me) == "read":
        return f"the token of {me['name']!r} only reads; make one with write access at {_TOKENS}"
    return None


def _role(me: Mapping[str, Any]) -> str:
    return ((me.get("auth") or {}).get("accessToken") or {}).get("role", "unknown")


def _is_missing(error: BaseException) -> bool:
    return any(isinstance(link, RepositoryNotFoundError) for link in _chain(error))


def _cut_connections() -> tuple[type[Exception], ...]:
    """Errors of the transport below the client, whichever HTTP library this client uses."""
    return (transport_error(), ConnectionError, TimeoutError, json.JSONDecodeError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _retry_after(error: BaseException) -> float | None:
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            value = link.response.headers.get("Retry-After", "").strip()
            return float(value) if value.isdigit() else None
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
