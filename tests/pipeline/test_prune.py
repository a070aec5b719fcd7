"""``python -m sosp_hub.prune`` from a recipe to a folder, stopped, continued, refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

import sosp_hub
from sosp_hub import scoring
from sosp_hub.data.loading import load_split, make_loader
from sosp_hub.data.source import open_data
from sosp_hub.evaluate import evaluate
from sosp_hub.pipeline import context, measuring
from sosp_hub.pipeline.stage_cache import StageCache
from sosp_hub.prune import main
from sosp_hub.recipe.load import load_recipe
from sosp_hub.zoo.load import load_model
from tests.compare import assert_close

pytestmark = pytest.mark.slow

RECIPE = """
model:
  library: timm
  id: cifar_resnet20
  task: image-classification
  pretrained: false
  train: {epochs: 1, learning_rate: 3.0e-3, batch_size: 32}
data: {id: sklearn/digits, num_train: 256, num_test: 100}
criterion: {name: sosp_h, mode: exact, num_samples: 64, batch_size: 32}
budget: {macs: 0.5}
finetune: {epochs: 2, batch_size: 16, save_every_steps: 4}
evaluate: {metrics: [accuracy, loss], latency_batch_size: 1}
output: {dir: OUTPUT}
"""


def prune(folder, *arguments):
    """The command, in this process; its output goes to ``folder/out``."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(folder / "out")))
    return main([str(path), *arguments])


