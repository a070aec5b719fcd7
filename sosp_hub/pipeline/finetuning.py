"""``finetune``: training after a cut, for those who call the verbs one by one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import Dataset, default_collate

from sosp_hub.compat.accelerate import check_weights
from sosp_hub.compat.torch import unwrapped
from sosp_hub.data.split import MadeSplit, Split
from sosp_hub.errors import DataError, ModelError, RecipeError, SospHubError
from sosp_hub.modes import (
    called_as_the_caller,
    check_models,
    evaluating,
    in_own_modes,
    without_autocast,
)
from sosp_hub.pipeline.guest import as_guest
from sosp_hub.recipe.faults import explain
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.recover import Recovery, recover
from sosp_hub.structure.copies import copy_model
from sosp_hub.tasks.batches import tensors
from sosp_hub.tasks.loss import batch_loss

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

_OF_RECIPES = ("augment", "mixed_precision", "recalibrate_norm", "save_every_steps", "teacher")


@in_own_modes
def finetune(
    model: nn.Module,
    train: "Dataset[Any] | Sequence[Any]",
    *,
    learning_rate: float,
    epochs: int = 3,
    loss_fn: "LossFn | None" = None,
    teacher: nn.Module | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Trains a cut model and keeps its best state on samples that are held out.

    The state before the training is one of these, so that the result is never worse on them. The
    model trains on the accelerator, if there is one.

    Args:
        model: Usually what ``apply`` or ``rebuild`` returned; it stays as it is.
        train: Samples with a length and an index: ``(inputs, target)`` or dicts, as tensors of
            equal shapes unless ``collate`` makes them so. A tenth is held out.
        learning_rate: Peak; pretrained weights mostly take 5e-5, images 1e-4.
        epochs: Passes over the samples.
        loss_fn: Loss of ``(outputs, targets)``; None = the model's own, or cross-entropy.
        teacher: The dense model, to follow with ``distill=0.5``, ``hidden=1.0`` or
            ``relations=1.0``; it runs in eval mode.
        collate: From a list of samples to a batch.
        seed: Of the held-out part, the order and dropout.
        **options: Any other key of a recipe's ``finetune``: ``batch_size``, ``distill``, ``lora``,
            ``held_out``, ``probe_steps``, ... (``sosp prune --help finetune``).

    Returns:
        A new model, on the device and in the modes of the one given. ``finetune_`` trains in place
        and returns the loss curve instead.

    Raises:
        RecipeError: An option that does not exist or has a wrong value.
        DataError: Too few samples to hold some out.
        ModelError: Not a module, no parameter that takes a gradient, or a loss that is not finite.

    Example:
        >>> import sosp_hub, torch
        >>> data = [(torch.randn(4), torch.tensor(i % 2)) for i in range(40)]
        >>> net = torch.nn.Linear(4, 2)
        >>> better = sosp_hub.finetune(net, data, learning_rate=1e-2, epochs=1, batch_size=8)
        >>> better is net
        False
    """
    check_models(model)
    result = copy_model(unwrapped(model))
    with _batches_told(result, train, loss_fn):
        finetune_(
            result,
            _split(train, collate),
            learning_rate=learning_rate,
            epochs=epochs,
            loss_fn=loss_fn,
            teacher=teacher,
            seed=seed,
            **options,
        )
    return result


@in_own_modes
def finetune_(
    model: nn.Module,
    train: "Dataset[Any] | Sequence[Any]",
    *,
    learning_rate: float,
    epochs: int = 3,
    loss_fn: "LossFn | None" = None,
    teacher: nn.Module | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    seed: int = 0,
    **options: Any,
) -> Recovery:
    """``finetune`` in place, with the same arguments.

    Returns:
        The loss curve (``history``), the state that was kept (``selected``), and how many samples
        were held out and trained with.

    Raises:
        RecipeError: An option that does not exist or has a wrong value.
        DataError: Too few samples to hold some out.
        ModelError: Not a module, no parameter that takes a gradient, a teacher that is the model
            itself, or a loss that is not finite.

    Example:
        >>> import sosp_hub, torch
        >>> data = [(torch.randn(4), torch.tensor(i % 2)) for i in range(40)]
        >>> net = torch.nn.Linear(4, 2)
        >>> done = sosp_hub.finetune_(net, data, learning_rate=1e-2, epochs=1, batch_size=8)
        >>> done.num_held_out, done.num_samples
        (4, 32)
    """
    config = _section({"learning_rate": learning_rate, "epochs": epochs, **options})
    if config.follows() and teacher is None:
        raise RecipeError(
            "sosp_hub.finetune",
            ["distill, hidden, relations: nothing is followed; give teacher=MODEL"],
        )
    for each in (model, *([] if teacher is None else [teacher])):
        check_models(each)
        check_weights(each, "finetune")
    model = unwrapped(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    followed = None if teacher is None else unwrapped(teacher)
    if followed is model:
        raise ModelError(
            "finetune_: the teacher is the model that is trained, which would follow itself; give "
            "the dense model, or a copy of this one (sosp_hub.finetune makes one)"
        )
    models = [model] if followed is None else [followed, model]
    told = _batches_told(model, train, loss_fn)
    with told, as_guest(), evaluating(*models), without_autocast(model):
        try:
            return recover(
                model,
                _split(train, collate),
                config,
                loss_fn=loss_fn,
                teacher=followed if config.follows() else None,
                seed=seed,
            )
        finally:
            model.to(device)


@contextmanager
def _batches_told(model: nn.Module, train: Any, loss_fn: "LossFn | None") -> Iterator[None]:
    """Says what is wrong where a training fails because samples are batches already."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, SospHubError) as error:
        if isinstance(train, Split) or not _takes_as_batch(model, train, loss_fn):
            raise
        raise DataError(
            "train: holds batches, as sosp_hub.score takes them, and is to hold samples, which "
            "are put together here; give [sample for inputs, labels in batches for sample in "
            "zip(inputs, labels)]"
        ) from error


def _takes_as_batch(model: nn.Module, train: Any, loss_fn: "LossFn | None") -> bool:
    """Whether the model has a loss on what should be a sample, and none on a batch of that."""
    with evaluating(model), torch.no_grad():
        try:
            first = train[0]
            sizes = {tensor.shape[:1] for tensor in tensors(first)}
            batch_loss(model, first, loss_fn)
        except Exception:  # noqa: BLE001 - whatever it is, it is no batch of this model
            return False
        if len(sizes) != 1 or sizes == {()}:
            return False
        try:
            batch_loss(model, default_collate([first]), loss_fn)
        except Exception:  # noqa: BLE001 - so that it is none to put together
            return True
    return False


def _section(options: dict[str, Any]) -> FinetuneSection:
    faults = [
        f"{name}: belongs to a recipe; here the data and the models are given as they are"
        for name in _OF_RECIPES
        if name in options
    ]
    try:
        config = FinetuneSection.model_validate(options)
    except ValidationError as error:
        faults += explain(error, FinetuneSection)
        raise RecipeError("sosp_hub.finetune", faults) from None
    if faults:
        raise RecipeError("sosp_hub.finetune", faults)
    return config


def _split(train: Any, collate: Callable[[list[Any]], Any]) -> Split:
    if isinstance(train, Split):
        return train
    if not hasattr(train, "__len__") or not hasattr(train, "__getitem__"):
        raise DataError(
            f"train: got {type(train).__name__}, expected samples with a length and an index: a "
            "list or a torch Dataset of (inputs, target) or of dicts"
        )
    made = called_as_the_caller(lambda indices: collate([train[i] for i in indices]))
    return MadeSplit(len(train), made)
