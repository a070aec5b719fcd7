"""Cost of saliency against one plain weight-gradient pass over the same batches, in one run.

    python tests/bench/saliency.py                      # the default models
    python tests/bench/saliency.py resnet50 vit_tiny_patch16_224 --batch-size 4 --rounds 5
    python tests/bench/saliency.py resnet50 --batch-size 8 --peer    # beside Torch-Pruning
    python tests/bench/saliency.py --curves    # over the number of structures and of samples

Every method is timed in turn, round after round, and the least CPU time counts: what other
processes do in the meantime moves the ratios little. Memory is the peak of the bytes in tensors.
Random weights: neither cost depends on them. ``sosp_i`` holds a matrix of structures by structures
and is left out above 12,000 of them. ``--peer`` needs ``pip install torch-pruning``, whose Hessian
importance takes one backward pass for each sample, as its documentation does. Figures, with what
misses its target and why: ``results/saliency.md``.
"""

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity

import sosp_hub
import sosp_hub.zoo.timm
from sosp_hub.scoring import score
from sosp_hub.tasks.loss import batch_loss
from sosp_hub.types import DEFAULT_KINDS

MODELS = {  # samples of a batch, image size or tokens, target of exact SOSP-H
    "cifar_resnet20": (64, 32, 2.2),
    "vit_tiny_patch16_224": (8, 224, 2.0),
    "resnet50": (4, 224, 2.0),
    "mobilenetv2_100": (8, 224, 3.0),
    "smollm2_135m": (1, 128, None),
}
MOST_OF_SOSP_I = 12_000
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


def methods(
    model: nn.Module, example_inputs: Any, batches: list[Any], *, peer: bool = False
) -> dict[str, Callable[[], object]]:
    graph = sosp_hub.trace(model, example_inputs)
    num_structures = sum(g.size for g in graph.groups.values() if g.kind in DEFAULT_KINDS)

    def criterion(criterion: str, **options: object) -> Callable[[], object]:
        return lambda: score(model, graph, batches, criterion, **options)

    def each(run: Callable[[nn.Module, Any], None]) -> Callable[[], object]:
        return lambda: [run(model, batch) for batch in batches]

    found = {
        "weight gradient": each(weight_gradient),
        "sosp_h exact": criterion("sosp_h", mode="exact"),
        "sosp_h differences": criterion("sosp_h", mode="differences"),
        "sosp_h in weight space": each(weight_space_product),
        "sosp_i": criterion("sosp_i"),
        "taylor": criterion("taylor"),
        "fisher": criterion("fisher"),
        "magnitude": criterion("magnitude"),
    }
    if num_structures > MOST_OF_SOSP_I:
        del found["sosp_i"]
    if peer:
        found |= peer_methods(model, example_inputs, batches)
    return found


def peer_methods(
    model: nn.Module, example_inputs: Any, batches: list[Any]
) -> dict[str, Callable[[], object]]:
    """Torch-Pruning's Taylor and Hessian importance of every group, as its documentation has it."""
    import torch_pruning  # pyright: ignore[reportMissingImports]

    twin = copy.deepcopy(model).requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(twin, example_inputs[0])
    groups = list(graph.get_all_groups(ignored_layers=[twin.get_classifier()]))

    def taylor() -> object:
        twin.zero_grad()
        for images, labels in batches:
            functional.cross_entropy(twin(images), labels).backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
        return [importance(group) for group in groups]

    def hessian() -> object:
        importance = torch_pruning.importance.GroupHessianImportance()
        importance.zero_grad()
        for images, labels in batches:
            for loss in functional.cross_entropy(twin(images), labels, reduction="none"):
                twin.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(twin)
        return [importance(group) for group in groups]

    return {"Torch-Pruning Taylor": taylor, "Torch-Pruning Hessian": hessian}


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


def report(name: str, batch_size: int | None, rounds: int, peer: bool) -> None:
    usual, size, target = MODELS.get(name, (8, 224, None))
    batch_size = batch_size or usual
    model, example_inputs, batch = subject(name, batch_size, size)
    runs = methods(model, example_inputs, [batch], peer=peer)
    print(f"\n{name}, {batch_size} samples of size {size}, {torch.get_num_threads()} thread(s)")
    table(runs, rounds, {"sosp_h exact": f"target {target}"} if target else {})
    sys.stdout.flush()


def table(runs: dict[str, Callable[[], object]], rounds: int, notes: dict[str, str]) -> None:
    peaks = {method: peak_bytes(run) for method, run in runs.items()}
    times = seconds(runs, rounds)
    unit = next(iter(runs))
    print(f"{'':24}{'CPU s':>8}{'ratio':>8}{'MB':>8}{'ratio':>8}")
    for method in runs:
        print(
            f"{method:24}{times[method]:8.3f}{times[method] / times[unit]:8.2f}"
            f"{peaks[method] / 1e6:8.0f}{peaks[method] / peaks[unit]:8.2f}"
            f"   {notes.get(method, '')}".rstrip()
        )


def curves(rounds: int) -> None:
    """One hidden layer of 10^2 to 10^6 neurons; then ResNet-20 on 16 to 256 samples."""
    for num in (10**2, 10**3, 10**4, 10**5, 10**6):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, num), nn.ReLU(), nn.Linear(num, 10)).eval()
        batch = torch.randn(16, 32), torch.arange(16) % 10
        print(f"\n{num:,} structures, 16 samples")
        table(methods(model, (batch[0][:2],), [batch]), rounds, {})
    model, example_inputs, (images, labels) = subject("cifar_resnet20", 16, 32)
    for num in (1, 4, 16):
        batches = [(images, labels)] * num
        print(f"\ncifar_resnet20, {16 * num} samples in batches of 16")
        table(methods(model, example_inputs, batches), rounds, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning too, on timm models")
    parser.add_argument("--curves", action="store_true", help="these alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.curves:
        curves(arguments.rounds)
        return
    for name in arguments.models:
        peer = arguments.peer and name != "smollm2_135m"
        report(name, arguments.batch_size, arguments.rounds, peer)


if __name__ == "__main__":
    main()
