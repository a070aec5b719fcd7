"""Three processes on data that does not divide give the numbers of one; no sample counts twice."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from sosp_hub.prune import main
from tests.compare import assert_close
from tests.pipeline import each_process

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def test_three_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "3", "-m", each_process.__name__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = each_process.results()
    assert expected["metrics"]["accuracy"][1] == each_process.NUM_SAMPLES
    for rank in range(3):
        assert_close(json.loads((tmp_path / f"{rank}.json").read_text()), expected)


def test_two_processes_prune_like_one(tmp_path):
    """Scores, plan and gates are those of one; both train and measure, and one of them writes."""
    keys = ["model.train=null", "data.num_train=77", "data.num_test=51", "finetune.epochs=1"]
    keys += ["criterion.num_samples=61", "criterion.batch_size=16", "criterion.compensate=true"]
    folders = [tmp_path / "one", tmp_path / "two"]
    assert main([str(QUICKSTART), *keys, f"output.dir={folders[0]}"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "sosp_hub.prune", str(QUICKSTART), *keys]
    command += [f"output.dir={folders[1]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Load it") == 1
    assert done.stderr.count("measure final") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    one, two = (load_file(folder / "saliency.safetensors") for folder in folders)
    assert_close(two, one, relative=1e-5)
    one, two = (json.loads((f / "sosp_report.json").read_text()) for f in folders)
    assert two["plan"]["kept"] == one["plan"]["kept"]
    assert_close(two["plan"]["gates"], one["plan"]["gates"], relative=1e-4)
    assert_close(two["metrics"]["dense"], one["metrics"]["dense"])
    assert two["metrics"]["final"]["accuracy"]["n"] == 51
