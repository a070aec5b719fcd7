"""Training with masks, for the criterion `scp`: the epoch is selected on held-out samples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from sosp_hub.data.split import Part, Split
from sosp_hub.distributed import logger
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.training import MaskTrainSection
from sosp_hub.recovery.best import BestState, Selected, held_out_loader, hold_out
from sosp_hub.report.numbers import share
from sosp_hub.soft_masks import PenaltyControl, SoftMasks
from sosp_hub.structure.graph import Graph
from sosp_hub.training import train_model

if TYPE_CHECKING:
    from sosp_hub.types import LossFn


STEERING = ("macs", "params", "memory_bytes", "structures")
"""Budgets that steer the penalty."""


@dataclass(frozen=True)
class MaskTraining:
    """What a training with masks and one without have in common.

    Attributes:
        masks: The masks and their model.
        train: The train split; a part of it selects the epoch.
        augmented: The same samples for the other part.
        config: How to train.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        state: Folder for resumable state, the best epoch so far included.
        accelerator: Of this run.
        seed: Of the part, and of all that is random in training.
        num_workers: Processes that load data.
    """

    masks: SoftMasks
    train: Split
    augmented: Split
    config: MaskTrainSection
    loss_fn: "LossFn | None"
    state: Path
    accelerator: Accelerator
    seed: int
    num_workers: int

    def run(self, graph: Graph, budget: Mapping[str, float]) -> dict[str, Any]:
        """Trains in place with masks; what they cut is silent afterwards.

        Args:
            graph: Of the model.
            budget: Shares of the dense model that steer the penalty; empty = it stays as it is.

        Returns:
            ``history``, ``epoch`` that was selected, its ``loss`` on the ``num_held_out`` samples,
            ``num_off`` channels that are silent, the weight ``sparsity`` of the penalty, its
            ``num_penalized`` of ``num_steps`` steps, and the ``shares`` that the masks leave.

        Raises:
            DataError: Too few samples to hold some out.
        """
        part, rest = self._parts()
        per_epoch = max(1, len(rest) // (self.config.batch_size * self.accelerator.num_processes))
        num_steps = self.config.epochs * math.ceil(per_epoch / self.config.gradient_accumulation)
        weight = self.config.penalty_weight(num_steps, steered=bool(budget))
        control = PenaltyControl(self.masks, graph, budget, weight)
        with self.masks.installed():
            history, selected = self._trained(
                part,
                rest,
                "train masks",
                lambda: self.masks.penalty(control(), self.config.weight_decay),
                control,
            )
            met = control.holds()
        num_off = self.masks.harden_()
        shares = control.shares()
        self._tell(control, selected, num_off, met=met)
        return {
            "history": history,
            "epoch": selected.epoch,
            "loss": selected.loss,
            "num_held_out": len(part),
            "num_off": num_off,
            "sparsity": weight,
            "num_steps": control.num_steps,
            "num_penalized": control.num_penalized,
            "shares": shares,
        }

    def run_without_masks(self) -> list[dict[str, float]]:
        """Trains in place as long, with the same optimizer and selection; the loss curve."""
        part, rest = self._parts()
        history, _ = self._trained(
            part,
            rest,
            "train the control",
            lambda: self.masks.penalty(0.0, self.config.weight_decay),
        )
        return history

    def _parts(self) -> tuple[Part, Part]:
        return hold_out(
            self.train,
            self.augmented,
            self.config.held_out,
            self.seed,
            key="criterion.train.held_out",
        )

    def _trained(
        self,
        part: Part,
        rest: Part,
        description: str,
        penalty: Callable[[], Tensor],
        control: PenaltyControl | None = None,
    ) -> tuple[list[dict[str, float]], Selected]:
        """Trains and gives the model the best of the last epochs, those that meet the budget."""
        config, model = self.config, self.masks.model
        loader = held_out_loader(part, config.batch_size, self.accelerator, self.num_workers)
        first = config.epochs - math.ceil(config.select_from * config.epochs) + 1
        best = BestState(model, self.state)

        def select(epoch: float) -> None:
            last = epoch >= config.epochs and best.selected is None
            if last or (epoch >= first and (control is None or control.holds())):
                measured = evaluate(model, loader, ("loss",), loss_fn=self.loss_fn)
                best.offer(epoch, measured["loss"].value)

        history = train_model(
            model,
            rest,
            config,
            loss_fn=self.loss_fn,
            checkpoint_dir=self.state,
            accelerator=self.accelerator,
            seed=self.seed,
            num_workers=self.num_workers,
            description=description,
            penalty=penalty,
            also=control,
            after_part=select,
        )
        return history, best.load()

    def _tell(
        self, control: PenaltyControl, selected: Selected, num_off: int, *, met: bool
    ) -> None:
        shares = control.shares()
        logger.info(
            "scp: epoch %d of %d; %d channels are off, %s of the MACs are left; sparsity %.2g in "
            "%d of %d steps",
            selected.epoch,
            self.config.epochs,
            num_off,
            share(shares["macs"]),
            control.weight,
            control.num_penalized,
            control.num_steps,
        )
        if not met:
            missed = ", ".join(
                f"{share(shares[name])} of {name}, budget {share(most)}"
                for name, most in control.budget.items()
            )
            logger.warning(
                "the masks leave more than the budget (%s): the rest is cut by score and changes "
                "the outputs; write more criterion.train.epochs or a larger sparsity than %.2g",
                missed,
                control.weight,
            )
