"""Steps of the dense model: its training, with masks where the criterion says so, its metrics."""

from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from sosp_hub.distributed import logger
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.masking import STEERING, MaskTraining
from sosp_hub.pipeline.measuring import measured
from sosp_hub.pipeline.stage_cache import Step, step
from sosp_hub.recipe.criteria import MaskTrainedCriterion
from sosp_hub.recipe.training import TrainSection
from sosp_hub.scoring import scorable_groups
from sosp_hub.soft_masks import SoftMasks
from sosp_hub.structure.copies import copy_model
from sosp_hub.training import train_model


@step("dense", "model", "data", "seed")
def dense(context: Context, config: TrainSection) -> dict[str, Any]:
    """Trains the dense model."""
    history = train_model(
        context.model,
        context.augmented if config.augment else context.train,
        config,
        loss_fn=context.loss_fn(context.model),
        checkpoint_dir=context.cache.training_state(dense),
        accelerator=context.accelerator,
        seed=context.recipe.seed,
        num_workers=context.recipe.data.num_workers,
        description="train dense",
    )
    context.cache.save(lambda: save_model(context.model, str(dense.tensors(context))))
    return {"history": history}


@step("dense_metrics", dense, "evaluate")
def dense_metrics(context: Context) -> dict[str, Any]:
    """Metrics of the dense model."""
    return measured(context, context.model, "dense")


def measure_dense(context: Context) -> dict[str, Any]:
    """Metrics of the dense model; none without data, or before a training with masks began it."""
    train = context.dense_training
    untrained = context.has_random_weights and not (train and train.epochs)
    masks = isinstance(context.recipe.criterion, MaskTrainedCriterion)
    if context.data is None or (masks and (untrained or context.scores is not None)):
        return {}
    return dense_metrics(context)


@step("masked", dense, "structure", "criterion.scores")
def masked(context: Context, criterion: MaskTrainedCriterion) -> dict[str, Any]:
    """Trains the dense model on with masks."""
    training = _mask_training(context, criterion, context.model, masked)
    targets = context.recipe.budget.targets()
    budget = {name: targets[name] for name in STEERING if name in targets}
    made = training.run(context.graph, budget)
    context.cache.save(lambda: save_model(context.model, str(masked.tensors(context))))
    return made


@step("control", dense, "structure", "criterion.training", "evaluate")
def control(context: Context, criterion: MaskTrainedCriterion) -> dict[str, Any]:
    """Metrics of the dense model trained as long as with masks, but without them."""
    model = copy_model(context.model)
    training = _mask_training(context, criterion, model, control)
    history = training.run_without_masks()
    return {"history": history, "metrics": measured(context, model, "control")}


def _mask_training(
    context: Context, criterion: MaskTrainedCriterion, model: nn.Module, state: Step[Any, ...]
) -> MaskTraining:
    config = criterion.train
    kinds = context.recipe.structure.kinds
    groups = scorable_groups(context.graph_of_groups, type(criterion), kinds)
    return MaskTraining(
        SoftMasks(model, groups, criterion.t, criterion.c0, config.k, config.tau),
        context.train,
        context.augmented if config.augment else context.train,
        config,
        loss_fn=context.loss_fn(model),
        state=context.cache.training_state(state),
        accelerator=context.accelerator,
        seed=context.recipe.seed,
        num_workers=context.recipe.data.num_workers,
    )


def train_dense(context: Context) -> None:
    """Trains the dense model, where the recipe says so."""
    config = context.dense_training
    if config is not None and config.epochs:
        dense(context, context.recipe.at_rate(config))
        load_model(context.model, dense.tensors(context))
    elif context.has_random_weights and not isinstance(
        context.recipe.criterion, MaskTrainedCriterion
    ):
        logger.warning(
            "%s starts from random weights and is not trained before it is scored; "
            "write model.train: {epochs: ...}",
            "the head" if context.recipe.model.pretrained else "the model",
        )


def train_masks(context: Context) -> dict[str, Any]:
    """Trains the model on with masks, where the criterion is such a training.

    Returns:
        Metrics of the control, where the recipe asks for it.
    """
    criterion = context.recipe.criterion
    if not isinstance(criterion, MaskTrainedCriterion) or context.scores is not None:
        return {}
    metrics = control(context, criterion)["metrics"] if criterion.train.control else {}
    masked(context, criterion)
    load_model(context.model, masked.tensors(context))
    return metrics
