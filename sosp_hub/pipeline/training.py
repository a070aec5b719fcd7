"""Steps of the dense model: its training, with masks where the criterion says so, its metrics."""

from typing import Any

from safetensors.torch import load_model, save_model

from sosp_hub.distributed import logger
from sosp_hub.finetune import finetune
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.masking import train_with_masks
from sosp_hub.pipeline.measuring import measured
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.recipe.criteria import MaskTrainedCriterion
from sosp_hub.recipe.training import TrainSection
from sosp_hub.scoring import scorable_groups
from sosp_hub.soft_masks import SoftMasks


@step("dense", "model", "data", "seed")
def dense(context: Context, config: TrainSection) -> dict[str, Any]:
    """Trains the dense model."""
    history = finetune(
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
    """Metrics of the dense model; none without data."""
    return {} if context.data is None else dense_metrics(context)


@step("masked", dense, "structure", "criterion.scores")
def masked(context: Context, criterion: MaskTrainedCriterion) -> dict[str, Any]:
    """Trains the dense model on with masks."""
    config = criterion.train
    kinds = context.recipe.structure.kinds
    groups = scorable_groups(context.graph_of_groups, type(criterion), kinds)
    made = train_with_masks(
        SoftMasks(context.model, groups, criterion.t, criterion.c0, config.k, config.tau),
        context.train,
        context.augmented if config.augment else context.train,
        config,
        loss_fn=context.loss_fn(context.model),
        state=context.cache.training_state(masked),
        accelerator=context.accelerator,
        seed=context.recipe.seed,
        num_workers=context.recipe.data.num_workers,
    )
    context.cache.save(lambda: save_model(context.model, str(masked.tensors(context))))
    return made


def train_dense(context: Context) -> None:
    """Trains the dense model, where the recipe says so."""
    config = context.dense_training
    if config is not None and config.epochs:
        dense(context, context.recipe.at_rate(config))
        load_model(context.model, dense.tensors(context))
    elif context.has_random_weights:
        logger.warning(
            "%s starts from random weights and is not trained before it is scored; "
            "write model.train: {epochs: ...}",
            "the head" if context.recipe.model.pretrained else "the model",
        )


def train_masks(context: Context) -> None:
    """Trains the model on with masks, where the criterion is such a training."""
    criterion = context.recipe.criterion
    if isinstance(criterion, MaskTrainedCriterion) and context.scores is None:
        masked(context, criterion)
        load_model(context.model, masked.tensors(context))
