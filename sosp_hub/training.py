"""Training that survives a kill.

The same loop trains the dense model before it is pruned. Everything random depends on the seed and
the step alone, so that a run that was killed and continued ends as one that was not.
"""

import importlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from sosp_hub.atomic import put_in_place
from sosp_hub.compat.torch import BatchNorm
from sosp_hub.data.loading import make_loader
from sosp_hub.distillation import StoredOutputs, Teacher
from sosp_hub.distributed import (
    from_main,
    logger,
    make_accelerator,
    process_state,
    process_sum,
)
from sosp_hub.errors import DataError, ModelError
from sosp_hub.optimizers import SGD, AdamW
from sosp_hub.progress import progress_bar
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recipe.training import TrainSection
from sosp_hub.sharding import check_sharding, load_state, prepared, save_state
from sosp_hub.tasks.loss import Loss, batch_loss
from sosp_hub.tasks.predictions import Predictions

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

_POINTS = 100  # of the loss curve, at most


class Resumable(Protocol):
    """What a training that was killed goes on with."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and texts by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them over."""
        ...


@torch.enable_grad()
def train_model(
    model: nn.Module,
    train: Dataset[Any],
    config: TrainSection,
    *,
    loss_fn: "LossFn | None" = None,
    teacher: nn.Module | StoredOutputs | None = None,
    checkpoint_dir: Path | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    num_workers: int = 0,
    description: str = "fine-tune",
    penalty: Callable[[], Tensor] | None = None,
    also: Resumable | None = None,
    after_part: Callable[[float], None] | None = None,
    parts_per_epoch: int = 1,
) -> list[dict[str, float]]:
    """Trains ``model`` in place and leaves it in eval mode.

    Args:
        model: The model.
        train: A split that gives whole batches, as `load_split` does.
        config: How to train.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        teacher: What is followed with ``config.distill``, ``hidden`` and ``relations``; with
            stored outputs, ``train`` is the `Numbered` split that they are of.
        checkpoint_dir: Where resumable state is kept; a call that finds some goes on from there.
        accelerator: Of this run; None = a new one.
        seed: Order of the samples, dropout and augmentation.
        num_workers: Processes that load data.
        description: In front of the progress bar.
        penalty: Added to each loss; the loss curve is without it.
        also: What else goes on from where it was, such as what the penalty counts.
        after_part: Gets the number of epochs that are done, before any state is kept; the model
            may be in eval mode afterwards.
        parts_per_epoch: How often it is called in an epoch, at most once a step.

    Returns:
        The loss curve: ``step``, ``epoch``, ``loss``, ``learning_rate`` of each point.

    Raises:
        ModelError: A loss that is not finite.
    """
    accelerator = accelerator or make_accelerator(seed=seed)
    check_sharding(accelerator, model, config, penalized=penalty is not None)
    if config.num_samples is not None:
        train = _some(train, config.num_samples, seed)
    batch_size = min(config.batch_size, len(train) // accelerator.num_processes)  # pyright: ignore
    if batch_size == 0:
        raise DataError(
            f"{len(train)} training samples for {accelerator.num_processes} processes;"  # pyright: ignore
            " each needs one at least: start fewer processes or raise data.num_train"
        )
    loader = make_loader(
        _Reproducible(train, seed),  # pyright: ignore[reportArgumentType]
        batch_size,
        shuffle=True,
        seed=seed,
        drop_last=True,
        num_workers=num_workers,
    )
    numbered = isinstance(teacher, StoredOutputs)
    follow = None
    if teacher is not None and isinstance(config, FinetuneSection) and config.follows():
        follow = Teacher(teacher, model, config, loss_fn=loss_fn)
        if not numbered:
            start = accelerator.process_index * batch_size
            mine = _Reproducible(train, seed).__getitems__(range(start, start + batch_size))
            follow.fit(mine, checkpoint_dir and checkpoint_dir / "teacher_states.safetensors")
    losses: list[Tensor] = []
    last: Any = None
    with ExitStack() as stack:
        made = prepared(accelerator, model, _optimizer(model, config), loader)
        wrapped, optimizer, loader = stack.enter_context(made)
        accelerator.gradient_accumulation_steps = config.gradient_accumulation
        steps_per_epoch = math.ceil(len(loader) / config.gradient_accumulation)
        total, epochs = config.epochs * steps_per_epoch, config.epochs
        if isinstance(config, FinetuneSection) and config.tokens and epochs:
            per_step = samples_per_step(train, config, accelerator) * tokens_of_sample(train)
            total = math.ceil(config.tokens / per_step)
            epochs = math.ceil(total / steps_per_epoch)
        save_every = config.save_every_steps or steps_per_epoch
        each_step = samples_per_step(train, config, accelerator)
        saved = _Saved(checkpoint_dir, accelerator, model, optimizer, total, each_step, also)
        step, history = saved.load()
        _into_training(model, config)
        advance = stack.enter_context(progress_bar(description, total, step, unit="steps"))
        for epoch in range(step // steps_per_epoch, epochs):
            loader.set_epoch(epoch)
            done = (step - epoch * steps_per_epoch) * config.gradient_accumulation
            batches = accelerator.skip_first_batches(loader, done) if done else loader
            for index, batch in enumerate(batches, start=epoch * len(loader) + done):
                learning_rate = config.rate * _schedule(step, total, config)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                rank, world = accelerator.process_index, accelerator.num_processes
                _seed(seed * 1_000_003 + index * world + rank)
                with accelerator.accumulate(wrapped):
                    numbers, batch = batch if numbered else (None, batch)
                    with follow.states() if follow else nullcontext({}) as states:
                        loss = batch_loss(wrapped, batch, loss_fn)
                    value = loss.value
                    if config.label_smoothing:
                        value = _read(loss).value(config.label_smoothing)
                    if follow is not None:
                        with accelerator.autocast():
                            value = follow.loss(value, loss, batch, states, numbers)
                    accelerator.backward(value if penalty is None else value + penalty())
                    if accelerator.sync_gradients and config.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(value.detach())
                if not accelerator.sync_gradients:
                    continue
                step += 1
                save = step % save_every == 0 and step < total
                if save or step == total or step % max(1, total // _POINTS) == 0:
                    point = _point(losses, step, step / steps_per_epoch, learning_rate)
                    history.append(point)
                    advance(f"loss {point['loss']:.4g}")
                    losses.clear()
                else:
                    advance()
                ends = _ends_part(step, steps_per_epoch, parts_per_epoch) or step == total
                if after_part and ends:
                    _same_buffers(model)
                    after_part(step / steps_per_epoch)
                    _into_training(model, config)
                if save:
                    saved.save(step, history)
                if step == total:
                    last = batch
                    break
    _same_buffers(model)
    model.eval()
    if last is not None:  # what the last step did shows only in another pass
        with torch.no_grad(), accelerator.autocast():
            _point([batch_loss(model, last, loss_fn).value], step, config.epochs, config.rate)
    return history


def _same_buffers(model: nn.Module) -> None:
    """Those of the main process on all: each had its own batches."""
    for buffer in model.buffers():
        broadcast(buffer)


def _into_training(model: nn.Module, config: TrainSection) -> None:
    """Train mode, but for norms that keep their statistics."""
    model.train()
    if isinstance(config, FinetuneSection) and config.freeze_norm:
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.eval()


def samples_per_step(train: Any, config: TrainSection, accelerator: Accelerator) -> int:
    """Samples of one optimizer step, on all processes."""
    world = accelerator.num_processes
    return min(config.batch_size, len(train) // world) * config.gradient_accumulation * world


def tokens_of_sample(train: Any) -> int:
    """Tokens of each sample of texts in windows of equal length.

    Raises:
        DataError: Samples that are no texts.
    """
    batch = train.__getitems__([0])
    batch = batch[1] if isinstance(batch, tuple) and isinstance(batch[1], dict) else batch
    if not isinstance(batch, dict) or "input_ids" not in batch:
        raise DataError("finetune.tokens: only texts have tokens; write epochs")
    return batch["input_ids"].shape[1]


def _ends_part(step: int, steps_per_epoch: int, parts: int) -> bool:
    """Whether a part of an epoch ends with this step; parts are as equal as steps allow."""
    return step * parts // steps_per_epoch > (step - 1) * parts // steps_per_epoch


def _some(train: Dataset[Any], num_samples: int, seed: int) -> Dataset[Any]:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))  # pyright: ignore
    return Subset(train, sorted(order[:num_samples].tolist()))


class _Reproducible(Dataset):
    """A split whose augmentation depends on the seed and on which samples form the batch."""

    def __init__(self, split: Any, seed: int) -> None:
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, *indices)) % 2**63)
            return self.split.__getitems__(indices)


