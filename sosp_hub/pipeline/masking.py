"""Training with masks, for the criterion `scp`: the epoch is selected on held-out samples."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from sosp_hub.data.split import Split
from sosp_hub.distributed import logger
from sosp_hub.evaluate import evaluate
from sosp_hub.finetune import finetune
from sosp_hub.recipe.training import MaskTrainSection
from sosp_hub.recovery.best import BestState, held_out_loader, hold_out
from sosp_hub.soft_masks import SoftMasks

if TYPE_CHECKING:
    from sosp_hub.types import LossFn


def train_with_masks(
    masks: SoftMasks,
    train: Split,
    augmented: Split,
    config: MaskTrainSection,
    *,
    loss_fn: "LossFn | None",
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
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
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
    part, rest = hold_out(train, augmented, config.held_out, seed, key="criterion.train.held_out")
    loader = held_out_loader(part, config.batch_size, accelerator, num_workers)
    first = config.epochs - math.ceil(config.select_from * config.epochs) + 1
    best = BestState(masks.model, state)

    def select(epoch: float) -> None:
        if epoch >= first:
            measured = evaluate(masks.model, loader, ("loss",), loss_fn=loss_fn)
            best.offer(epoch, measured["loss"].value)

    with masks.installed():
        history = finetune(
            masks.model,
            rest,
            config,
            loss_fn=loss_fn,
            checkpoint_dir=state,
            accelerator=accelerator,
            seed=seed,
            num_workers=num_workers,
            description="train masks",
            penalty=lambda: masks.penalty(config.sparsity, config.weight_decay),
            after_part=select,
        )
    selected = best.load()
    num_off = masks.harden_()
    logger.info("scp: epoch %d of %d; %d channels are off", selected.epoch, config.epochs, num_off)
    kept = {"epoch": selected.epoch, "loss": selected.loss, "num_held_out": len(part)}
    return {"history": history, **kept, "num_off": num_off}
