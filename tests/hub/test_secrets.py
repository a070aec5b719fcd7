"""An access token appears nowhere: not in what is raised, logged, or written into a card."""

import traceback

import pytest
from huggingface_hub import HfApi

from sosp_hub.compat.huggingface_hub import transport_error
from sosp_hub.errors import HubError
from sosp_hub.report.card import render_card
from tests.hub.conftest import TOKEN, make_folder
from tests.hub.loopback import Fault
from tests.hub.test_push import REPO, push

PLAIN = "plain-secret-of-a-private-hub"  # nothing about it looks like a token


@pytest.mark.parametrize("given", ["argument", "environment"])
@pytest.mark.parametrize("token", [TOKEN, PLAIN])
@pytest.mark.parametrize(
    ("request_", "status"),
    [("repos/create", 400), ("commit/", 400), ("commit/", 409), ("whoami", 503)],
)
def test_what_a_hub_says_of_a_token_is_not_handed_on(
    hub, folder, monkeypatch, caplog, token, given, request_, status
):
    """The hub echoes the token in the words that the client prints: its ``X-Error-Message``."""
    hub.users[PLAIN] = hub.users[TOKEN]
    monkeypatch.setenv("HF_TOKEN", token if given == "environment" else "hf_othertoken04")
    echo = {"X-Error-Message": f"who is {token}?"}
    if request_ == "whoami":
        hub.faults = [Fault("commit/", status=403), Fault("whoami", 400, times=9, headers=echo)]
    else:
        hub.faults = [Fault(request_, status=status, headers=echo, times=9)]
    caplog.set_level("DEBUG", logger="sosp_hub")
    with pytest.raises(HubError) as caught:
        push(folder, token=token if given == "argument" else None)
    assert token not in str(caught.value)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("sosp_hub")]
    assert not [message for message in ours if token in message]


RAISED = {
    "an illegal header": lambda token: transport_error()(f"Illegal header b'{token}'"),
    "a value": lambda token: ValueError(f"no answer to {token}"),
    "a folder": lambda token: OSError(f"cannot write {token}"),
}


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("given", ["argument", "environment"])
@pytest.mark.parametrize("token", [TOKEN, PLAIN])
def test_what_the_client_says_of_a_token_is_not_handed_on(
    hub, folder, monkeypatch, caplog, raised, given, token
):
    """Whatever it raises, and however often it is asked; the traceback holds none either."""
    error = RAISED[raised](token)

    def fails(*_, **__):
        raise error

    hub.users[PLAIN] = hub.users[TOKEN]
    monkeypatch.setenv("HF_TOKEN", token if given == "environment" else "hf_othertoken04")
    monkeypatch.setattr(HfApi, "create_repo", fails)
    caplog.set_level("DEBUG", logger="sosp_hub")
    with pytest.raises(HubError) as caught:
        push(folder, token=token if given == "argument" else None)
    assert token in str(error)
    assert REPO in str(caught.value)
    assert token not in str(caught.value)
    assert token not in "".join(traceback.format_exception(caught.value))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("sosp_hub")]
    assert bool(ours) == (raised == "an illegal header")  # which may pass, and is tried again
    assert not [message for message in ours if token in message]


def test_a_card_holds_no_token_of_its_report(tmp_path):
    folder = make_folder(tmp_path / "small", card=False)
    path = folder / "sosp_report.json"
    path.write_text(path.read_text().replace("cifar_resnet20", f"cifar_resnet20 {TOKEN}"))
    assert TOKEN in path.read_text()
    card = render_card(folder, run=False, figures=False).read_text()
    assert "cifar_resnet20" in card
    assert TOKEN not in card


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_file_that_holds_the_token_in_use_is_not_published(hub, folder, monkeypatch, given):
    """Also one that looks like no token."""
    hub.users[PLAIN] = hub.users[TOKEN]
    monkeypatch.setenv("HF_TOKEN", PLAIN if given == "environment" else TOKEN)
    (folder / "notes.txt").write_text(f"login with {PLAIN}")
    with pytest.raises(HubError, match=r"notes\.txt: holds an access token"):
        push(folder, token=PLAIN if given == "argument" else None)
    assert REPO not in hub.repos


def test_dense_weights_that_a_run_made_stay_here(hub, folder):
    (folder / "dense").mkdir()
    (folder / "dense" / "model.safetensors").write_bytes(b"dense")
    push(folder)
    assert not [name for name in hub.contents(REPO) if name.startswith("dense")]
