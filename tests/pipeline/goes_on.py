"""Training that is stopped in the middle and goes on with another number of processes."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.distributed import make_accelerator, process_state
from sosp_hub.recipe.training import TrainSection
from sosp_hub.training import train_model
from tests.pipeline.each_process import Points


class StoppedError(Exception):
    """In the middle of the second epoch."""


def train(folder: Path | None, stop_at: int = 0) -> list[list[float]]:
    """Weights after two epochs; or nothing but a state, where it stops at a step."""
    accelerator = make_accelerator(seed=3)
    torch.manual_seed(1)
    model, steps = nn.Linear(4, 3), iter(range(1, 100))

    def penalty() -> torch.Tensor:
        if next(steps) == stop_at:
            raise StoppedError
        return torch.zeros(())

    points: Any = Points(24)
    config = TrainSection(
        epochs=2, batch_size=3, save_every_steps=1, optimizer="sgd", learning_rate=0.1
    )
    train_model(
        model, points, config, accelerator=accelerator, seed=3, checkpoint_dir=folder,
        penalty=penalty,
    )  # fmt: skip
    return model.weight.tolist()


def main(folder: Path) -> None:
    """Goes on where one process stopped, then stops for one to go on."""
    if process_state().process_index:
        time.sleep(1)  # the state of the other run must not be gone when this process comes
    accelerator = make_accelerator(seed=3)
    assert train(folder / "of one") == train(None)
    accelerator.wait_for_everyone()
    try:
        train(folder / "of two", stop_at=6)
    except StoppedError:
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
