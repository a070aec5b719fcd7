import socket
import time

import pytest
import timm
import torch

import sosp_hub
from sosp_hub.data import reach
from sosp_hub.data.source import open_data
from sosp_hub.errors import DataError, HubError
from sosp_hub.inspection.examine import examine
from sosp_hub.recipe.schema import DataSection


@pytest.fixture
def dead_hub(monkeypatch):
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("HF_HUB_OFFLINE")


def test_dead_hub_says_what_to_do_offline(dead_hub):
    with pytest.raises(HubError) as error, reach.reaching_hub("model", "me/mine"):
        pytest.fail("the hub was asked although it does not answer")
    for word in ("'me/mine'", "model.path=FOLDER", "HF_HUB_OFFLINE=1", "HF_HOME"):
        assert word in str(error.value)


def test_data_that_is_not_in_the_cache():
    with pytest.raises(HubError, match="path=FOLDER_OR_FILE"):
        open_data(DataSection(id="somebody/something"), "causal-lm")


def test_who_is_offline_already_is_not_told_to_go_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE") as error:
        open_data(DataSection(id="somebody/something"), "causal-lm")
    assert "set HF_HUB_OFFLINE=1" not in str(error.value)


def test_errors_that_are_not_the_hubs_pass():
    with pytest.raises(KeyError), reach.reaching_hub("data", "me/mine"):
        raise KeyError("mine")


def test_unknown_repository_is_told_from_a_dead_line():
    class RepositoryNotFoundError(Exception):
        pass

    with pytest.raises(HubError, match="has no 'me/mine'"), reach.reaching_hub("data", "me/mine"):
        raise OSError("wrapped") from RepositoryNotFoundError("404")


def test_causes_that_go_round_in_a_circle():
    """The hub's client raises again what it caught: a `from` may name an error of its own tail."""
    first, second = OSError("first"), OSError("second")
    first.__context__, second.__cause__ = second, first
    with pytest.raises(OSError, match="first"), reach.reaching_hub("data", "me/mine"):
        raise first


def test_path_that_does_not_exist(tmp_path):
    with pytest.raises(DataError) as error:
        open_data(DataSection(path=str(tmp_path / "a/b/c.csv")), "causal-lm")
    assert str(tmp_path) in str(error.value).split("nearest")[1]
    with pytest.raises(DataError, match="does not exist"):
        open_data(DataSection(id="./no/where"), "causal-lm")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """``me/small`` in the cache, as the hub's client leaves it; who waits for the hub fails."""
    model = timm.create_model("test_resnet", num_classes=5).eval()
    snapshot = tmp_path / "models--me--small" / "snapshots" / ("0" * 40)
    sosp_hub.save_pretrained(model, snapshot)
    (tmp_path / "models--me--small" / "refs").mkdir()
    (tmp_path / "models--me--small" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited for the hub"))
    return model


@pytest.mark.parametrize("off", [False, True], ids=["dead", "turned off"])
def test_what_the_cache_holds_is_taken_at_once_where_the_hub_is_not_there(
    dead_hub, cached, off, monkeypatch
):
    if off:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(sosp_hub.from_pretrained("me/small")(image), cached(image))
    assert examine("me/small").totals["params"] == sum(p.numel() for p in cached.parameters())
    why = "turned off by HF_HUB_OFFLINE" if off else "cannot be reached"
    for ask in (sosp_hub.from_pretrained, examine):
        with pytest.raises(HubError, match=f"me/other: .* not in the cache, and http.* {why}"):
            ask("me/other")
