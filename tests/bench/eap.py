"""EAP: how far scores depend on the number of samples, and what they cost beside forward passes.

    python -m tests.bench.eap                             # both
    python -m tests.bench.eap --plot stability.svg
    python -m tests.bench.eap --only cost --models resnet50 --batch-size 16

Stability: a ResNet-20 is trained on handwritten digits, scored with all calibration samples and
with shares of them; Spearman's correlation inside each group, mean over the groups, and least.
Cost: CPU time of scoring over that of plain forward passes on the same batches, each the least of
some rounds, taken in turn. Random weights: the cost does not depend on them.
"""

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor

import sosp_hub
import sosp_hub.zoo.timm
from sosp_hub.data.loading import calibration_batches, load_split
from sosp_hub.data.source import open_data
from sosp_hub.recipe.schema import DataSection, ModelSection
from sosp_hub.recipe.training import TrainSection
from sosp_hub.scoring import score
from sosp_hub.training import train_model
from sosp_hub.zoo.load import load_model

SHARES = (1 / 8, 1 / 4, 1 / 2)
READINGS = ("set", "map")


def ranks(values: Tensor) -> np.ndarray:
    return values.argsort().argsort().double().numpy()


def spearman(one: Tensor, two: Tensor) -> float:
    return float(np.corrcoef(ranks(one), ranks(two))[0, 1])


def stability(num_samples: int, seeds: int, batch_size: int) -> dict[str, dict[float, list[float]]]:
    """Correlations of all groups and seeds, by reading and share."""
    data = open_data(DataSection(id="sklearn/digits", test=None), "image-classification")
    section = ModelSection(
        library="timm", id="cifar_resnet20", task="image-classification", pretrained=False
    )
    torch.manual_seed(0)
    loaded = load_model(section, data=data.info)
    train = load_split(data, "train", loaded.processor)
    train_model(loaded.model, train, TrainSection(epochs=6, learning_rate=3e-3))
    batches = calibration_batches(train, 2, 2)
    graph = sosp_hub.trace(loaded.model, (batches[0][0],))
    found: dict[str, dict[float, list[float]]] = {
        reading: {share: [] for share in SHARES} for reading in READINGS
    }
    for reading in READINGS:
        for seed in range(seeds):
            scores = {
                share: score(
                    loaded.model, graph, reading=reading, criterion="eap",
                    batches=calibration_batches(
                        train, round(share * num_samples), batch_size, seed=seed
                    ),
                )
                for share in (*SHARES, 1.0)
            }  # fmt: skip
            for share in SHARES:
                for name, whole in scores[1.0].items():
                    found[reading][share].append(spearman(scores[share][name], whole))
    return found


def draw(found: dict[str, dict[float, list[float]]], num_samples: int) -> Figure:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for reading, by_share in found.items():
        numbers = [round(share * num_samples) for share in by_share]
        means = [np.mean(values) for values in by_share.values()]
        low = [mean - min(values) for mean, values in zip(means, by_share.values(), strict=True)]
        high = [max(values) - mean for mean, values in zip(means, by_share.values(), strict=True)]
        axes.errorbar(numbers, means, [low, high], marker="o", capsize=3, label=reading)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"samples (of {num_samples})")
    axes.set_ylabel("Spearman, with all samples")
    axes.legend(title="reading", frameon=False)
    return figure


def cost(names: list[str], batch_size: int, rounds: int) -> None:
    for name in names:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        images = torch.randn(batch_size, 3, 224, 224)
        batches = [(images, torch.zeros(batch_size, dtype=torch.long))]
        graph = sosp_hub.trace(model, (images[:2],))

        def forward(model: Any = model, images: Tensor = images) -> None:
            with torch.no_grad():
                model(images)

        methods: dict[str, Callable[[], object]] = {"forward": forward}
        for reading in READINGS:
            methods[reading] = lambda reading=reading, model=model, graph=graph, batches=batches: (
                score(model, graph, batches, "eap", reading=reading)
            )
        seconds = dict.fromkeys(methods, float("inf"))
        for _ in range(rounds):
            for label, method in methods.items():
                start = time.process_time()
                method()
                seconds[label] = min(seconds[label], time.process_time() - start)
        for reading in READINGS:
            print(
                f"{name:<16} batch of {batch_size}: {reading:<4}"
                f" {seconds[reading]:6.2f} s, {seconds[reading] / seconds['forward']:.2f} x the"
                f" forward pass ({seconds['forward']:.2f} s)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["stability", "cost"])
    parser.add_argument("--plot", help="file for the figure of stability")
    parser.add_argument("--num-samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.getLogger("sosp_hub").setLevel(logging.WARNING)
    if given.only != "cost":
        found = stability(given.num_samples, given.seeds, batch_size=32)
        for reading, by_share in found.items():
            for share, values in by_share.items():
                print(
                    f"{reading:<4} {round(share * given.num_samples):>5} of {given.num_samples}"
                    f" samples: Spearman {np.mean(values):.3f}, least of {len(values)}"
                    f" {min(values):.3f}"
                )
        if given.plot:
            draw(found, given.num_samples).savefig(given.plot)
    if given.only != "stability":
        cost(given.models, given.batch_size, given.rounds)


if __name__ == "__main__":
    main()
