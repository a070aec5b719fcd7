"""Several processes on data that does not divide give the numbers of one; one killed ends all."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sosp_hub.prune import main
from tests.compare import assert_close
from tests.pipeline import each_process, few_samples, goes_on, own_script

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes")
"""On a machine without GPUs it starts as many processes on the CPU."""


def launch(num, module, *arguments, timeout=180, launcher=TORCHRUN):
    command = [sys.executable, "-m", *launcher, str(num), "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


@pytest.mark.parametrize("num", [2, 3])
def test_processes_equal_one(num, tmp_path):
    done = launch(num, each_process.__name__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = each_process.results()
    assert expected["metrics"]["accuracy"][1] == each_process.NUM_SAMPLES
    kept = {name: found["kept"] for name, found in expected["scored"].items()}
    assert all(kept.values())
    for rank in range(num):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_close(found, expected)
        assert {name: each["kept"] for name, each in found["scored"].items()} == kept


def test_a_script_of_ones_own_trains_in_two_processes_as_in_one(tmp_path):
    done = launch(2, own_script.__name__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = own_script.results(1)
    assert len({str(each["weights"]) for each in expected.values()}) == len(expected)
    for rank in range(2):
        assert_close(json.loads((tmp_path / f"{rank}.json").read_text()), expected, relative=1e-4)


def test_a_killed_process_ends_the_run():
    done = launch(2, "tests.pipeline.one_dies", timeout=60)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr


def test_one_sample_for_three_processes_is_one_sample(tmp_path):
    """Two of them have none: all score, measure and refuse what one would, and leave."""
    done = launch(3, few_samples.__name__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = few_samples.results()
    assert expected.pop("training") == "done"  # one sample trains one process
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (tmp_path / f"{rank}.left").read_text() == "True"
        assert found.pop("training") == "DataError"
        assert_close(found.pop("metrics"), expected["metrics"])
        assert found["norms"] == "DataError"
        assert found == {name: each for name, each in expected.items() if name != "metrics"}


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_process_that_is_killed_while_it_scores_ends_the_run(launcher, tmp_path):
    keys = ["model.train=null", "data.num_train=64", "data.num_test=16", "criterion.num_samples=32"]
    keys += [f"output.dir={tmp_path / 'out'}"]
    given = ("tests.pipeline.dies_scoring", str(QUICKSTART), *keys)
    done = launch(2, *given, timeout=120, launcher=launcher)
    assert done.returncode != 0
    assert done.stderr.count("Root Cause") == 1
    assert "Signal 9 (SIGKILL)" in done.stderr.rpartition("Root Cause")[2]
    assert not (tmp_path / "out").exists()


def test_training_goes_on_with_another_number_of_processes(tmp_path):
    """It starts again and ends as if nothing had been there, on all processes."""
    with pytest.raises(goes_on.StoppedError):
        goes_on.train(tmp_path / "of one", stop_at=12)
    assert list((tmp_path / "of one").glob("step-*"))
    done = launch(2, goes_on.__name__, str(tmp_path), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "of two").glob("step-*"))
    assert goes_on.train(tmp_path / "of two") == goes_on.train(None)


def test_the_launcher_ends_with_the_cause():
    """Its report is long; the last lines say what to change."""
    done = launch(1, "sosp_hub.prune", str(QUICKSTART), "budget.macs=2", timeout=120)
    assert done.returncode != 0
    cause = done.stderr.rpartition("Root Cause")[2]
    assert "budget.macs" in cause
    assert "at most 1" in cause


def test_a_process_whose_partner_is_gone_stops_waiting():
    """Without a launcher that ends all processes: the connection itself tells."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.one_dies"],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert started[0].returncode == 1
    assert started[1].returncode == -signal.SIGKILL
    assert "onnection" in errors[0]


def test_accelerate_that_starts_one_process_instead_of_two_is_told():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    code = "from sosp_hub.distributed import make_accelerator; make_accelerator()"
    done = subprocess.run(
        [*command, "--no_python", sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "this is one process alone" in done.stderr


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_prune_like_one(launcher, tmp_path):
    """Scores, plan and gates are those of one; both train and measure, and one of them writes."""
    keys = ["model.train=null", "data.num_train=77", "data.num_test=51", "finetune.epochs=1"]
    keys += ["criterion.num_samples=21", "criterion.batch_size=16", "criterion.compensate=true"]
    keys += ["criterion.compensate_steps=1", "finetune.recalibrate_norm=true"]
    folders = [tmp_path / "one", tmp_path / "two"]
    assert main([str(QUICKSTART), *keys, f"output.dir={folders[0]}"]) == 0
    keys.append(f"output.dir={folders[1]}")
    given = ("sosp_hub.prune", str(QUICKSTART), *keys)
    done = launch(2, *given, timeout=300, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Load it") == 1
    assert done.stderr.count("measure final: done in") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    one, two = (load_file(folder / "saliency.safetensors") for folder in folders)
    assert_close(two, one, relative=1e-5)
    one, two = (json.loads((f / "sosp_report.json").read_text()) for f in folders)
    assert two["plan"]["kept"] == one["plan"]["kept"]
    assert_close(two["plan"]["gates"], one["plan"]["gates"], relative=1e-4)
    assert list(two["metrics"]) == list(one["metrics"])  # norms are kept by both or by neither
    for stage in two["metrics"].keys() - {"final"}:
        assert_close(two["metrics"][stage], one["metrics"][stage], what=stage)
    assert two["metrics"]["final"]["accuracy"]["n"] == 51
