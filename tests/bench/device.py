"""What only an accelerator can show, in one command: correctness, cost, memory, latency.

    python -m tests.bench.device --json device.json      # a card of 80 GB or more, under 8 minutes
    python -m tests.bench.device --toy                   # any machine; seconds

Prints one table and, with ``--json``, writes the same numbers. Random weights: what is measured
does not depend on them. A part that fails is told and the others go on.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

import sosp_hub
from sosp_hub.pipeline.memory import PeakMemory
from sosp_hub.tasks.loss import batch_loss

CAUSAL = {"use_cache": False}
SIZES: dict[str, dict[str, Any]] = {
    "toy": {
        "images": {"test_resnet": (2, 64)},
        "llama": {"tiny": (2, 64, 2)},
        "tokens": 16,
        "round_to": (1, 8),
    },
    "full": {
        "images": {"resnet50": (32, 224), "vit_base_patch16_224": (32, 224)},
        "llama": {"1b": (22, 2048, 4), "8b": (32, 4096, 2)},
        "tokens": 512,
        "round_to": (1, 8, 64, 128),
    },
}


def timed(run: Callable[[], Any], rounds: int = 3) -> float:
    """Least seconds of some rounds; the first one, which warms up, is not counted."""
    run()
    best = float("inf")
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        best = min(best, time.perf_counter() - start)
    return best


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def image_model(name: str, batch: int, size: int) -> tuple[nn.Module, Any, Any]:
    """A timm model, its inputs, and a batch with labels."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(batch, 3, size, size)
    return model, (images[:2],), (images, torch.arange(batch) % 10)


