"""One run writes an output at a time, and a kill at any moment loses nothing that was finished."""

import contextlib
import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from sosp_hub.errors import OutputExistsError
from sosp_hub.pipeline import run
from sosp_hub.pipeline.output_folder import check_place, drafted, locked, put
from sosp_hub.prune import main

pytestmark = pytest.mark.slow

HOLD = """
import sys
from pathlib import Path
from sosp_hub.pipeline.output_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_run(output):
    """A process that writes the same output."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_a_second_run_into_one_output_is_refused(recipe, tmp_path, capsys):
    with another_run(tmp_path / "out"):
        assert main([str(recipe)]) == 2
        error = capsys.readouterr().err
        assert "another run" in error
        assert str(tmp_path / "out") in error
        assert "output.dir" in error
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        assert main([str(recipe), f"output.dir={tmp_path / 'other'}"]) == 0
    assert main([str(recipe)]) == 0


def test_a_killed_run_holds_nothing(tmp_path):
    with another_run(tmp_path / "out") as process:
        with pytest.raises(OutputExistsError, match="another run"), locked(tmp_path / "out"):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path / "out"):
            pass


def test_the_same_place_by_another_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with another_run(tmp_path / "out"):
        with pytest.raises(OutputExistsError), locked(tmp_path / "link" / "out"):
            pass
        with locked(tmp_path / "out2"):
            pass


def test_one_process_may_run_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


KILLS = """
import os, shutil, sys
from pathlib import Path
from sosp_hub.atomic import put_in_place

place, at = Path(sys.argv[1]), int(sys.argv[2])
steps = iter(range(100))

def killing(call):
    def maybe(*arguments, **keywords):
        if next(steps) == at:
            os._exit(9)
        return call(*arguments, **keywords)
    return maybe

Path.rename, shutil.rmtree = killing(Path.rename), killing(shutil.rmtree)
put_in_place(place / "draft", place / "out")
"""


def folder_with(path, text):
    path.mkdir()
    (path / "sosp_report.json").write_text(text)
    return path


def texts(root):
    """What whole results there are."""
    return {path.read_text() for path in root.rglob("sosp_report.json")}


@pytest.mark.parametrize("present", [(), ("out",), ("draft.old",), ("out", "draft.old")], ids=str)
def test_a_kill_at_any_step_of_the_final_rename_loses_nothing(tmp_path, present):
    """The newest result that was finished is somewhere until the new one is in its place."""
    for step in range(6):
        place = tmp_path / str(step)
        place.mkdir()
        for name in present:
            folder_with(place / name, f"finished {name}")
        folder_with(place / "draft", "new")
        command = [sys.executable, "-c", KILLS, str(place), str(step)]
        killed = subprocess.run(command, check=False).returncode == 9
        assert killed or step > 1
        in_place = texts(place / "out")
        assert "new" in texts(place)
        if "new" not in in_place:
            assert {f"finished {name}" for name in present[:1]} <= texts(place)
            put(place / "draft", place / "out")  # the same command again
            in_place = texts(place / "out")
        assert in_place == {"new"}
        assert killed or [path.name for path in place.iterdir()] == ["out"]


def test_what_a_killed_run_had_written_is_not_in_the_next_result(tmp_path):
    with (
        contextlib.suppress(KeyboardInterrupt),
        drafted(tmp_path / "out.partial", tmp_path / "out") as draft,
    ):
        (draft / "model-00003-of-00003.safetensors").write_text("of a larger model")
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    with drafted(tmp_path / "out.partial", tmp_path / "out") as draft:
        (draft / "model.safetensors").write_text("whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_folder_that_is_read_only_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputExistsError, match=r"output\.dir: .* cannot be written to"):
        check_place(tmp_path / "here" / "out", "sosp_report.json", overwrite=False)


def of_python(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def of_safetensors(_):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def of_torch(_):
    """As ``torch.save`` ends: the text of the outer error does not say it."""
    try:
        raise RuntimeError("basic_ios::clear: iostream error")
    except RuntimeError:
        raise RuntimeError("inline_container.cc:672 unexpected pos 576 vs 534")  # noqa: B904


@pytest.mark.parametrize("failing", [of_python, of_safetensors, of_torch])
def test_a_full_disk_is_told_whatever_writes(failing, recipe, monkeypatch, capsys):
    """These ended in a traceback, as they were seen on a disk of 700 kB."""
    monkeypatch.setattr(run, "score", failing)
    assert main([str(recipe)]) == 2
    said = capsys.readouterr().err
    assert f"output.dir: {recipe.parent / 'out'} cannot be written, its disk" in said
    assert "make room, and the same command goes on" in said
