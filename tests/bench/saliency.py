"""Cost of saliency against one plain weight-gradient pass over the same batches, in one run.

    python tests/bench/saliency.py                      # the default models
    python tests/bench/saliency.py resnet50 vit_tiny_patch16_224 --batch-size 4 --rounds 5

Every method is timed in turn, round after round, and the least CPU time counts: what other
processes do in the meantime moves the ratios little. Memory is the peak of the bytes in tensors.
Random weights: neither cost depends on them.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

import sosp_hub
import sosp_hub.zoo.timm
from sosp_hub.criteria.registry import score

MODELS = {  # batch size, image size, target of exact SOSP-H
    "cifar_resnet20": (64, 32, 2.2),
    "vit_tiny_patch16_224": (8, 224, 2.0),
    "resnet50": (4, 224, 2.0),
    "mobilenetv2_100": (8, 224, 3.0),
}
KINDS = ("channel", "head", "kv_group", "neuron")


def weight_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """The unit: forward and backward to all weights, in eval mode."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    torch.autograd.grad(loss, list(model.parameters()))


def weight_space_product(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Double backward by the weights, as SOSP-H is usually computed."""
    weights = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        first = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad(first, weights, [weight.detach() for weight in weights])


def methods(name: str, batch_size: int, size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    batch = torch.randn(batch_size, 3, size, size), torch.arange(batch_size) % 10
    graph = sosp_hub.trace(model, (batch[0][:2],))

    def criterion(criterion: str, **options: object) -> Callable[[], object]:
        return lambda: score(model, graph, [batch], criterion, kinds=KINDS, **options)

    return {
        "weight gradient": lambda: weight_gradient(model, batch),
        "sosp_h exact": criterion("sosp_h", mode="exact"),
        "sosp_h differences": criterion("sosp_h", mode="differences"),
        "sosp_h in weight space": lambda: weight_space_product(model, batch),
        "taylor": criterion("taylor"),
        "magnitude": criterion("magnitude"),
    }


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that one run holds at a time."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def report(name: str, batch_size: int | None, rounds: int) -> None:
    usual, size, target = MODELS.get(name, (8, 224, 2.2))
    batch_size = batch_size or usual
    runs = methods(name, batch_size, size)
    peaks = {method: peak_bytes(run) for method, run in runs.items()}
    times = seconds(runs, rounds)
    unit = next(iter(runs))
    threads = torch.get_num_threads()
    print(f"\n{name}, batch {batch_size} of {size}x{size}, {threads} thread(s)")
    print(f"{'':24}{'CPU s':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}")
    for method in runs:
        goal = f"   target {target}" if method == "sosp_h exact" else ""
        print(
            f"{method:24}{times[method]:8.3f}{times[method] / times[unit]:8.2f}"
            f"{peaks[method] / 1e6:8.0f}{peaks[method] / peaks[unit]:8.2f}{goal}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.models:
        report(name, arguments.batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
