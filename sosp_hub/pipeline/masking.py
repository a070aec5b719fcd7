"""Training with masks, for the criterion `scp`: the epoch is selected on held-out samples."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn

from sosp_hub.data.loading import make_loader
from sosp_hub.data.split import Part, Split
from sosp_hub.distributed import is_main, logger, wait_for_everyone
from sosp_hub.errors import DataError
from sosp_hub.evaluate import evaluate
from sosp_hub.finetune import finetune
from sosp_hub.recipe.training import MaskTrainSection
from sosp_hub.soft_masks import SoftMasks


def train_with_masks(
    masks: SoftMasks,
    train: Split,
    augmented: Split,
    config: MaskTrainSection,
    *,
    state: Path,
    accelerator: Accelerator,
    seed: int,
    num_workers: int,
) -> dict[str, Any]:
    """Trains the model in place; what its masks cut is silent afterwards.

    Args:
        masks: The masks and their model.
        train: The train split; a part of it selects the epoch.
        augmented: The same samples for the other part.
        config: How to train.
        state: Folder for resumable state, the best epoch so far included.
        accelerator: Of this run.
        seed: Of the part, and of all that is random in training.
        num_workers: Processes that load data.

    Returns:
        ``history``, ``epoch`` that was selected, its ``loss`` on the ``num_held_out`` samples, and
        ``num_off``, channels that are silent.

    Raises:
        DataError: Too few samples to hold some out.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    number = math.ceil(config.held_out * len(train))
    if number >= len(train):
        raise DataError(
            f"criterion.train.held_out: {config.held_out} of {len(train)} samples leaves none to "
            "train with; raise data.num_train"
        )
    loader = make_loader(Part(train, order[:number]), config.batch_size, num_workers=num_workers)
    loader = accelerator.prepare_data_loader(loader)
    first = config.epochs - math.ceil(config.select_from * config.epochs) + 1
    best = _Best(masks.model, state)

    def select(epoch: int) -> None:
        if epoch >= first:
            best.offer(epoch, evaluate(masks.model, loader, ("loss",))["loss"].value)

    with masks.installed():
        history = finetune(
            masks.model,
            Part(augmented, order[number:]),
            config,
            checkpoint_dir=state,
            accelerator=accelerator,
            seed=seed,
            num_workers=num_workers,
            description="train masks",
            penalty=lambda: masks.penalty(config.sparsity, config.weight_decay),
            after_epoch=select,
        )
    found = best.load()
    num_off = masks.harden_()
    logger.info("scp: epoch %d of %d; %d channels are off", found["epoch"], config.epochs, num_off)
    return {"history": history, **found, "num_held_out": number, "num_off": num_off}


class _Best:
    """The weights of the epoch with the least loss, in a file."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model, self.weights = model, folder / "best.safetensors"
        self.record = folder / "best.json"

    def offer(self, epoch: int, loss: float) -> None:
        known = json.loads(self.record.read_text()) if self.record.exists() else None
        wait_for_everyone()
        # an epoch that is not before the known one is run again, after a kill
        if known is None or known["epoch"] >= epoch or loss < known["loss"]:
            if is_main():
                self.record.unlink(missing_ok=True)
                save_model(self.model, str(self.weights))
                self.record.write_text(json.dumps({"epoch": epoch, "loss": loss}))
            wait_for_everyone()

    def load(self) -> dict[str, Any]:
        load_model(self.model, self.weights)
        return json.loads(self.record.read_text())