class _Saved:
    """Resumable state of a training run: always one whole folder, never half of one."""

    def __init__(
        self,
        folder: Path | None,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        total: int,
        samples_per_step: int,
        also: Resumable | None,
    ) -> None:
        self.folder, self.accelerator, self.also = folder, accelerator, also
        self.trained = model, optimizer
        dtypes = {str(p.dtype) for p in model.parameters() if p.requires_grad}
        self.shape = {
            "total_steps": total,
            "samples_per_step": samples_per_step,
            "dtypes": sorted(dtypes),
        }

    def load(self) -> tuple[int, list[dict[str, float]]]:
        """Steps that are done and their history; nothing where there is no state that fits."""
        last, record = from_main(self._last())  # all processes see what one sees
        if last is None:
            return 0, []
        if any(record.get(key) != value for key, value in self.shape.items()):
            logger.info(
                "%s has other steps (their number, their samples on all processes, or the dtype "
                "of the weights): training starts from the beginning",
                last,
            )
            self._clear()
            return 0, []
        load_state(self.accelerator, *self.trained, last)
        if self.also is not None and "also" in record:
            self.also.load_state_dict(record["also"])
        logger.info("resuming from step %d of %d", record["step"], record["total_steps"])
        return record["step"], record["history"]

    def _last(self) -> tuple[Path | None, dict[str, Any]]:
        states = sorted(self.folder.glob("step-*[0-9]")) if self.folder else []
        if not states:
            return None, {}
        return states[-1], json.loads((states[-1] / "progress.json").read_text())

    def save(self, step: int, history: list[dict[str, float]]) -> None:
        """Writes beside and renames, so that a kill at any time leaves the last whole state."""
        if self.folder is None:
            return
        final = self.folder / f"step-{step:09d}"
        draft = final.with_suffix(".draft")
        save_state(self.accelerator, *self.trained, draft)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            record = {"step": step, **self.shape, "history": history}
            if self.also is not None:
                record["also"] = self.also.state_dict()
            (draft / "progress.json").write_text(json.dumps(record))
            put_in_place(draft, final)
        self._clear(but=final)

    def _clear(self, but: Path | None = None) -> None:
        if self.accelerator.is_main_process and self.folder is not None:
            for old in self.folder.glob("step-*"):
                if old != but:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _seed(seed: int) -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # where there is no device, manual_seed formats a stack trace for later
        torch.default_generator.manual_seed(seed)


