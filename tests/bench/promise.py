"""How often a promise of ``budget.max_drop`` is kept, and how much smaller models become by it.

    python -m tests.bench.promise FOLDER [--draws 100] [--held-out 1500]

``FOLDER`` holds Fashion-MNIST's IDX files. An MLP is trained on 20,000 images; the other 40,000 and
the test images are the population. Each draw takes held-out samples from it, searches, and looks up
what the chosen model really loses on the population. Prints one line a promise: draws whose promise
was not kept, those that found nothing to promise, and the MACs that were kept; beside them the
smallest model that is within the bound on the population.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sosp_hub
from sosp_hub.errors import BudgetError
from sosp_hub.evaluate import metrics_of_samples
from sosp_hub.promise.bound import lost_quality
from sosp_hub.promise.within import rows_of_dense, search
from sosp_hub.recipe.metrics import read_drops
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from tests.bench.rebuild import idx

PROMISES = ({"accuracy": 1.0}, {"accuracy": "1%"}, {"loss": "5%"}, {"divergence": 0.05})


def population(folder):
    parts = [("train", 60_000), ("t10k", 10_000)]
    images = [idx(folder / f"{stem}-images-idx3-ubyte.gz")[:num] for stem, num in parts]
    labels = [idx(folder / f"{stem}-labels-idx1-ubyte.gz")[:num] for stem, num in parts]
    return torch.cat(images).float().div(255).flatten(1), torch.cat(labels).long()


def trained(images, labels):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        for at in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[at]), labels[at]).backward()
            optimizer.step()
    return model.eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=1500)
    given = parser.parse_args()
    start = time.process_time()
    images, labels = population(given.folder)
    model = trained(images[:20_000], labels[:20_000])
    calibration = list(zip(images[:1024].split(128), labels[:1024].split(128), strict=True))
    others = list(zip(images[20_000:].split(1000), labels[20_000:].split(1000), strict=True))
    graph = sosp_hub.trace(model, (images[:2],))
    saliency = sosp_hub.score(model, graph, calibration, criterion="fisher")
    metrics = ("accuracy", "loss", "divergence")
    dense = metrics_of_samples(model, others, metrics, dense=model)
    known = {}

    def rows_of(plan, _=0.0):
        """On the whole population; each plan once."""
        key = plan.to_json()
        if key not in known:
            made = rebuilt_weights(model, graph, plan, calibration)
            pruned = sosp_hub.apply(made.model, graph, made.plan, verify="fast")
            known[key] = metrics_of_samples(pruned, others, metrics, dense=model)
        return known[key]

    def plan_of(targets):
        return sosp_hub.allocate(graph, saliency, **targets)

    print("| promise | broken | nothing promised | MACs kept, mean and range | true edge |")
    print("|---|---|---|---|---|")
    for promise in PROMISES:
        drops = read_drops(promise, ("accuracy", "loss"))
        (drop,) = drops
        whole = rows_of_dense(drops, dense)

        def true_loss(plan, drop=drop, whole=whole):
            rows = rows_of(plan)[drop.metric]
            return lost_quality(drop, whole[drop.metric], rows).value

        broken, kept = 0, []
        for seed in range(given.draws):
            order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
            drawn = order[: given.held_out]
            try:
                found, plan = search(
                    graph,
                    drops,
                    {name: rows[drawn] for name, rows in whole.items()},
                    plan_of,
                    lambda plan, _, drawn=drawn: {n: r[drawn] for n, r in rows_of(plan).items()},
                    {},
                    confidence=0.95,
                    num_probes=6,
                )
            except BudgetError:
                continue
            kept.append(found.point.cost["macs"])
            broken += true_loss(plan) > drop.amount
        edge = min(
            (
                share / 100
                for share in range(12, 100, 2)
                if true_loss(plan_of({"macs": share / 100})) <= drop.amount
            ),
            default=float("nan"),
        )
        mean = sum(kept) / max(len(kept), 1)
        print(
            f"| {drop.words()} | {broken} of {given.draws} | {given.draws - len(kept)} | "
            f"{100 * mean:.1f} % ({100 * min(kept):.1f} to {100 * max(kept):.1f}) | "
            f"{100 * edge:.0f} % |",
            flush=True,
        )
    print(f"{time.process_time() - start:.0f} s of CPU")


if __name__ == "__main__":
    main()
