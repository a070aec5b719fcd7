"""What each step costs as models grow: layers, width, structures, samples, processes.

    python -m tests.bench.scale            # some minutes; writes results/scale.md and scale.svg
    python -m tests.bench.scale reach      # a Llama of 1.1 billion parameters; results/reach.md
    python -m tests.bench.scale --toy      # seconds; prints the table only

Seconds of CPU time of this process (of processes: wall time of ``torchrun``), one thread; nothing
fails here, all is shown. ``reach`` also tells how much memory the process held at the height of
each step (resident set). The exponent is the slope between the last two points on logarithmic
scales: 1 is linear, 2 quadratic.
"""

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import sosp_hub

RESULTS = Path(__file__).parent / "results"
FULL = {
    "layers": (2, 4, 8, 16),
    "width": (64, 128, 256),
    "samples": (4, 8, 16, 32),
    "structures": (10**2, 10**3, 10**4, 10**5, 10**6),
    "processes": (1, 2),
}
TOY = {
    "layers": (1, 2),
    "width": (32, 64),
    "samples": (2, 4),
    "structures": (10**2, 10**3),
    "processes": (),
}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU time, and what was given."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def llama(layers: int, width: int) -> nn.Module:
    """A Llama of this size with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def steps(layers: int, width: int, samples: int) -> dict[str, float]:
    """Seconds of each step of a cut of 20 %."""
    model = llama(layers, width)
    tokens = torch.randint(256, (samples, 32), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens[:2], "use_cache": False}
    batches = [{"input_ids": each, "labels": each} for each in tokens.split(2)]
    took: dict[str, float] = {}
    took["trace"], graph = timed(lambda: sosp_hub.trace(model, inputs))
    took["score"], scores = timed(
        lambda: sosp_hub.score(model, graph, batches, criterion="sosp_h", mode="exact")
    )
    took["allocate"], plan = timed(lambda: sosp_hub.allocate(graph, scores, params=0.8))
    took["fast"], _ = timed(lambda: sosp_hub.apply(model, graph, plan, verify="fast", strict=True))
    took["thorough"], pruned = timed(lambda: sosp_hub.apply(model, graph, plan, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        took["save"], _ = timed(lambda: sosp_hub.save_pretrained(pruned, folder))
    return took


def structures(number: int) -> dict[str, float]:
    """Seconds of a trace and of an allocation over so many structures, without weights."""
    groups = max(1, number // 1000)
    with torch.device("meta"):
        width = number // groups
        blocks = [(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)) for _ in range(groups)]
        model = nn.Sequential(*(layer for block in blocks for layer in block))
    took: dict[str, float] = {}
    took["trace"], graph = timed(lambda: sosp_hub.trace(model, (torch.zeros(2, 8),)))
    scores = {name: torch.rand(group.size) for name, group in graph.groups.items()}
    took["allocate"], _ = timed(lambda: sosp_hub.allocate(graph, scores, params=0.5))
    return took


def processes(number: int) -> dict[str, float]:
    """Wall seconds of a whole run of the quickstart on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["model.train.epochs=1", "finetune.epochs=0", f"output.dir={folder}/out"]
        command = ["-m", "torch.distributed.run", "--nproc_per_node", str(number), "-m"]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *command, "sosp_hub.prune", "quickstart", *keys, "--quiet"],
            check=True, capture_output=True,
        )  # fmt: skip
        return {"run": time.perf_counter() - start}


def measure(sizes: dict[str, tuple[int, ...]]) -> dict[str, dict[int, dict[str, float]]]:
    """Seconds of each step along each axis, the others small."""
    run = {
        "layers": lambda n: steps(n, 64, 4),
        "width": lambda n: steps(2, n, 4),
        "samples": lambda n: steps(2, 64, n),
        "structures": structures,
        "processes": processes,
    }
    steps(1, 32, 2)  # what is loaded and made once
    found: dict[str, dict[int, dict[str, float]]] = {}
    for axis, numbers in sizes.items():
        for number in numbers:
            found.setdefault(axis, {})[number] = run[axis](number)
            print(axis, number, found[axis][number], file=sys.stderr)
    return found


