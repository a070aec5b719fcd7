"""Three processes on data that does not divide give the numbers of one; no sample counts twice."""

import json
import os
import subprocess
import sys

from tests.compare import assert_close
from tests.pipeline import each_process


def test_three_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "3", "-m", each_process.__name__, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=180, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = each_process.results()
    assert expected["metrics"]["accuracy"][1] == each_process.NUM_SAMPLES
    for rank in range(3):
        assert_close(json.loads((tmp_path / f"{rank}.json").read_text()), expected)
