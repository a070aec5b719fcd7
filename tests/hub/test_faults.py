"""Pushing to a hub that fails: complete with one commit, or a clear error and nothing changed."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import get_session

import sosp_hub
from sosp_hub.compat.huggingface_hub import transport_error
from sosp_hub.data.reach import reaching_hub
from sosp_hub.errors import HubError
from sosp_hub.hub.attempts import Patience
from sosp_hub.hub.push import push_to_hub
from sosp_hub.inspection.examine import examine
from sosp_hub.zoo.origin import origin_on_hub
from tests.hub.conftest import NOW, make_folder
from tests.hub.loopback import Fault
from tests.hub.test_push import REPO, local, push

COMMIT = r"POST .*/commit/"


def commits(hub, repo_id=REPO, revision="main"):
    return hub.repos[repo_id].refs[revision][1:]


OURS = (COMMIT, "POST .*/create", "GET .*/models/.*/revision", "validate-yaml")
THE_CLIENTS = ("GET .*/tree/", "POST .*/preupload/", "POST .*/batch", "PUT /lfs/")
"""Requests that the client itself repeats, after a second of its own."""


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
@pytest.mark.parametrize("request_", OURS)
def test_a_hub_that_is_overloaded_for_a_moment(hub, folder, request_, status):
    hub.faults = [Fault(request_, status=status, times=2)]
    push(folder)
    assert hub.contents(REPO) == local(folder)
    assert len(commits(hub)) == 1


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("request_", OURS)
def test_a_connection_that_is_cut(hub, folder, request_, after_work):
    hub.faults = [Fault(request_, drop=True, after_work=after_work)]
    push(folder)
    assert hub.contents(REPO) == local(folder)
    assert len(commits(hub)) == 1


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}])
def test_failures_that_the_client_repeats_itself(hub, folder, fault):
    hub.faults = [Fault(request, **fault) for request in THE_CLIENTS]
    push(folder)
    assert hub.contents(REPO) == local(folder)
    assert len(commits(hub)) == 1
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize("fault", [{"status": 502}, {"status": 504}, {"drop": True}])
def test_a_commit_whose_answer_was_lost_is_recognised(hub, folder, fault):
    hub.faults = [Fault(COMMIT, after_work=True, **fault)]
    result = push(folder)
    assert [commit.oid for commit in commits(hub)] == [result.commit]
    assert sum("/commit/" in request for request, _ in hub.log) == 1


def test_a_commit_that_lands_after_its_answer_was_lost_is_not_made_twice(hub, folder):
    """The gateway gives up and the hub goes on: our second attempt meets our own first one."""
    late = []
    hub.faults = [
        Fault("GET .*/revision/main"),  # the head, before anything is sent
        Fault(COMMIT, status=504, after_work=True),
        Fault(
            "GET .*/revision/main", first=lambda: late.append(hub.repos[REPO].refs["main"].pop())
        ),
        Fault(COMMIT, first=lambda: hub.repos[REPO].refs["main"].append(late.pop())),
    ]
    result = push(folder)
    assert [commit.oid for commit in commits(hub)] == [result.commit]
    assert hub.contents(REPO) == local(folder)
    assert ("POST /api/models/me/resnet18-small/commit/main", 412) in hub.log


def test_somebody_elses_commit_in_between_is_reported_and_kept(hub, folder):
    hub.add_repo(REPO)
    hub.faults = [Fault(COMMIT, first=lambda: hub.commit(REPO, {"notes.txt": b"theirs"}))]
    with pytest.raises(HubError, match=r"somebody else pushed to 'main'.*nothing was written"):
        push(folder)
    assert hub.contents(REPO) == {"notes.txt": b"theirs"}
    push(folder)
    assert hub.contents(REPO) == {**local(folder), "notes.txt": b"theirs"}


def test_somebody_elses_commit_after_ours_does_not_hide_it(hub, folder):
    hub.faults = [
        Fault("GET .*/revision/main"),
        Fault(COMMIT, status=502, after_work=True),
        Fault("GET .*/revision/main", first=lambda: hub.commit(REPO, {"notes.txt": b"theirs"})),
    ]
    result = push(folder)
    assert [commit.title for commit in commits(hub)][1:] == ["by hand"]
    assert commits(hub)[0].oid == result.commit


@pytest.mark.parametrize("fault", [{"status": 502}, {"drop": True}])
def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, folder, fault):
    hub.add_repo(REPO)
    hub.faults = [Fault(COMMIT, after_work=True, **fault)]
    result = push(folder, create_pr=True)
    assert len(hub.repos[REPO].pulls) == 1
    assert result.url.endswith(f"{REPO}/discussions/1")
    assert hub.contents(REPO, "refs/pr/1") == local(folder)


def test_a_pull_request_that_comes_late_is_closed(hub, folder):
    """The first attempt arrives while the second is being answered: two of them, one too many."""
    late = {}

    def hide():
        late.update(pull=hub.repos[REPO].pulls.pop(), ref=hub.repos[REPO].refs.pop("refs/pr/1"))

    def arrive():
        late["pull"]["num"] = 2
        hub.repos[REPO].pulls.append(late["pull"])
        hub.repos[REPO].refs["refs/pr/2"] = late["ref"]

    hub.add_repo(REPO)
    looking = "GET .*/discussions"
    hub.faults = [
        Fault(COMMIT, status=504, after_work=True),
        Fault(looking, first=hide),
        Fault(looking),
        Fault(looking, first=arrive),
    ]
    result = push(folder, create_pr=True)
    assert [(pull["num"], pull["status"]) for pull in hub.repos[REPO].pulls] == [
        (1, "open"),
        (2, "closed"),
    ]
    assert result.url.endswith(f"{REPO}/discussions/1")
    assert hub.contents(REPO, "refs/pr/1") == local(folder)


IMPATIENT = Patience(attempts=3, first_wait_s=0.01, longest_wait_s=0.05, longest_silence_s=0.3)


@pytest.mark.parametrize("request_", [*OURS, "POST .*/preupload/", "PUT /lfs/"])
def test_a_hub_that_falls_silent_for_a_moment(hub, folder, request_):
    hub.faults = [Fault(request_, delay_s=20)]
    push(folder, patience=IMPATIENT)
    assert hub.contents(REPO) == local(folder)
    assert len(commits(hub)) == 1


@pytest.mark.parametrize("request_", [OURS[1], "GET .*/revision"])
def test_a_hub_that_never_answers_ends_in_an_error(hub, folder, request_):
    hub.faults = [Fault(request_, delay_s=20, times=99)]
    with pytest.raises(HubError, match="cannot be reached"):
        push(folder, patience=IMPATIENT)
    hub.faults = [Fault("GET .*/revision", delay_s=20, times=99)]
    assert not push(folder, patience=IMPATIENT, dry_run=True).compared


def test_the_time_limit_is_taken_off_again(hub, folder):
    before = get_session().timeout
    push(folder, patience=IMPATIENT)
    assert get_session().timeout == before


def test_a_hub_that_stays_down_gives_a_clear_error_and_nothing_changes(hub, folder):
    hub.faults = [Fault(COMMIT, status=503, times=99)]
    with pytest.raises(HubError, match="the hub answered 503 at every attempt; try again later"):
        push(folder)
    assert commits(hub) == []


def test_a_lost_answer_and_then_silence_says_that_it_is_not_known(hub, folder):
    hub.faults = [
        Fault("GET .*/revision/main"),
        Fault(COMMIT, drop=True, after_work=True),
        Fault("GET .*/revision/main", drop=True, times=99),
    ]
    with pytest.raises(HubError, match=r"not known whether the commit was made.*Push again"):
        push(folder)
    hub.faults = []
    assert push(folder).added == ()
    assert len(commits(hub)) == 1


def test_a_hub_that_is_not_there(folder, hub):
    hub.server.server_close()
    hub.server.shutdown()
    with pytest.raises(HubError, match=r"cannot be reached .*check the network and HF_ENDPOINT"):
        push(folder)


def test_the_hub_says_how_long_to_wait(hub, folder, monkeypatch):
    waits = []
    monkeypatch.setattr("sosp_hub.hub.attempts.time.sleep", waits.append)
    hub.faults = [Fault(COMMIT, status=429, headers={"Retry-After": "7"})]
    push(folder)
    assert [wait for wait in waits if wait] == [7.0]


def test_waits_grow_and_have_an_end(monkeypatch):
    waits = []
    monkeypatch.setattr("sosp_hub.hub.attempts.time.sleep", waits.append)
    patience = Patience(attempts=9, first_wait_s=1.0, longest_wait_s=10.0)
    for attempt in range(1, 9):
        patience.wait(attempt, ConnectionError("cut"), "test")
    assert waits[0] <= 1.25
    assert max(waits) <= 12.5
    assert sum(waits[-3:]) > 3 * waits[0]


# ---------------------------------------------------------------------------- the fault plan
_FAULTS = (
    {"status": 503},
    {"status": 500},
    {"status": 429, "headers": {"Retry-After": "0"}},
    {"status": 502, "after_work": True},
    {"drop": True},
    {"drop": True, "after_work": True},
    {"delay_s": 0.2},
    {"status": 503, "body": b"<html>gateway</html>", "headers": {"Content-Type": "text/html"}},
    "race",
)
_REQUESTS = ("POST .*REPO/commit/", "POST .*REPO/commit/", "GET .*REPO/revision")
NUM_PUSHES = 216


@pytest.mark.slow
def test_the_fault_plan(hub, tmp_path):
    """Each push meets its own faults, some more of them than it has attempts."""
    rng = random.Random(0)
    jobs = []
    for i in range(NUM_PUSHES):
        repo_id = f"me/plan-{i:03}"
        hub.add_repo(repo_id, files={"pytorch_model.bin": b"old", "notes.txt": b"mine"})
        for kind in {_FAULTS.index(_FAULTS[i % len(_FAULTS)]), rng.randrange(len(_FAULTS))}:
            fault = _FAULTS[kind]
            if fault == "race":
                theirs = {f"theirs-{i}.txt": b"theirs"}
                race = Fault(
                    _REQUESTS[0].replace("REPO", repo_id),
                    first=lambda r=repo_id, f=theirs: hub.commit(r, f),
                )
                hub.faults.append(race)
            else:
                request = _REQUESTS[rng.randrange(3)].replace("REPO", repo_id)
                hub.faults.append(Fault(request, times=rng.choice((1, 1, 2, 3, 9)), **fault))
        jobs.append((repo_id, make_folder(tmp_path / f"f{i}" / "small")))
    with ThreadPoolExecutor(12) as pool:
        endings = list(pool.map(lambda job: _ending(hub, *job), jobs))
    counts = {ending: endings.count(ending) for ending in sorted(set(endings))}
    assert sum(counts.values()) == NUM_PUSHES >= 200
    assert set(counts) == {"complete", "refused"}
    assert counts["complete"] > NUM_PUSHES / 2, counts
    assert counts["refused"] > 10, counts


def _ending(hub, repo_id, folder):
    """Pushes, and checks that the repository is in one of the two states it may be in."""
    untouched = {"pytorch_model.bin": b"old", "notes.txt": b"mine"}
    try:
        result = push_to_hub(folder, repo_id, patience=NOW)
    except HubError:
        result = None
    made = commits(hub, repo_id)
    ours = [commit for commit in made if commit.author == "me"]
    theirs = {k: v for k, v in hub.contents(repo_id).items() if k.startswith("theirs-")}
    assert len(made) == 1 + len(ours) + len(theirs)  # the first is the old contents
    if result is None and not ours:
        assert hub.contents(repo_id) == {**untouched, **theirs}
        return "refused"
    assert len(ours) == 1
    assert made.index(ours[0]) == 1  # on top of what we saw, never on top of theirs
    assert hub.contents(repo_id) == {**local(folder), "notes.txt": b"mine", **theirs}
    return "complete" if result else "told that it is not known"


def _cut(*_, **__):
    raise transport_error()("connection cut")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: sosp_hub.from_pretrained("me/model"),
        lambda: examine("me/model"),
        lambda: _reached("model"),
    ],
    ids=["from_pretrained", "inspect", "recipe"],
)
def test_a_connection_that_breaks_while_a_model_is_read_is_told(tmp_path, monkeypatch, ask):
    """Errors of the client's HTTP library are no OSError: with config.json in the cache, inspect
    ended with one."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", _cut)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", _cut)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: tmp_path / "config.json"
    )
    monkeypatch.setattr("sosp_hub.data.reach.hub_answers", lambda: True)
    with pytest.raises(HubError, match="me/model"):
        ask()


def _reached(section):
    with reaching_hub(section, "me/model"):
        _cut()


def test_a_connection_that_breaks_while_a_card_is_read_costs_the_card_alone(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _cut)
    assert origin_on_hub("me/model", None).card == {}
