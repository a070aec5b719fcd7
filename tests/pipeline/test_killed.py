"""``kill -9`` in every stage: the same command goes on and ends as a run that nobody touched."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.compare import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is a fork"),
]

RECIPE = """
model:
  library: timm
  id: cifar_resnet20
  task: image-classification
  pretrained: false
  train: {epochs: 1, num_samples: 64, batch_size: 32, save_every_steps: 1}
data: {id: sklearn/digits, num_train: 96, num_test: 48}
criterion: {name: taylor, num_samples: 24, batch_size: 16}
budget: {macs: 0.6}
rebuild: {num_samples: 24}
finetune: {epochs: 1, batch_size: 32, save_every_steps: 1, distill: 0.5}
evaluate: {metrics: [accuracy, loss], latency: false}
output: {figures: false}
"""


def test_a_run_that_is_killed_in_every_stage_ends_like_one_that_was_not(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "tests.pipeline.killed", str(recipe)]
    done = subprocess.run(
        [*command, str(tmp_path / "whole"), str(tmp_path / "killed")],
        capture_output=True, text=True, check=False, timeout=2400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    stages = {place.partition(":")[0] for place in found["killed"]}
    assert stages >= {
        *("dense", "dense_metrics", "saliency", "plan", "cut_metrics", "rebuilt"),
        *("rebuilt_metrics", "recalibrated_metrics", "final", "final_metrics"),
        *("state of step 1", "result written", "result in place", "half removed"),
    }
    assert found["killed"] == found["points"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "recipe.yaml", "whole"]
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert files(whole) == files(killed)
    first, second = (
        json.loads((folder / "sosp_report.json").read_text()) for folder in (whole, killed)
    )
    for key in ("metrics", "plan", "groups", "cost", "history", "recovery", "rebuild"):
        assert without_times(second[key]) == without_times(first[key]), key
    assert second["timings_s"].keys() == first["timings_s"].keys()
    weights = load_file(whole / "model.safetensors")
    assert_close(load_file(killed / "model.safetensors"), weights, relative=0)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def without_times(record):
    if not isinstance(record, dict):
        return record
    unequal = ("seconds", "peak_bytes")
    return {key: without_times(value) for key, value in record.items() if key not in unequal}
