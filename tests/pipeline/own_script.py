"""What a person's own script does in each of several processes, without a recipe."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import sosp_hub

WAYS = {
    "labels": {},
    "a probe": {"probe_steps": 2},
    "outputs from disk": {"distill": 0.5, "top_k": 2},
    "states": {"hidden": 1.0},
}


def results(world):
    """Weights and held-out losses after training a cut model in each of these ways."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(*layers), nn.Linear(6, 3)).eval()
    samples = list(zip(torch.randn(40, 4), torch.arange(40) % 3, strict=True))
    batches = [tuple(map(torch.stack, zip(*samples[:20], strict=True)))]
    graph = sosp_hub.trace(model, (batches[0][0][:2],))
    saliency = sosp_hub.score(model, graph, batches, "fisher")
    plan = sosp_hub.allocate(graph, saliency, params=0.7)
    small = sosp_hub.rebuild(model, graph, plan, batches)
    found = {}
    for name, way in WAYS.items():
        trained = sosp_hub.finetune(
            small, samples, learning_rate=1e-2, epochs=2, batch_size=8 // world, held_out=0.2,
            teacher=model if {"distill", "hidden"} & way.keys() else None, **way,
        )  # fmt: skip
        weights = [parameter.tolist() for parameter in trained.parameters()]
        found[name] = {"weights": weights, "accuracy": accuracy(trained, batches)}
    return found


def accuracy(model, batches):
    return sosp_hub.evaluate(model, batches, ("accuracy",))["accuracy"].value


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = results(int(os.environ["WORLD_SIZE"]))
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
