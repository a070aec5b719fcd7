"""A hub that means harm, or is none: no endless wait, no endless body, no token told."""

import re
import time
import traceback

import pytest

from sosp_hub.errors import HubError, SospHubError, without_secrets
from sosp_hub.hub.attempts import Patience, limited_wait
from sosp_hub.hub.push import check_access, push_to_hub
from tests.hub.conftest import TOKEN
from tests.hub.loopback import Fault
from tests.hub.test_faults import COMMIT, OURS, THE_CLIENTS, commits
from tests.hub.test_push import REPO, local, push

HASTY = Patience(
    attempts=2,
    first_wait_s=0.01,
    longest_wait_s=0.05,
    longest_silence_s=5.0,
    longest_asked_s=0.2,
    longest_call_s=1.5,
    least_bytes_per_s=1e6,
)


def told(error):
    """All that a person sees of an error, with what it was caused by."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("asked", ["100000", "9" * 400, "-1", "abc", "1e9", "²", "0.1", ""])
@pytest.mark.parametrize("request_", [COMMIT, THE_CLIENTS[1]])
def test_a_hub_does_not_say_for_how_long_we_sleep(hub, folder, asked, request_, caplog):
    hub.faults = [Fault(request_, status=429, headers={"Retry-After": asked})]
    began = time.monotonic()
    push(folder, patience=HASTY)
    assert time.monotonic() - began < 20
    assert hub.contents(REPO) == local(folder)
    if asked == "100000":
        assert "asks to wait 100000" in caplog.text


def test_the_clients_own_limits_of_rates_are_capped(hub, folder):
    headers = {"ratelimit": '"api";r=0;t=100000', "ratelimit-policy": '"api";q=10;w=100000'}
    hub.faults = [Fault(THE_CLIENTS[1], status=429, headers=headers)]
    push(folder, patience=HASTY)
    assert hub.contents(REPO) == local(folder)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("7", 7.0), ("0.5", 0.5), ("100000", 300.0), ("9" * 400, 300.0), ("-1", None), ("²", None),
     ("nan", None), ("inf", 300.0), ("abc", None), ("", None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2999 07:28:00 GMT", 300.0)],
)  # fmt: skip
def test_what_is_waited(asked, expected):
    assert limited_wait(asked, 300.0) == expected


def drip(seconds):
    """A body that comes a byte at a time."""

    def body():
        for _ in range(int(seconds / 0.1)):
            yield b" "
            time.sleep(0.1)
        yield b"{}"

    return body


def flood():
    while True:
        yield b" " * 2**20


@pytest.mark.parametrize(
    "request_", ["POST .*/create", "GET .*/models/.*/revision", "GET .*/tree/", COMMIT]
)
def test_a_body_that_drips_ends_in_an_error(hub, folder, request_):
    hub.faults = [Fault(request_, status=200, stream=drip(30), times=99)]
    began = time.monotonic()
    with pytest.raises(HubError) as caught:
        push(folder, patience=HASTY)
    assert time.monotonic() - began < 25
    assert re.search("no whole answer within|not known", str(caught.value))
    assert all(len(repo.refs["main"]) == 1 for repo in hub.repos.values())


@pytest.mark.parametrize(
    "request_", ["POST .*/create", "GET .*/models/.*/revision", "GET .*/tree/"]
)
@pytest.mark.parametrize("status", [200, 500])
def test_a_body_without_end_is_not_read(hub, folder, request_, status):
    hub.faults = [Fault(request_, status=status, stream=flood, times=99)]
    with pytest.raises(HubError, match=r"more than .* bytes"):
        push(folder, patience=Patience(attempts=1))


ANSWERS = (b"{}", b"[]", b"null", b"5", b'"x"', b"", b"<html>", b'{"name": 5}', b"[[[[", b"\xff")


@pytest.mark.parametrize("body", ANSWERS)
@pytest.mark.parametrize("request_", [*OURS, *THE_CLIENTS[:3], "GET .*/whoami"])
def test_an_answer_that_is_none_is_told(hub, folder, request_, body):
    hub.faults = [Fault(request_, status=200, body=body, times=99)]
    for call in (lambda: push(folder, patience=HASTY), lambda: check_access(REPO, patience=HASTY)):
        try:
            call()
        except HubError as error:
            told_in_words(error)


def told_in_words(error):
    words = str(error)
    assert words.count(" ") > 5, words
    assert not words.endswith(("'commitUrl'", "'name'", "'sha'")), words
    assert len(words) < 2000


def test_an_empty_answer_to_a_commit_says_that_it_is_not_known(hub, folder):
    hub.faults = [Fault(COMMIT, status=200, body=b"{}", times=9)]
    with pytest.raises(HubError, match=r"not known whether|could not be understood"):
        push(folder, patience=HASTY)
    hub.faults = [Fault(COMMIT, status=200, body=b"{}", after_work=True)]
    result = push(folder, patience=HASTY)
    assert [commit.oid for commit in commits(hub)] == [result.commit]


SECRETS = (
    f"{TOKEN}\n",
    f"{TOKEN}\r\nX-Evil: 1",
    f" {TOKEN}",
    "plain secret",
    "plain\x00secret",
    "pläin-secret",
)


@pytest.mark.parametrize("token", SECRETS)
def test_a_token_that_is_none_is_refused_and_not_told(hub, folder, token, caplog):
    caplog.set_level("DEBUG")
    hub.users["plain secret"] = hub.users[TOKEN]
    for call in (
        lambda: push_to_hub(folder, REPO, token=token, patience=HASTY),
        lambda: push_to_hub(folder, REPO, token=token, patience=HASTY, dry_run=True),
        lambda: check_access(REPO, token=token, patience=HASTY),
    ):
        with pytest.raises(HubError, match="token") as caught:
            call()
        shown = told(caught.value) + caplog.text
        assert token.strip() not in shown
        assert "secret" not in shown
        assert "network" not in str(caught.value)
    assert hub.log == []


ADDRESSES = (
    f"https://me:{TOKEN}@huggingface.co/me/x",
    f"https://{TOKEN}@huggingface.co/me/x",
    "https://me:plainsecret@huggingface.co/me/x",
    f"me/{TOKEN}/x",
    f"me/x?token={TOKEN}",
    "git@hf.co:me/x",
    "me/x\n",
    "me/x\x1b[2J",
    "a" * 5000,
    "me/" + "a" * 5000,
    "",
    "/",
    "../x",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_a_url_is_refused_and_not_told(hub, folder, address):
    for call in (lambda: push(folder, address), lambda: check_access(address)):
        with pytest.raises(HubError, match="NAMESPACE/NAME") as caught:
            call()
        shown = told(caught.value)
        assert TOKEN not in shown
        assert "plainsecret" not in shown
        assert len(str(caught.value)) < 1000
        assert not [c for c in str(caught.value) if not (c.isprintable() or c == "\n")]
    assert hub.log == []


def test_no_error_holds_a_token_whoever_raises_it():
    shown = str(SospHubError(f"got https://me:plain@host/x and {TOKEN} and api_org_abcdefgh1"))
    assert shown == "got https://[removed]@host/x and [token removed] and [token removed]"
    assert without_secrets("see https://host/@me and a@b.c") == "see https://host/@me and a@b.c"


@pytest.mark.parametrize("request_", ["repos/create", "preupload", "commit/"])
def test_what_an_error_was_caused_by_does_not_hold_the_token(hub, folder, request_):
    secret = "plain-secret-of-a-hub"
    hub.users[secret] = hub.users[TOKEN]
    hub.faults = [Fault(request_, status=400, body=f"who is {secret}?".encode(), times=9)]
    with pytest.raises(HubError) as caught:
        push(folder, token=secret)
    assert secret not in told(caught.value)
