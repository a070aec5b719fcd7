"""The best state of a training, selected on samples of the train split that are held out."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn

from sosp_hub.atomic import write_text
from sosp_hub.data.loading import make_loader
from sosp_hub.data.split import Part, Split
from sosp_hub.distributed import is_main, process_state, wait_for_everyone
from sosp_hub.errors import DataError
from sosp_hub.sharding import save_weights


def hold_out(
    train: Split, augmented: Split, share: float, seed: int, *, most: int | None = None, key: str
) -> tuple[Part, Part]:
    """A random part of the train split, and the rest as it is trained with.

    Args:
        train: The split.
        augmented: The same samples, maybe augmented.
        share: How much is held out, in (0, 1).
        seed: Of the choice.
        most: Samples that are held out at most; None = any number.
        key: The recipe's key of the share, for the error.

    Raises:
        DataError: Nothing would be left to train with.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    number = math.ceil(share * len(train))
    number = number if most is None else min(number, most)
    if number >= len(train):
        raise DataError(
            f"{key}: {share} of {len(train)} samples leaves none to train with; raise "
            "data.num_train"
        )
    # calibration takes its samples from the front of this order: what judges is from its end
    return Part(train, order[-number:]), Part(augmented, order[:-number])


def held_out_loader(part: Part, batch_size: int, accelerator: Any, num_workers: int = 0) -> Any:
    """This process's batches of the held-out samples, of which each has some where all can.

    Raises:
        DataError: Too few for processes that share weights, which they go through together.
    """
    share = len(part) // accelerator.num_processes
    if not share and accelerator.is_fsdp2:
        raise DataError(
            f"{len(part)} held-out samples for {accelerator.num_processes} processes that share "
            "weights (FSDP2); each needs one at least: raise finetune.held_out or data.num_train, "
            "or start fewer processes"
        )
    loader = make_loader(part, min(batch_size, max(share, 1)), num_workers=num_workers)
    return accelerator.prepare_data_loader(loader)


@dataclass(frozen=True)
class Selected:
    """Which state was kept.

    Attributes:
        epoch: Epochs of training that it had; 0 = what the training began with.
        loss: Its mean loss on the held-out samples.
        losses: Epoch and loss of every state that was offered.
    """

    epoch: float
    loss: float
    losses: tuple[tuple[float, float], ...] = field(default=())


class BestState:
    """The weights of least held-out loss so far, in a file: a training that goes on finds them.

    The record names the file of its weights, and takes its place as a whole: after a kill there is
    the state before an offer or the one after it.

    Args:
        model: Whose weights are kept.
        folder: Where; exists.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.record = folder / "best.json"

    @property
    def selected(self) -> Selected | None:
        """The best so far; None where none was offered."""
        if not self.record.exists():
            return None
        record = self._read()
        losses = tuple((epoch, loss) for epoch, loss in record["losses"])
        return Selected(record["epoch"], record["loss"], losses)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.record.read_text())

    def offer(self, epoch: float, loss: float) -> bool:
        """Keeps the model's weights if there are no better ones; whether it did."""
        known = self.selected
        old = self._read()["weights"] if known else ""
        wait_for_everyone()
        # After a kill, epochs from this one on are run again: what they left counts no more.
        stays = known if known and known.epoch < epoch and not math.isnan(known.loss) else None
        is_best = stays is None or loss < stays.loss
        losses = [each for each in (known.losses if known else ()) if each[0] < epoch]
        best = (epoch, loss) if stays is None or is_best else (stays.epoch, stays.loss)
        new = ("best-1" if old.startswith("best-0") else "best-0") + ".safetensors"
        if is_best:
            save_weights(self.model, self.folder / new)
        if is_main():
            record = {"epoch": best[0], "loss": best[1], "losses": [*losses, (epoch, loss)]}
            write_text(self.record, json.dumps({**record, "weights": new if is_best else old}))
            if is_best and old:
                (self.folder / old).unlink(missing_ok=True)
        wait_for_everyone()
        return is_best

    def load(self) -> Selected:
        """Gives the model the best weights.

        Raises:
            DataError: There are none in the folder.
        """
        selected = self.selected
        if selected is None:
            raise DataError(
                f"{self.folder}: the main process's best state is not seen by process "
                f"{process_state().process_index}; let output.dir be on a shared file system"
            )
        load_model(self.model, self.folder / self._read()["weights"])
        return selected
