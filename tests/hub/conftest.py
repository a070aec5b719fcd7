"""The real client, pointed at a hub on this machine."""

import os
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import numpy
import pytest
from huggingface_hub import close_session, constants
from safetensors.numpy import save

from sosp_hub.hub.attempts import Patience
from tests.hub.loopback import Hub, User
from tests.report import reports

TOKEN = "hf_writerwriterwriter01"
READER = "hf_readerreaderreader02"
STRANGER = "hf_strangerstranger03"
NOW = Patience(attempts=5, first_wait_s=0.01, longest_wait_s=0.05)


_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """2025-11: the client sends large files in a way that its HTTP library deprecates."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub where `me` may write, with the client's own settings pointing to it.

    Older clients copy the address when they are imported: HF_ENDPOINT=http://127.0.0.1:8765 pytest.
    """
    given = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    with Hub(tmp_path / "hub", port=given.port or 0) as hub:
        hub.users = {
            TOKEN: User("me", orgs=("lab",)),
            READER: User("me", role="read"),
            STRANGER: User("stranger"),
        }
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    close_session()  # its open connections lead to this hub


@pytest.fixture
def client_env(hub, tmp_path):
    """Surroundings of a process of its own that uses the hub."""
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
    }


def made_weights(num_bytes=16):
    """Of a model whose code nobody has; they differ each time."""
    return save({"noise": numpy.frombuffer(uuid.uuid4().bytes * (num_bytes // 16), numpy.uint8)})


def make_folder(path, card=True):
    """A small folder as a run leaves it."""
    report, saliency = reports.image_report()
    reports.write(path, report, saliency)
    (path / "config.json").write_text(
        '{"architecture": "my_resnet18", "model_args": {"delta": {}}}'
    )
    (path / "model.safetensors").write_bytes(made_weights())
    if card:
        (path / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "resnet18-small")
