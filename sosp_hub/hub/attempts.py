"""Retries of calls to a hub: which failures to retry, how long to wait, and the error's words."""

import contextlib
import email.utils
import json
import logging
import math
import queue
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sosp_hub.compat.huggingface_hub import byte_stream, transport_error
from sosp_hub.errors import HubError

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
        longest_wait_s: Longest wait of its own.
        longest_asked_s: Longest wait that a hub gets that names one in ``Retry-After``.
        longest_silence_s: A hub that neither sends nor takes anything for so long has failed.
        longest_call_s: A call that takes longer has failed, but for the time of what it sends.
        least_bytes_per_s: What is sent may take as long as at this speed.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    longest_asked_s: float = 300.0
    longest_silence_s: float = 100.0
    longest_call_s: float = 900.0
    least_bytes_per_s: float = 20_000.0

    def wait(self, attempt: int, error: Exception, operation: str) -> None:
        """Sleeps after a failed attempt (counted from 1)."""
        asked = limited_wait(_retry_after(error), self.longest_asked_s)
        own = min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1))
        seconds = asked if asked is not None else own * random.uniform(0.75, 1.25)
        log.warning(
            "%s: %s; attempt %d of %d, again in %.1f s",
            operation,
            _brief(error),
            attempt,
            self.attempts,
            seconds,
        )
        time.sleep(seconds)

    @contextlib.contextmanager
    def limits(self) -> Iterator[None]:
        """Limits for the client, which has none: silence, bodies, and waits that a hub asks for.

        Its one session serves the whole process, so the limits are counted: the last to leave takes
        them off.
        """
        session = get_session()
        with _LOCK:
            depth, before, hooks = _LIMITED.get(
                id(session), (0, session.timeout, session.event_hooks)
            )
            _LIMITED[id(session)] = (depth + 1, before, hooks)
            session.timeout = self.longest_silence_s
            session.event_hooks = {
                "request": [*hooks.get("request", ()), _stop_if_given_up],
                "response": [*hooks.get("response", ()), self._limit_answer],
            }
        try:
            yield
        finally:
            with _LOCK:
                depth, before, hooks = _LIMITED.pop(id(session))
                if depth > 1:
                    _LIMITED[id(session)] = (depth - 1, before, hooks)
                else:
                    session.timeout, session.event_hooks = before, hooks

    def call(self, call: Callable[[], Result], num_bytes: int = 0) -> Result:
        """The result of a call, made within all limits.

        Args:
            call: Asks the hub.
            num_bytes: What it sends.

        Raises:
            TimeoutError: It takes too long, however busy the line is.
        """
        seconds = self.longest_call_s + num_bytes / self.least_bytes_per_s
        outcome: queue.SimpleQueue[tuple[Result | None, BaseException | None]]
        outcome = queue.SimpleQueue()

        given_up = threading.Event()

        def work() -> None:
            _CALL.given_up = given_up
            try:
                with self.limits():
                    outcome.put((call(), None))
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                outcome.put((None, error))

        # A thread, since nothing else ends a read that gets a byte a second. Where it is given up,
        # it ends with the next byte or request.
        threading.Thread(target=work, daemon=True, name="hub-call").start()
        try:
            result, error = outcome.get(timeout=seconds)
        except queue.Empty:
            given_up.set()
            raise TimeoutError(f"no whole answer within {seconds:.0f} s") from None
        if error is not None:
            raise error
        return cast("Result", result)

    def _limit_answer(self, response: Any) -> None:
        """Called by the client for each answer, before its body is read."""
        for name in ("retry-after", "ratelimit"):
            given = response.headers.get(name)
            if given is None:
                continue
            asked = given if name == "retry-after" else given.rpartition("t=")[2]
            wait = limited_wait(asked, self.longest_asked_s)
            if wait != limited_wait(asked, math.inf):
                log.warning("the hub asks to wait %.20s s; waiting %g s", asked, wait)
            if name == "ratelimit" and wait != self.longest_asked_s:
                continue
            response.headers.pop(name, None)
            if wait is not None:
                response.headers["retry-after"] = f"{wait:g}"
        response.stream = _limited_stream(response.stream)


def limited_wait(asked: str | None, longest_s: float) -> float | None:
    """Seconds of ``Retry-After``, limited; None if the header is absent."""
    if not asked:
        return None
    try:
        seconds = float(asked) if asked.isascii() else math.nan
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(asked)
        except ValueError:
            return None
        seconds = max(0.0, at.timestamp() - time.time())
    return min(seconds, longest_s) if seconds >= 0 else None