REACH = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip
"""The shape of TinyLlama: 1.1 billion parameters."""
TOY_REACH = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


class Height:
    """Memory of this process at its height while something runs (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def gigabytes(self) -> float:
        """The largest resident set since this was made."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def reach(shape: dict[str, int], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds and gigabytes of each step from a config to a saved model without 20 %."""
    found: dict[str, dict[str, float]] = {}

    def step(name: str, run: Callable[[], Any]) -> Any:
        height = Height()
        seconds, result = timed(run)
        found[name] = {"CPU s": seconds, "GB at the height": height.gigabytes()}
        print(name, found[name], file=sys.stderr)
        return result

    step("imports alone", lambda: None)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    model = step(
        "build", lambda: transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    )
    tokens = torch.randint(shape["vocab_size"], (8, 128))
    inputs = {"input_ids": tokens[:1, :16], "use_cache": False}
    batches = [{"input_ids": each, "labels": each} for each in tokens.split(1)]
    graph = step("trace", lambda: sosp_hub.trace(model, inputs, outputs="logits"))
    for criterion in ("fisher", "sosp_h"):
        score = partial(sosp_hub.score, model, graph, batches, criterion=criterion)
        scores = step(criterion, score)
    plan = step("allocate", lambda: sosp_hub.allocate(graph, scores, params=0.8))
    small = step("rebuild and apply", lambda: sosp_hub.rebuild(model, graph, plan, batches))
    with tempfile.TemporaryDirectory() as folder:
        step("save", partial(sosp_hub.save_pretrained, small, folder))
    del small
    step("apply_ in place", lambda: sosp_hub.apply_(model, graph, plan, strict=True))
    return found


def reach_table(found: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table in Markdown."""
    units = list(next(iter(found.values())))
    rows = [f"| {name} | {' | '.join(f'{v:.3g}' for v in got.values())} |" for name, got in
            found.items()]  # fmt: skip
    return [f"| step | {' | '.join(units)} |", "|---" * (len(units) + 1) + "|", *rows]


def table(axis: str, rows: dict[int, dict[str, float]]) -> list[str]:
    """Lines of a table in Markdown, with the exponent at the end."""
    names = list(next(iter(rows.values())))
    lines = [f"| {axis} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for number, took in rows.items():
        lines.append(f"| {number:,} | {' | '.join(f'{took[name]:.3g}' for name in names)} |")
    if len(rows) > 1:
        (a, before), (b, after) = list(rows.items())[-2:]
        slopes = [
            math.log(max(after[n], 1e-9) / max(before[n], 1e-9)) / math.log(b / a) for n in names
        ]
        lines.append(f"| exponent | {' | '.join(f'{slope:.2f}' for slope in slopes)} |")
    return lines


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """A plot for each axis, logarithmic on both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 3.4), layout="constrained")
    for place, (axis, rows) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for name in next(iter(rows.values())):
            place.loglog(list(rows), [took[name] for took in rows.values()], "o-", label=name)
        place.set_xlabel(axis)
        place.set_ylabel("s")
        place.legend(fontsize=7)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("curves", "reach"), default="curves")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--toy", action="store_true", help="small sizes; writes nothing")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.what == "reach":
        found = reach(TOY_REACH if options.toy else REACH, getattr(torch, options.dtype))
        print(json.dumps(found) if options.json else "\n".join(reach_table(found)))
        return 0
    found = measure(TOY if options.toy else FULL)
    lines = [line for axis, rows in found.items() for line in ("", *table(axis, rows))]
    print(json.dumps(found) if options.json else "\n".join(lines))
    if not options.toy:
        draw(found, RESULTS / "scale.svg")
        head = (
            "# What each step costs as models grow\n\n"
            f"`python -m tests.bench.scale`, {datetime.date.today()}, torch {torch.__version__}, "
            f"{platform.machine()}, one thread; CPU seconds, wall seconds for processes. A Llama "
            "of 2 layers and width 64 with 4 texts of 32 tokens where an axis does not say "
            "otherwise; structures are those of linear layers without weights. No GPU was to be "
            "had.\n\n![curves](scale.svg)\n"
        )
        (RESULTS / "scale.md").write_text(head + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