def llama(layers: int, width: int, batch: int, tokens: int) -> tuple[nn.Module, Any, Any]:
    """A Llama, its inputs, and a batch with labels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512 if width < 1024 else 32000, hidden_size=width, num_hidden_layers=layers,
        intermediate_size=width * 7 // 2, num_attention_heads=max(4, width // 128),
        num_key_value_heads=max(2, width // 512),
    )  # fmt: skip
    dtype = torch.float32 if width < 1024 else torch.bfloat16
    with torch.device(_device()):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    words = torch.randint(512, (batch, tokens))
    return model, {"input_ids": words[:2, :8], **CAUSAL}, {"input_ids": words, "labels": words}


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def moved(value: Any, device: torch.device) -> Any:
    """The same nesting on a device."""
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def agrees(name: str, size: tuple[int, int]) -> Iterator[tuple[str, float]]:
    """How far scores on the device are from those on the CPU, relative to the largest."""
    model, inputs, batch = image_model(name, *size)
    batch = tuple(each[:4] for each in batch)
    graph = sosp_hub.trace(model, inputs)

    def scores(device: torch.device, dtype: torch.dtype, mode: str) -> torch.Tensor:
        twin = copy.deepcopy(model).to(device, dtype)
        given = [(batch[0].to(device, dtype), batch[1].to(device))]
        found = sosp_hub.score(twin, graph, given, criterion="sosp_h", mode=mode)
        return torch.cat([each.double().cpu().flatten() for each in found.values()])

    expected = scores(torch.device("cpu"), torch.float32, "exact")
    for mode in ("exact", "differences"):
        for dtype in (torch.float32, torch.bfloat16):
            found = scores(_device(), dtype, mode)
            error = float((found - expected).abs().max() / expected.abs().max())
            yield f"{name}: {mode} in {str(dtype)[6:]}, error against the CPU", error


def costs(name: str, model: nn.Module, inputs: Any, batch: Any) -> Iterator[tuple[str, float]]:
    """Seconds and peak of scoring beside a plain pass, then of a cut."""
    graph = sosp_hub.trace(model, inputs)
    model, batch = model.to(_device()), moved(batch, _device())

    def plain() -> None:
        torch.autograd.grad(batch_loss(model, batch).value, list(model.parameters()))

    unit = timed(plain)
    peak = PeakMemory()
    plain()
    held = peak.grown_bytes() or 0
    yield f"{name}: plain pass, s", unit
    yield f"{name}: plain pass, GB beside the weights", held / 1e9
    for mode in ("exact", "differences"):

        def score(mode: str = mode) -> dict[str, torch.Tensor]:
            return sosp_hub.score(model, graph, [batch], criterion="sosp_h", mode=mode)

        yield f"{name}: {mode} over plain, time", timed(score, 2) / unit
        peak = PeakMemory()
        score()
        yield f"{name}: {mode}, GB beside the weights", (peak.grown_bytes() or 0) / 1e9
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    plan = sosp_hub.allocate(graph, scores, params=0.8)
    start = time.perf_counter()
    pruned = sosp_hub.apply(model, graph, plan, verify="fast", strict=True)
    _wait()
    yield f"{name}: fast cut, s", time.perf_counter() - start
    start = time.perf_counter()
    sosp_hub.rebuild(copy.deepcopy(model), graph, plan, [batch])
    _wait()
    yield f"{name}: rebuild of one batch, s", time.perf_counter() - start
    del pruned


def latencies(
    name: str, model: nn.Module, inputs: Any, batch: Any, steps: tuple[int, ...]
) -> Iterator[tuple[str, float]]:
    """Seconds of a pass (and of a token more) of the dense model and of cuts in several steps."""
    graph = sosp_hub.trace(model, inputs)
    model, batch = model.to(_device()), moved(batch, _device())
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")

    @torch.no_grad()
    def run(each: nn.Module) -> Iterator[tuple[str, float]]:
        if not isinstance(batch, dict):
            yield "pass", timed(lambda: each(batch[0]))
            return
        words = batch["input_ids"]
        yield "prefill", timed(lambda: each(input_ids=words, use_cache=False))
        new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        yield "8 tokens more", timed(lambda: each.generate(words, **new), 1)

    for what, seconds in run(model):
        yield f"{name}: dense, {what}, s", seconds
    for step in steps:
        plan = sosp_hub.allocate(graph, scores, params=0.7, round_to=step)
        pruned = sosp_hub.apply(model, graph, plan, verify="fast", strict=True)
        for what, seconds in run(pruned):
            yield f"{name}: 70 % kept in steps of {step}, {what}, s", seconds
        del pruned


def measure(sizes: dict[str, Any]) -> dict[str, float | str]:
    """All numbers by name; the reason where a part fails."""
    found: dict[str, float | str] = {}

    def take(name: str, part: Callable[[], Iterator[tuple[str, float]]]) -> None:
        try:
            for key, number in part():
                found[key] = number
                print(f"{key}: {number:.4g}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001 - the other parts go on
            found[f"{name}: FAILED"] = f"{type(error).__name__}: {error}"

    for name, size in sizes["images"].items():
        take(f"{name} agrees", lambda name=name, size=size: agrees(name, size))
        take(f"{name} costs", lambda name=name, size=size: costs(name, *image_model(name, *size)))
        take(
            f"{name} latencies",
            lambda name=name, size=size: latencies(
                name, *image_model(name, *size), sizes["round_to"]
            ),
        )
    for name, size in sizes["llama"].items():
        made = lambda size=size: llama(*size, sizes["tokens"])  # noqa: E731
        take(f"llama {name} costs", lambda n=name, m=made: costs(f"llama {n}", *m()))
        take(
            f"llama {name} latencies",
            lambda n=name, m=made: latencies(f"llama {n}", *m(), sizes["round_to"]),
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="small sizes, for any machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.accelerator.is_available():
        parser.error("no accelerator is here; --toy runs the same parts at small sizes on a CPU")
    device = _device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    start = time.perf_counter()
    found = measure(SIZES["toy" if options.toy else "full"])
    about = {"device": name, "torch": torch.__version__, "seconds": time.perf_counter() - start}
    print(f"{name}, torch {torch.__version__}, {about['seconds']:.0f} s\n")
    width = max(map(len, found))
    for key, number in found.items():
        print(f"{key:<{width}}  {number if isinstance(number, str) else format(number, '.4g')}")
    if options.json:
        options.json.write_text(json.dumps({"about": about, "numbers": found}, indent=1) + "\n")
    return int(any(isinstance(number, str) for number in found.values()))


if __name__ == "__main__":
    sys.exit(main())
