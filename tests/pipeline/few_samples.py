"""What three processes compute on one sample, which two of them do not have."""

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sosp_hub.allocation import allocate
from sosp_hub.data.loading import calibration_batches, make_loader
from sosp_hub.distributed import make_accelerator, process_rows, process_sum
from sosp_hub.errors import SospHubError
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.training import TrainSection
from sosp_hub.reconstruction.norms import recalibrate_norm
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from sosp_hub.training import train_model
from tests.pipeline.each_process import Points

CRITERIA = ("taylor", "fisher", "activation", "sosp_h", "sosp_i", "magnitude")


def results() -> dict[str, Any]:
    accelerator = make_accelerator(seed=3)
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(5, 3)).eval()
    graph = trace(model, (torch.randn(2, 4),))
    points: Any = Points(1)
    loader = accelerator.prepare_data_loader(make_loader(points, batch_size=4))
    measured = evaluate(model, loader, ("accuracy", "loss"))
    batches = calibration_batches([points], 8, 4, rank=rank, num_processes=world)
    found: dict[str, Any] = {"metrics": {name: [m.value, m.n] for name, m in measured.items()}}
    for name in CRITERIA:
        shared: dict[str, Any] = {"process_sum": process_sum}
        if name == "sosp_i":
            shared["process_rows"] = process_rows
        saliency = score(model, graph, batches, name, **shared)
        plan = allocate(graph, saliency, params=0.5)
        found[name] = {group: list(kept) for group, kept in plan.kept.items()}
    for name, action in {
        "norms": lambda: recalibrate_norm(model, batches),
        "training": lambda: train_model(
            nn.Linear(4, 3), points, TrainSection(epochs=1, batch_size=1), accelerator=accelerator
        ),
    }.items():
        try:
            action()
            found[name] = "done"
        except SospHubError as error:
            found[name] = type(error).__name__
    return found


def note_whether_left(path: Path) -> None:
    path.write_text(str(not dist.is_initialized()))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    # Registered before the processes are joined, so that it runs after they are left.
    atexit.register(note_whether_left, folder / f"{rank}.left")
    (folder / f"{rank}.json").write_text(json.dumps(results()))