def _optimizer(model: nn.Module, config: TrainSection) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError(
            f"there is nothing to train: no parameter of the {type(model).__name__} takes a "
            "gradient; call model.requires_grad_(True) before, or write finetune.lora"
        )
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw_8bit":
        try:
            optimizers = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ModelError(
                "finetune.optimizer: adamw_8bit needs bitsandbytes; pip install bitsandbytes, or "
                "write adamw"
            ) from error
        return optimizers.AdamW8bit(groups, lr=config.rate)
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.rate)
    nesterov = config.momentum > 0
    return SGD(groups, config.rate, config.momentum, nesterov=nesterov)


def _schedule(step: int, total: int, config: TrainSection) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine or flat."""
    warmup = round(config.warmup_share * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _read(loss: Loss) -> Predictions:
    """What the loss reads of the outputs, which smoothing works on."""
    if loss.predictions is None:
        raise ModelError(
            "finetune.label_smoothing: this loss does not say what it reads of the outputs; leave "
            "it out, or give a loss_fn that returns sosp_hub.tasks.softmax(logits, labels), "
            "sigmoid(...) or squared(...)"
        )
    return loss.predictions


def _point(losses: list[Tensor], step: int, epoch: float, learning_rate: float) -> dict[str, float]:
    mean = process_sum(torch.stack(losses).float().mean()) / process_state().num_processes
    if not mean.isfinite():
        raise ModelError(
            f"the training loss is {mean.item()} at step {step}; expected a finite number: lower"
            f" the learning rate (now {learning_rate:g}), train without mixed precision, or take "
            "weights in float32 or bfloat16 where they are in float16"
        )
    return {"step": step, "epoch": epoch, "loss": mean.item(), "learning_rate": learning_rate}