def files(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert prune(folder) == 0
    return folder


def test_a_run_leaves_a_smaller_model_with_all_that_belongs_to_it(finished):
    output = finished / "out"
    report = json.loads((output / "sosp_report.json").read_text())
    assert list(report["metrics"]) == ["dense", "cut", "rebuilt", "recalibrated", "final"]
    for found in report["metrics"].values():
        assert found["accuracy"]["n"] == 100
        assert found["accuracy"]["stderr"] > 0
    before, after = report["cost"]["before"], report["cost"]["after"]
    assert 0.4 < after["macs"] / before["macs"] <= 0.5
    peak = {when: found["bytes"] for when, found in report["peak_memory"].items()}
    assert after["bytes"] < peak["after"] < peak["before"]
    assert (
        "| Peak memory of one forward pass, batch of 1, float32 |"
        in (output / "README.md").read_text()
    )
    weights = load_file(output / "model.safetensors")
    in_file = sum(t.numel() for name, t in weights.items() if "running" not in name)
    in_file -= sum(t.numel() for name, t in weights.items() if "num_batches" in name)
    assert in_file == after["params"] < before["params"]
    scores = load_file(output / "saliency.safetensors")
    assert {g["name"]: g["size"] for g in report["groups"] if g["kind"] == "channel"} == {
        name: len(values) for name, values in scores.items()
    }
    assert report["plan"]["provenance"]["criterion"]["name"] == "sosp_h"
    assert report["calibration"] == {"data": "sklearn/digits", "num_samples": 64, "seed": 0}
    assert set(report["timings_s"]) == {
        "load",
        "trace",
        "cut",
        "recalibration",
        "dense",
        "dense_metrics",
        "saliency",
        "plan",
        "cut_metrics",
        "rebuilt",
        "rebuilt_metrics",
        "recalibrated_metrics",
        "final",
        "final_metrics",
    }
    assert report["history"][-1]["step"] == 28  # 230 samples twice, in batches of 16
    recovery = report["recovery"]
    assert recovery["num_held_out"] == 26
    losses = dict(recovery["selected"]["losses"])
    assert recovery["selected"]["loss"] == losses[recovery["selected"]["epoch"]]
    assert recovery["selected"]["loss"] == min(losses.values())
    assert list(losses) == [0, 0.5, 1, 1.5, 2]
    card = (output / "README.md").read_text()
    assert "is the best on 26 training samples that were held out" in card
    assert report["command"].startswith("python -m sosp_hub.prune ")
    assert "pretrained: false" in report["recipe"]
    assert (output / "README.md").is_file()
    assert len(list((output / "figures").iterdir())) == 3
    assert sorted(path.name for path in finished.iterdir()) == ["out", "recipe.yaml"]


def test_what_is_loaded_again_is_what_was_measured(finished):
    output = finished / "out"
    recipe = load_recipe(finished / "recipe.yaml")
    data = open_data(recipe.data, recipe.model.task, seed=recipe.seed)
    processor = load_model(recipe.model, data=data.info).processor
    model = sosp_hub.from_pretrained(output).eval()
    test = make_loader(load_split(data, "test", processor), batch_size=100)
    found = evaluate(model, test, ("accuracy", "loss"))
    stated = json.loads((output / "sosp_report.json").read_text())["metrics"]["final"]
    assert_close(found["loss"].value, stated["loss"]["value"], relative=1e-6)
    assert found["accuracy"].value == stated["accuracy"]["value"]


def test_a_finished_run_is_refused_and_left_as_it_is(finished, capsys):
    before = files(finished / "out")
    assert prune(finished) == 2
    error = capsys.readouterr().err
    assert str(finished / "out") in error
    assert "--overwrite" in error
    assert files(finished / "out") == before
    assert sorted(path.name for path in finished.iterdir()) == ["out", "recipe.yaml"]


def test_a_shortened_option_is_no_option(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        prune(tmp_path, "--over")
    assert stopped.value.code == 2
    assert "--over" in capsys.readouterr().err


def test_the_output_may_be_in_the_home_folder(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(finished))
    assert prune(tmp_path, "output.dir=~/out") == 2
    assert f"{finished / 'out'} holds a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_of_somebody_elses_is_never_touched(tmp_path, capsys, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert prune(tmp_path, *overwrite) == 2
    assert "left alone" in capsys.readouterr().err
    assert files(tmp_path / "out").keys() == {"thesis.tex"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget.macs=2"], ["budget.macs", "got 2", "at most 1"]),
        (["criterion.nam=taylor"], ["criterion.nam", "`name`"]),
        (["data.id=null", "data.path=FOLDER/no_such.csv"], ["no_such.csv"]),
        (["data.path=FOLDER/empty.csv", "model.task=text-classification"], ["empty.csv"]),
        (["model.num_labels=3"], ["3", "10"]),
        (["model.id=no_such_net"], ["no_such_net"]),
        (["budget.macs=0.001"], ["macs=0.001", "least that can be reached"]),
        (["structure.kinds=[expert]"], ["expert", "channel", "write structure.kinds"]),
        (
            ["criterion.name=sglp", "structure.kinds=[layer]", "model.id=test_resnet"],
            ["layer", "it has channel, which sglp does not score", "magnitude or random"],
        ),
        (["model.id=nobody/nothing", "model.library=transformers"], ["nobody/nothing", "ffline"]),
        (["data.id=nobody/nothing"], ["nobody/nothing", "ffline"]),
        (["output.dir=FOLDER/empty.csv"], ["empty.csv", "is a file"]),
        (["output.dir=FOLDER/empty.csv/a/b"], ["empty.csv", "is a file"]),
        (["output.max_shard_size=abc"], ["output.max_shard_size", "abc", "5GB"]),
        (["output.max_shard_size=0GB"], ["output.max_shard_size", "0GB"]),
        (["push.repo_id=a/b/c"], ["push.repo_id", "a/b/c", "NAMESPACE/NAME"]),
        (["push.repo_id=a b"], ["push.repo_id", "a b", "NAMESPACE/NAME"]),
        (["data.max_length=1"], ["data.max_length", "at least 2"]),
        (["model.train=null", "finetune.learning_rate=1e30"], ["loss", "learning rate"]),
    ],
    ids=lambda value: value[0].split("=")[0] if "=" in value[0] else "",
)
def test_bad_input_is_explained_and_nothing_is_written(tmp_path, capsys, overrides, words):
    (tmp_path / "empty.csv").write_text("text,label\n")
    overrides = [override.replace("FOLDER", str(tmp_path)) for override in overrides]
    assert prune(tmp_path, *overrides) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert "Traceback" not in error
    left = {path.name for path in tmp_path.iterdir()} - {"out.partial"}
    assert left == {"recipe.yaml", "empty.csv"}
    if "learning_rate" not in overrides[-1]:  # which is found out only when training has begun
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("repo_id", ["small", "me/small"])
def test_a_push_that_cannot_work_is_noticed_before_the_run(tmp_path, capsys, monkeypatch, repo_id):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(context, "load_from_zoo", None)  # is not called
    assert prune(tmp_path, f"push={{repo_id: {repo_id}}}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: push: {'repo_id ' if repo_id == 'small' else repo_id}")
    assert ("NAMESPACE/NAME" if repo_id == "small" else "hf auth login") in error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_work_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "out.partial").write_text("somebody else's")
    assert prune(tmp_path, "model.train=null") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "out.partial") in error
    assert "output.dir" in error
    assert (tmp_path / "out.partial").read_text() == "somebody else's"


