"""Fine-tuning after a cut: the best state seen on held-out samples is what stays."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from sosp_hub.data.split import Split
from sosp_hub.distillation import Numbered, StoredOutputs
from sosp_hub.distributed import logger, make_accelerator, temporary_folder
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.adapters import adapted, checkpointed
from sosp_hub.recovery.best import BestState, Selected, held_out_loader, hold_out
from sosp_hub.recovery.probe import Rates, best_rate, probe_rates
from sosp_hub.training import samples_per_step, tokens_of_sample, train_model

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

_LEAST_EVALUATIONS = 4  # of a whole training, however few epochs it has
_FEW_STEPS = 20  # fewer teach little at any rate, our choice


@dataclass(frozen=True)
class Recovery:
    """What a fine-tuning did.

    Attributes:
        history: The loss curve, as `train_model` returns it.
        selected: The state that was kept; None where nothing was held out.
        num_held_out: Samples of the train split that selected it.
        rates: Learning rates that were probed, and the held-out loss after each.
        num_samples: Samples that were trained with, each as often as it was.
        num_tokens: Tokens of them, where the training was by tokens.
    """

    history: Sequence[Mapping[str, float]]
    selected: Selected | None
    num_held_out: int
    rates: Rates = ()
    num_samples: int = 0
    num_tokens: int | None = None


def recover(
    model: nn.Module,
    train: Split,
    config: FinetuneSection,
    *,
    augmented: Split | None = None,
    loss_fn: "LossFn | None" = None,
    teacher: nn.Module | None = None,
    checkpoint_dir: Path | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    num_workers: int = 0,
    description: str = "fine-tune",
) -> Recovery:
    """Fine-tunes in place and ends with the state of least loss on samples that are held out.

    The state that the training begins with is one of them: on these samples the result is never
    worse than what was there, also where the training ends with an exception. Selection never looks
    at the test split.

    Args:
        model: The cut model.
        train: The train split; ``config.held_out`` of it, at most ``config.most_held_out``
            samples, are not trained with.
        config: How to train.
        augmented: The same samples as they are trained with; None = ``train``.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        teacher: What is followed, for ``config.distill``, ``hidden`` and ``relations``. With
            ``config.top_k`` it leaves its device for the time of the training.
        checkpoint_dir: Where resumable state is kept, the best state included.
        accelerator: Of this run; None = a new one.
        seed: Of the part that is held out, and of all that is random in training.
        num_workers: Processes that load data.
        description: In front of the progress bar.

    Raises:
        DataError: Too few samples to hold some out.
        ModelError: A loss that is not finite.
    """
    accelerator = accelerator or make_accelerator(seed=seed)
    augmented = train if augmented is None else augmented
    part, rest = None, augmented
    if config.held_out and config.epochs:
        part, rest = hold_out(
            train,
            augmented,
            config.held_out,
            seed,
            most=config.most_held_out,
            key="finetune.held_out",
        )
    with ExitStack() as stack:
        folder = checkpoint_dir or stack.enter_context(temporary_folder())
        followed: nn.Module | StoredOutputs | None = teacher
        if teacher is not None and config.top_k and config.epochs:
            followed = StoredOutputs.make(teacher, rest, config, folder, loss_fn=loss_fn)
            stack.enter_context(_off_device(teacher))
            rest = Numbered(rest)
        stack.enter_context(checkpointed(model, config.gradient_checkpointing))
        stack.enter_context(adapted(model, config.lora, seed))
        train_with = partial(
            train_model,
            model,
            rest,
            loss_fn=loss_fn,
            teacher=followed,
            accelerator=accelerator,
            seed=seed,
            num_workers=num_workers,
        )
        if part is None:
            history = train_with(config, checkpoint_dir=checkpoint_dir, description=description)
            return Recovery(history, None, 0, (), *_counts(history, rest, config, accelerator))
        loader = held_out_loader(part, config.batch_size, accelerator, num_workers)
        best = BestState(model, folder)

        def held_out_loss() -> float:
            return evaluate(model, loader, ("loss",), loss_fn=loss_fn)["loss"].value

        def offer(epoch: float) -> None:
            best.offer(epoch, held_out_loss())

        if best.selected is None:
            offer(0.0)
        rates: Rates = ()
        if config.probe_steps:
            rates = probe_rates(
                model,
                config,
                lambda short: train_with(short, description="probe"),
                held_out_loss,
                folder,
                batch_size=config.batch_size
                * config.gradient_accumulation
                * accelerator.num_processes,
            )
            config = config.model_copy(update={"learning_rate": best_rate(rates)})
        try:
            history = train_with(
                config,
                checkpoint_dir=folder,
                after_part=offer,
                parts_per_epoch=math.ceil(_LEAST_EVALUATIONS / _epochs(rest, config)),
                description=description,
            )
        except BaseException:
            best.load()
            raise
        selected = best.load()
    _say(selected, config, len(part), history)
    counts = _counts(history, rest, config, accelerator)
    return Recovery(history, selected, len(part), rates, *counts)


def _epochs(train: Split | Numbered, config: FinetuneSection) -> float:
    """Passes over the train split."""
    if config.tokens is None:
        return config.epochs
    return config.tokens / (len(train) * tokens_of_sample(train))


def _counts(
    history: Sequence[Mapping[str, float]],
    train: Split | Numbered,
    config: FinetuneSection,
    accelerator: Accelerator,
) -> tuple[int, int | None]:
    """Samples that were trained with, and tokens where samples are texts of equal length."""
    steps = int(history[-1]["step"]) if history else 0
    samples = steps * samples_per_step(train, config, accelerator)
    return samples, samples * tokens_of_sample(train) if config.tokens else None


@contextmanager
def _off_device(model: nn.Module) -> Iterator[None]:
    """A model that is not needed for a while lies in the memory of the CPU."""
    device = next(model.parameters()).device
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


def _say(
    selected: Selected,
    config: FinetuneSection,
    num_held_out: int,
    history: Sequence[Mapping[str, float]],
) -> None:
    start = selected.losses[0][1]
    if selected.epoch == 0:
        steps = int(history[-1]["step"]) if history else 0
        length = "tokens" if config.tokens else "epochs"
        more = f"raise finetune.{length} (now {getattr(config, length)}) or lower "
        more += f"finetune.batch_size (now {config.batch_size}) for more than {steps} steps, "
        logger.warning(
            "fine-tune: no trained state is better than the cut model on %d held-out samples "
            "(loss %.4g, at best %.4g), so the cut model is kept; %slower finetune.learning_rate "
            "(now %g) or train on more samples",
            num_held_out,
            start,
            min((loss for epoch, loss in selected.losses if epoch), default=math.nan),
            more if steps < _FEW_STEPS else "",
            config.rate,
        )
    elif selected.epoch < selected.losses[-1][0]:
        logger.info(
            "fine-tune: the state after %.3g of %.3g epochs is kept, the best on %d held-out "
            "samples (loss %.4g, %.4g before)",
            selected.epoch,
            selected.losses[-1][0],
            num_held_out,
            selected.loss,
            start,
        )
