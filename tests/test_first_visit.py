"""A new user's first minutes: the wheel, an empty folder, no checkout in sight."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = (
    *("model.train.epochs=1", "finetune.epochs=1", "criterion.num_samples=64"),
    *("data.num_train=256", "data.num_test=64", "rebuild.num_samples=64"),
)


@pytest.fixture(scope="module")
def sosp(tmp_path_factory):
    """Runs the installed command in an empty folder."""
    place = tmp_path_factory.mktemp("visit")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    source = place / "source"
    files = ("sosp_hub", "recipes", "pyproject.toml", "README.md", "LICENSE")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", *files], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.split("\0")[:-1]:
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    subprocess.run([*wheels, str(source)], check=True)
    (wheel,) = place.glob("*.whl")
    environment = place / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    bin_folder = environment / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / Path(sys.executable).name
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = [*pip, "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, env=clean)
    # What sosp_hub depends on is taken from here, sosp_hub itself is not.
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (Path(own) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    home = place / "home"
    home.mkdir()

    def run(*arguments, code=0):
        done = subprocess.run(
            [bin_folder / "sosp", *arguments],
            capture_output=True,
            text=True,
            cwd=home,
            env={**clean, "COLUMNS": "200"},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.python = python
    run.home = home
    run.env = clean
    return run


@pytest.mark.slow
def test_from_the_wheel_to_a_folder_that_could_be_published(sosp):
    where = "import sosp_hub; print(sosp_hub.__file__)"
    done = subprocess.run(
        [sosp.python, "-c", where], capture_output=True, text=True, env=sosp.env, cwd=sosp.home
    )
    assert str(sosp.home.parent) in done.stdout  # the wheel's, not the checkout's
    assert "quickstart" in sosp("recipes")
    sosp("prune", "quickstart", *SMALL)
    saved = "runs/quickstart"
    assert (sosp.home / saved / "model.safetensors").is_file()
    load = f"import sosp_hub; print(type(sosp_hub.from_pretrained({saved!r})).__name__)"
    done = subprocess.run(
        [sosp.python, "-c", load],
        **{"capture_output": True, "text": True, "env": sosp.env, "cwd": sosp.home, "check": True},
    )
    assert done.stdout.strip() == "CifarResNet"
    assert "config, delta and weights agree" in sosp("inspect", saved)
    assert "model.safetensors" in sosp("push", saved, "me/small", "--dry-run")
