"""How to train: before the cut, with masks, and after it."""

from typing import Annotated, Literal, Self

from pydantic import Field

from sosp_hub.recipe.section import Count, Section

_PAPER_SPARSITY = 5e-5
_PUSH = 0.3  # sparsity * steps * learning rate; of ResNet-20, 0.13 left 36 % of the MACs
FROM_RANDOM = 1e-3  # peak learning rate of weights that were random


class TrainSection(Section):
    """How to train: the dense model before pruning (``model.train``) and the cut one after."""

    epochs: Annotated[int, Field(ge=0)] = Field(
        default=10, description="passes over the train split; 0 = no training"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="peak learning rate; null = the task's: mostly 1e-3 where the model began with "
        "random weights, else 5e-5, and 1e-4 for image-classification",
    )
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = Field(
        default="adamw",
        description="sgd has Nesterov momentum; adamw_8bit is that of bitsandbytes",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="not applied to biases and norms"
    )
    batch_size: Count = Field(default=64, description="samples of one step on one process")
    gradient_accumulation: Count = Field(default=1, description="batches of one optimizer step")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="after the warm-up"
    )
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="share of all steps"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="classification only"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="gradient clipping; null = none"
    )
    augment: bool = Field(
        default=False, description="images: random horizontal flip and shift by up to 1/8"
    )
    save_every_steps: Count | None = Field(
        default=None, description="resumable state every so many steps; null = each epoch"
    )
    num_samples: Count | None = Field(
        default=None, description="samples of the train split that are used; null = all"
    )

    @property
    def rate(self) -> float:
        """The peak learning rate, that of random weights where none is given."""
        return self.learning_rate or FROM_RANDOM

    def at_rate(self, rate: float) -> Self:
        """The same, with this peak learning rate where none is given."""
        return self if self.learning_rate else self.model_copy(update={"learning_rate": rate})


class DenseTrainSection(TrainSection):
    """How the dense model is trained before it is pruned."""

    when: Literal["always", "new_head"] = Field(
        default="always",
        description="new_head = only where the head, or the whole model, has random weights",
    )


class MaskTrainSection(TrainSection):
    """How the model is trained with masks; keys as in ``model.train``, with the paper's values."""

    epochs: Count = Field(default=160, description="passes over the train split")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="peak learning rate"
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="sgd", description="sgd has Nesterov's")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=2e-4, description="applied to the BatchNorms' scales as well"
    )
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of all steps"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="gradient clipping; null = none"
    )
    sparsity: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="weight of sum(beta + 2 abs(gamma)) in the loss; what goes follows from it "
        "times the steps. With a budget it is 0 while that holds. null = 5e-5, the paper's, and "
        "with a budget 0.3 / (steps * learning_rate)",
    )
    k: Annotated[float, Field(gt=0)] = Field(
        default=20.0, description="steepness of the probability of being cut"
    )
    tau: Annotated[float, Field(gt=0)] = Field(
        default=0.5, description="temperature of the sampled masks"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="share of the train split that selects the epoch"
    )
    select_from: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25, description="share of the epochs, the last, that are selected from"
    )
    control: bool = Field(
        default=False,
        description="train without masks too, as long, and measure that model: what the cut is "
        "compared with",
    )

    def penalty_weight(self, num_steps: int, *, steered: bool) -> float:
        """The weight of the penalty, where it is on; ``steered`` by a budget."""
        if self.sparsity is not None:
            return self.sparsity
        return _PUSH / (num_steps * self.rate) if steered else _PAPER_SPARSITY
