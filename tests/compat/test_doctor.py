"""`python -m sosp_hub.doctor`."""

import subprocess
import sys

import pytest

from sosp_hub import doctor
from sosp_hub.compat import smoke, versions

pytestmark = pytest.mark.slow


def test_doctor_says_what_is_installed_and_that_it_works():
    done = subprocess.run(
        [sys.executable, "-m", "sosp_hub.doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    known = versions.tested()
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for library in smoke.LIBRARIES:
        assert lines[library][1] == versions.installed(library)
        assert lines[library][-2:] == [known[library], "yes"]
    count = sum(len(smoke.smoke_tests(library)) for library in smoke.LIBRARIES)
    assert f"{count} of {count} smoke tests" in done.stdout


@pytest.fixture
def shown(monkeypatch, capsys):
    """Exit code and text with only these smoke tests."""

    def show(*tests):
        monkeypatch.setattr(
            doctor, "smoke_tests", lambda library: [t for t in tests if t.library == library]
        )
        return doctor.main([]), capsys.readouterr().out

    return show


def test_doctor_names_what_breaks(shown):
    def moved_name():
        raise AttributeError("module 'timm' has no attribute '_hub'\nand more")

    test = smoke.Smoke("timm", "loading [bold]pruned[/bold] models", moved_name)
    code, text = shown(test, smoke.Smoke("torch", "trace", lambda: None))
    assert code == 1
    assert "timm: moved name: AttributeError: module 'timm' has no attribute '_hub'" in text
    assert "breaks: loading [bold]pruned[/bold] models" in text
    assert "and more" not in text
    assert "1 of 2 smoke tests" in text


def test_doctor_misses_a_library(shown, monkeypatch):
    there = versions.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "timm" else there(name))
    code, text = shown()
    assert code == 1
    assert "not installed: timm" in text


def test_doctor_says_what_is_newer(shown, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "99.1")
    code, text = shown()
    assert code == 0
    assert text.count("99.1 (newer)") == len(versions.tested())
