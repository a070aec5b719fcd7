"""What each of several processes computes on data that does not divide."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from sosp_hub.allocation import allocate
from sosp_hub.criteria.compute.compensation import compensated, refined
from sosp_hub.criteria.compute.context import Context
from sosp_hub.data.loading import calibration_batches, make_loader
from sosp_hub.distributed import (
    from_main,
    make_accelerator,
    process_rows,
    process_state,
    process_sum,
)
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.training import TrainSection
from sosp_hub.reconstruction.norms import norm_moments, recalibrate_norm
from sosp_hub.scoring import make_criterion, score
from sosp_hub.structure.trace import trace
from sosp_hub.training import train_model

NUM_SAMPLES = 23
DRAWN = {"max_classes": 2, "num_draws": 2, "seed": 5}
SCORED = {
    "sosp_h": {"mode": "exact"},
    "sosp_i": {},
    "sosp_i drawn": DRAWN,
    "sosp_i surgeon": {"selection": "surgeon"},
    "sosp_i surgeon drawn": {"selection": "surgeon", **DRAWN},
    "sosp_i surgeon rescored": {"selection": "surgeon", "rescore_every": 4},
    "taylor": {},
    "taylor squared": {"form": "squared"},
    "fisher": {},
    "activation": {},
    "magnitude": {},
}


class Points(Dataset):
    class_names = ("a", "b", "c")

    def __init__(self, num):
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(num, 4, generator=generator)
        self.labels = torch.randint(3, (num,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return self.points[indices], self.labels[indices]


def norm_statistics(model):
    return {name: getattr(model[1], name).tolist() for name in ("running_mean", "running_var")}


def scores(rank, world):
    """Saliency on 23 samples in batches of 4, a share each, and what is kept of each group."""
    torch.manual_seed(1)
    layers = [nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
    graph = trace(model, (torch.randn(2, 4),))
    points: Any = Points(NUM_SAMPLES)
    batches = calibration_batches([points], 99, 4, rank=rank, num_processes=world)
    found = {}
    for name, given in SCORED.items():
        options = dict(given)
        criterion = name.partition(" ")[0]
        shared = {"process_sum": process_sum, "seed": options.pop("seed", 0)}
        if criterion == "sosp_i":
            shared["process_rows"] = process_rows
        saliency = score(model, graph, batches, criterion, **shared, **options)
        plan = allocate(graph, saliency, params=0.5)
        values = {group: each.tolist() for group, each in saliency.items()}
        found[name] = {"scores": values, "kept": {g: list(k) for g, k in plan.kept.items()}}
        if criterion == "sosp_i":
            each = model, graph.groups, batches
            made = make_criterion(criterion, **options).measure(Context(*each, **shared))
            plan = compensated(plan, graph.groups, made.measure(*each).matrix, 0.1)
            found[name]["gates"] = plan.gates
            measures = partial(made.measure, *each), partial(made.divergence, *each)
            found[name]["moved on"] = refined(plan, graph.groups, *measures, 2).gates
    return found


def results():
    accelerator = make_accelerator(seed=3)
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    points: Any = Points(NUM_SAMPLES)
    loader = accelerator.prepare_data_loader(make_loader(points, batch_size=4))
    found = evaluate(model, loader, ("accuracy", "loss", "per_class_accuracy"))
    one = evaluate(model, [(points.points[:5], points.labels[:5])] if rank == 0 else [], ("loss",))
    batches = [(points.points[i : i + 4], points.labels[i : i + 4]) for i in range(0, 20, 4)]
    model[1].running_mean.fill_(2.0)  # of other data
    moments = norm_moments(model, batches[rank::world])
    recalibrate_norm(model, batches[rank::world], moments)
    like = norm_statistics(model)
    recalibrate_norm(model, batches[rank::world])
    norm = norm_statistics(model)
    last = [(points.points[20:21], points.labels[20:21])] if rank == world - 1 else []
    recalibrate_norm(model, (batches[:1] if rank == 0 else []) + last)
    linear = nn.Linear(4, 3)
    settings = TrainSection(epochs=2, batch_size=6 // world, optimizer="sgd", learning_rate=0.1)
    train_model(linear, Points(24), settings, accelerator=accelerator, seed=3)
    return {
        "metrics": {name: [m.value, m.n, m.stderr] for name, m in found.items()},
        "only rank 0 has data": [one["loss"].value, one["loss"].n, one["loss"].stderr],
        "norm": norm,
        "norm like a dense one": like,
        "norm of one batch, and of one sample that is left out": norm_statistics(model),
        "sum": process_sum(torch.tensor([1.0 / world, 2.0 / world])).tolist(),
        "from main": from_main({"rank": rank}),
        "trained": linear.weight.tolist(),
        "scored": scores(rank, world),
    }


if __name__ == "__main__":
    made = results()
    (Path(sys.argv[1]) / f"{process_state().process_index}.json").write_text(json.dumps(made))