def _limited_stream(stream: Any) -> Any:
    """The body of an answer, of which so many bytes are read."""

    class Limited(byte_stream()):
        def __iter__(self) -> Iterator[bytes]:
            num_bytes = 0
            for piece in stream:
                _stop_if_given_up()
                num_bytes += len(piece)
                if num_bytes > _MOST_ANSWER_BYTES:
                    raise AnswerError(f"sent more than {_MOST_ANSWER_BYTES} bytes as an answer")
                yield piece

        def close(self) -> None:
            stream.close()

    return Limited()


def _stop_if_given_up(_request: object = None) -> None:
    """Ends a call that nobody waits for any more."""
    given_up = getattr(_CALL, "given_up", None)
    if given_up is not None and given_up.is_set():
        raise AnswerError("the answer came after the time limit")


class AnswerError(Exception):
    """An answer that no hub gives."""


_MOST_ANSWER_BYTES = 50_000_000  # a page of a listing has less than one million
_CALL = threading.local()
_LOCK = threading.Lock()
_LIMITED: dict[int, tuple[int, Any, Any]] = {}


def persistently(
    call: Callable[[], Result], operation: str, patience: Patience, num_bytes: int = 0
) -> Result:
    """The result of a repeatable call, retried after transient failures."""
    for attempt in range(1, patience.attempts):
        try:
            return patience.call(call, num_bytes)
        except Exception as error:
            if not is_passing(error):
                raise
            patience.wait(attempt, error, operation)
    return patience.call(call, num_bytes)


def check_token(token: str | None) -> None:
    """Refuses what cannot be a token, before a client shows it in an error.

    Raises:
        HubError: Without its words.
    """
    if token is None:
        return
    if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
        raise HubError(
            "the access token holds a line end, a space or another character that no token has; "
            "give it as the hub shows it"
        )


def status_of(error: BaseException) -> int | None:
    """HTTP status behind an error, wherever the client has wrapped it; None if no answer came."""
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return link.response.status_code
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the failure is transient: an overloaded hub, a cut connection, a gateway's page."""
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    return any(isinstance(link, _cut_connections()) for link in _chain(error))


def explain(error: Exception, repo_id: str, api: HfApi) -> HubError:
    """The error in words that say what to do. Never holds a token.

    Its cause is what was raised, unless that holds the token.
    """
    return caused_by(error, _words(error, repo_id, api), api)


def caused_by(error: Exception, words: str, api: HfApi) -> HubError:
    """An error to raise ``from`` its own cause; neither holds the token."""
    secret = api.token if isinstance(api.token, str) else get_token()
    explained = HubError(words.replace(secret, "[token removed]") if secret else words)
    if secret is None or secret not in "".join(traceback.format_exception(error)):
        explained.__cause__ = error
    explained.__suppress_context__ = True
    return explained


def is_understood(error: BaseException) -> bool:
    """Whether the hub's client could parse the response."""
    odd = any(isinstance(link, _ODD_ANSWERS) for link in _chain(error))
    return is_passing(error) or status_of(error) is not None or not odd


_ODD_ANSWERS = (AnswerError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


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
    if isinstance(error, json.JSONDecodeError):
        return (
            f"{repo_id}: {api.endpoint} answers with something else than a hub (no JSON); check "
            "HF_ENDPOINT and the network"
        )
    if not is_understood(error):
        return (
            f"{repo_id}: the answer of {api.endpoint} could not be understood "
            f"({type(error).__name__}: {_first_line(error)}); see whether HF_ENDPOINT is a hub"
        )
    if status in _PASSING:
        return f"{repo_id}: the hub answered {status} at every attempt; try again later"
    if status is not None:
        return f"{repo_id}: the hub answered {status}: {_first_line(error)}"
    if is_passing(error):
        late = isinstance(error, TimeoutError) and str(error)
        return (
            f"{repo_id}: {api.endpoint} cannot be reached ({late or type(error).__name__}); check "
            "the network and HF_ENDPOINT, or keep the folder and push later"
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
    """Why the token may not write, from what the hub discloses of its owner and role."""
    try:
        me = Patience(longest_silence_s=_HINT_S, longest_call_s=_HINT_S).call(api.whoami)
        return lacks(me, repo_id) or (
            f"the token of {me['name']!r} (role {_role(me)!r}) may not write here; "
            f"give it write access to {repo_id.partition('/')[0]!r} at {_TOKENS}"
        )
    except Exception as error:  # noqa: BLE001 - the hint is an extra; the refusal itself is told
        log.debug("whoami failed: %s", type(error).__name__)
        return f"the token may not write here; make one with write access at {_TOKENS}"


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


def _retry_after(error: BaseException) -> str | None:
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            return link.response.headers.get("Retry-After", "").strip()
    return None


def _brief(error: BaseException) -> str:
    """What failed, without words that an answer may have brought."""
    status = status_of(error)
    return type(error).__name__ if status is None else f"the hub answered {status}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
