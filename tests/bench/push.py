"""Pushing a large folder to the loopback hub: memory and speed beside a plain `upload_folder`.

    python -m tests.bench.push [--megabytes 500] [--repeats 3]

Each push runs in a process of its own; memory is its peak above what it held before the push.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.hub.loopback import Hub, User

TOKEN = "hf_benchbenchbench01"
_CLIENT = """
import json, resource, sys, threading, time
import huggingface_hub
import sosp_hub.hub.push
how, folder, repo_id = sys.argv[1:]

def now_kb():
    return int(open("/proc/self/status").read().partition("VmRSS:")[2].split()[0])

baseline, start = now_kb(), time.perf_counter()
if how == "push_to_hub":
    sosp_hub.hub.push.push_to_hub(folder, repo_id)
else:
    huggingface_hub.create_repo(repo_id)
    huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "above_baseline_mb": (peak - baseline) / 1024}))
"""


def measure(how: str, folder: Path, repo_id: str, endpoint: str, home: Path) -> dict[str, float]:
    """One push in a fresh process."""
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-c", _CLIENT, how, str(folder), repo_id]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"push_to_hub": [], "upload_folder": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
        size = options.megabytes * 1_000_000 // options.shards
        for i in range(options.shards):
            name = f"model-{i + 1:05}-of-{options.shards:05}.safetensors"
            (folder / name).write_bytes(os.urandom(size))
        for repeat in range(options.repeats):
            for how, measured in results.items():
                work = Path(temporary) / f"{how}-{repeat}"
                with Hub(work / "hub") as hub:
                    hub.users = {TOKEN: User("me")}
                    repo_id = f"me/{how.replace('_', '-')}"
                    measured.append(measure(how, folder, repo_id, hub.endpoint, work / "home"))
                    for path in folder.iterdir():
                        stored = hub.repos[repo_id].refs["main"][-1].files[path.name]
                        if stored.size != path.stat().st_size:
                            raise SystemExit(f"{path.name} did not arrive")
                for path in (work / "hub").iterdir():
                    path.unlink()
    print(f"{options.megabytes} MB in {options.shards} shards, median of {options.repeats}")
    print(f"{'':16}{'seconds':>10}{'MB/s':>8}{'peak above baseline':>24}")
    for how, measured in results.items():
        seconds = statistics.median(one["seconds"] for one in measured)
        peak = statistics.median(one["above_baseline_mb"] for one in measured)
        speed = options.megabytes / seconds
        print(f"{how:16}{seconds:10.2f}{speed:8.0f}{peak:21.0f} MB")


if __name__ == "__main__":
    main()