def test_a_run_killed_while_it_trains_ends_like_one_that_was_not(finished, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "out")))
    command = [sys.executable, "-m", "sosp_hub.prune", str(path)]
    state = tmp_path / "out.partial" / "final.state"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(state.glob("step-*[0-9]")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert list(state.glob("step-*[0-9]"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert "train dense" not in done.stderr
    whole, continued = (load_file(f / "out" / "model.safetensors") for f in (finished, tmp_path))
    assert_close(continued, whole, relative=0)
    for text in ("Parameters", "Multiply-accumulates", "Weights", "Latency", "sosp_report.json"):
        assert text in done.stdout, text
    assert done.stdout.isprintable() or "\x1b" not in done.stdout  # no colours in a pipe


def test_another_seed_calibrates_with_other_samples(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "out")))

    def places(seed):
        """In the train split, which depends on the seed itself."""
        recipe = load_recipe(path, [f"seed={seed}"])
        opened = context.open_context(recipe, StageCache(tmp_path / "work", recipe))
        train, _ = opened.train.__getitems__(range(len(opened.train)))
        chosen = torch.cat([images for images, _ in opened.calibration_batches()])
        return {(train == image).flatten(1).all(1).nonzero()[0, 0].item() for image in chosen}

    first = places(0)
    assert len(first) > 60
    assert places(0) == first
    assert len(places(1) & first) < 32  # 64 of 256, drawn twice


def test_a_scheduler_stops_a_run_as_ctrl_c_does(tmp_path, monkeypatch, capsys):
    def stop(*args, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("goes on after it")

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score", stop)
        assert prune(tmp_path) == 143
    assert "same command" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "recipe.yaml"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_somebody_answers_stays_theirs(tmp_path, monkeypatch):
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("theirs"))
    monkeypatch.setattr(scoring, "score", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Exception, match="NoneType"):  # there are no scores
            prune(tmp_path)
        assert asked == ["theirs"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_leaves_what_is_done_and_another_budget_goes_on_from_there(
    finished, tmp_path, monkeypatch, capsys
):
    def stop(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "apply", stop)
        assert prune(tmp_path) == 130
    assert "same command" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "recipe.yaml"]
    work = tmp_path / "out.partial"
    kept = {name: time for name, time in files(work).items() if "plan" not in name}
    monkeypatch.setattr(scoring, "score", stop)  # is not called again
    assert prune(tmp_path, "budget.macs=0.7", "finetune.epochs=0") == 0
    said = capsys.readouterr().err
    assert "budget.macs was 0.5, is 0.7" in said
    assert "repeated because of that: plan" in said
    assert "saliency.safetensors" in kept
    assert not work.exists()
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert 0.6 < report["cost"]["after"]["macs"] / report["cost"]["before"]["macs"] <= 0.7
    assert report["history"] == []
    assert report["metrics"]["final"] == report["metrics"]["recalibrated"]
    theirs = load_file(finished / "out" / "saliency.safetensors")
    assert_close(load_file(tmp_path / "out" / "saliency.safetensors"), theirs, relative=0)
    monkeypatch.undo()
    assert prune(tmp_path, "budget.macs=0.5", "finetune.epochs=0", "--overwrite") == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert report["cost"]["after"]["macs"] / report["cost"]["before"]["macs"] <= 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_the_package_is_cheap_to_import():
    code = (
        "import sys, sosp_hub; assert 'torch' not in sys.modules, 'torch'; print(len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200
    assert torch.__version__  # this process has it, so the name is right
