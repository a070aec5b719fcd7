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
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity

import sosp_hub
import sosp_hub.zoo.timm
from sosp_hub.criteria.registry import score
from sosp_hub.zoo.loss import batch_loss

MODELS = {  # samples of a batch, image size or tokens, target of exact SOSP-H
    "cifar_resnet20": (64, 32, 2.2),
    "vit_tiny_patch16_224": (8, 224, 2.0),
    "resnet50": (4, 224, 2.0),
    "mobilenetv2_100": (8, 224, 3.0),
    "smollm2_135m": (1, 128, None),
}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def weight_gradient(model: nn.Module, batch: Any) -> None:
    """The unit: forward and backward to all weights, in eval mode."""
    torch.autograd.grad(batch_loss(model, batch).value, list(model.parameters()))


def weight_space_product(model: nn.Module, batch: Any) -> None:
    """Double backward by the weights, as SOSP-H is usually computed."""
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = batch_loss(model, batch).value
        first = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad(first, weights, [weight.detach() for weight in weights])


def subject(name: str, num_samples: int, size: int) -> tuple[nn.Module, Any, Any]:
    """A model with random weights, its example inputs and a batch."""
    torch.manual_seed(0)
    if name == "smollm2_135m":
        config = transformers.LlamaConfig(**SMOLLM2_135M, use_cache=False)
        tokens = torch.randint(config.vocab_size, (num_samples, size))
        batch = {"input_ids": tokens, "labels": tokens}
        return transformers.LlamaForCausalLM(config).eval(), {"input_ids": tokens[:, :16]}, batch
    model = timm.create_model(name, num_classes=10).eval()
    images = torch.randn(num_samples, 3, size, size)
    return model, (images[:2],), (images, torch.arange(num_samples) % 10)


def methods(name: str, num_samples: int, size: int) -> dict[str, Callable[[], object]]:
    model, example_inputs, batch = subject(name, num_samples, size)
    graph = sosp_hub.trace(model, example_inputs)

    def criterion(criterion: str, **options: object) -> Callable[[], object]:
        return lambda: score(model, graph, [batch], criterion, **options)

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
    usual, size, target = MODELS.get(name, (8, 224, None))
    batch_size = batch_size or usual
    runs = methods(name, batch_size, size)
    peaks = {method: peak_bytes(run) for method, run in runs.items()}
    times = seconds(runs, rounds)
    unit = next(iter(runs))
    threads = torch.get_num_threads()
    print(f"\n{name}, {batch_size} samples of size {size}, {threads} thread(s)")
    print(f"{'':24}{'CPU s':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}")
    for method in runs:
        goal = f"   target {target}" if target and method == "sosp_h exact" else ""
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
