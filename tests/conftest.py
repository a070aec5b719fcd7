"""The surroundings of every test: no hub, no telemetry, no display, one thread, one seed."""

import logging
import os
import random
import shutil
import sys
import tempfile

import hypothesis
import pytest

_SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # the same sums in the same order, also under `pytest -n 2`
}
_SEED = 0
collect_ignore = ["bench"]  # programs that print tables

# Set before anything imports torch or a hub client. Workers of pytest-xdist inherit it all; each
# has a cache of its own.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker is None:
    os.environ.update(_SURROUNDINGS)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CUDA_VISIBLE_DEVICES=0 pytest: on a GPU
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sosp_hub-tests-hf-")
    for secret in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(secret, None)
else:
    os.environ["HF_HOME"] += f"/{worker}"

# The same examples each time, however slow the machine: a test that fails, fails again.
hypothesis.settings.register_profile("sosp_hub", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sosp_hub")


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="write golden files and generated tables anew instead of comparing with them",
    )


@pytest.fixture
def regenerate(request) -> bool:
    return request.config.getoption("regenerate")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same seed, whatever ran before it."""
    random.seed(_SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(_SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(_SEED)


@pytest.fixture(autouse=True)
def _log_level():
    """A command run in this process sets how much is told; the next test starts anew."""
    log = logging.getLogger("sosp_hub")
    level = log.level
    yield
    log.setLevel(level)
