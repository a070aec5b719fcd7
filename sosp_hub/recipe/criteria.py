"""The section ``criterion``: what every criterion takes, and what it says of itself.

Each criterion is one file in ``sosp_hub/criteria``, with its own options.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny

from sosp_hub.recipe.declared import Declared, Registry
from sosp_hub.recipe.section import Count, Section
from sosp_hub.recipe.training import MaskTrainSection
from sosp_hub.types import GateKind, Kind, Mode, OutputLoss

if TYPE_CHECKING:
    from sosp_hub.types import Saliency

Needs = Literal["nothing", "inputs", "labels"]
WIDTH_KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "layer")


SOSP = (
    "Second-order structured pruning, [arXiv:2110.11395](https://arxiv.org/abs/2110.11395); gates "
    "and their exact Hessian are this package's reading of it."
)


class Method(NamedTuple):
    """A criterion in words.

    Attributes:
        formula: Saliency of one structure; higher is kept.
        words: What the symbols mean, and the source.
    """

    formula: str
    words: str


def gate_words(gate: GateKind = "activation") -> str:
    """What ``g`` is in a formula."""
    return (
        "g is the gradient of the mean loss over the calibration data with respect to a gate on "
        f"the structure's {'weights' if gate == 'weight' else 'activation'} (1 in the dense model)"
    )


def _damping(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 < value < math.inf):
        raise ValueError(f"got {value!r}; expected a number more than 0, or auto")
    return value


class CurvatureSection(Section):
    """How the Gauss-Newton matrix of ``sosp_i`` and of compensation is measured."""

    gate: GateKind = Field(default="activation", description="what a gate multiplies")
    loss: OutputLoss = Field(
        default="auto", description="which curvature by the outputs; auto = that of the loss"
    )
    max_classes: Count = Field(
        default=32, description="above so many classes, labels are drawn from the model"
    )
    num_draws: Count = Field(default=1, description="labels drawn per sample")


class Criterion(Declared):
    """What every criterion takes, and what it says of itself.

    Attributes:
        needs: What it needs of the calibration data.
        formula: Saliency of one structure, for the card.
        words: What the symbols of the formula mean.
        kinds: Kinds of structures that it can score.
        scores_only: In words, which groups of these kinds it can score; empty = all of them.
        signed: Scores may be negative.
        first_order: They are made of the gradient alone, which is 0 at a minimum of the loss.
        uses_units: It takes account itself of what structures cost.
        uses_curvature: It scores by the Gauss-Newton matrix, which is measured before, and kept.
        decides_budget: What scores less than 0 goes, unless a budget is given.
        silences: What scores less than 0 is off already, and goes whatever the budget is.
        shared_options: Of what every criterion takes, what its scores depend on.
    """

    needs: ClassVar[Needs]
    formula: ClassVar[str]
    words: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]] = WIDTH_KINDS
    scores_only: ClassVar[str] = ""
    signed: ClassVar[bool] = False
    first_order: ClassVar[bool] = False
    uses_units: ClassVar[bool] = False
    uses_curvature: ClassVar[bool] = False
    decides_budget: ClassVar[bool] = False
    silences: ClassVar[bool] = False
    shared_options: ClassVar[tuple[str, ...]] = ()

    num_samples: Count = Field(default=1024, description="calibration samples, over all processes")
    batch_size: Count = Field(default=32, description="calibration samples of one step")
    per: Literal["macs", "params", "bytes"] | None = Field(
        default=None,
        description="scores are divided by what a structure costs, for a budget of that; "
        "null = as they are",
    )
    compensate: bool | None = Field(
        default=None,
        description="fold gates that make up for the cut into the kept weights; "
        "null = with sosp_i's surgeon",
    )
    damping: Annotated[float | Literal["auto"], BeforeValidator(_damping)] = Field(
        default=0.01,
        description="of the matrix that compensation solves with: added to its diagonal, as a "
        "share of its mean; auto = the best on a quarter of the calibration samples, held out",
    )
    compensate_steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="then so many steps move the gates on toward the dense model's outputs, each "
        "with the matrix of the cut model; damping as with auto",
    )
    compensate_bias: bool = Field(
        default=False,
        description="fold the mean of what is cut into the biases of the layers that have read it, "
        "where they have one",
    )

    def saliency(self, context: Any) -> "Saliency":
        """One number per structure of each group of a `Context`; higher = keep."""
        raise NotImplementedError

    @staticmethod
    def can_score(group: Any) -> bool:
        """Whether a group is one of those that ``scores_only`` tells of."""
        del group
        return True

    def method(self) -> Method:
        """Formula and symbols, as they are with these options."""
        return Method(self.formula, self.words)

    @classmethod
    def option_names(cls) -> list[str]:
        """The options that `score` takes: its own, without those of a run."""
        of_run = Criterion.model_fields.keys() - set(cls.shared_options)
        return [name for name in cls.model_fields if name not in of_run]

    def options(self) -> dict[str, Any]:
        """The options that the scores depend on, those that are set."""
        return self.model_dump(include=set(self.option_names()), exclude_none=True)

    def provenance(self) -> dict[str, Any]:
        """What a plan says of where its scores come from."""
        named = self.model_dump(include={"name", "per"}, exclude_none=True)
        return {**named, "options": self.options()}

    def no_amounts(self) -> tuple[str, str] | None:
        """Why scores cannot be divided by a cost, and what to write instead; None = they can."""
        if not self.signed:
            return None
        amounts = [name for name, model in CRITERIA.known().items() if not model.signed]
        return "these have a sign", f"leave out per, or use one of {', '.join(amounts)}"

    def compensates(self) -> bool:
        """Whether what is kept makes up for what is cut."""
        return bool(self.compensate)

    def of_tokens(self) -> str | None:
        """The option that asks for samples of token ids, where one does."""
        return None

    def by_damping(self) -> bool:
        """Whether the scores depend on the damping."""
        return False

    def training_passes(self, num_outputs: int | None = None) -> float:
        """About how many plain training passes over the calibration samples scoring takes.

        One is a forward pass and a backward pass, which takes twice as long.

        Args:
            num_outputs: Outputs of the model that a curvature is taken by, where known.
        """
        del num_outputs
        return {"nothing": 0.0, "inputs": 1 / 3, "labels": 1.0}[self.needs]

    def curvature(self) -> dict[str, Any]:
        """How the matrix of compensation is measured: the keys of a `CurvatureSection`."""
        return CurvatureSection().model_dump()

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Options that do not go together: the key, and why with what to write instead."""
        if self.compensate_steps and self.compensate_bias:
            yield (
                "compensate_steps",
                "its gates would not know of the constants that compensate_bias folds; leave one "
                "of them out",
            )
        if self.compensate_steps and not self.compensates():
            yield (
                "compensate_steps",
                "there are no gates to move; write compensate: true, or leave it out",
            )


class GateCriterion(Criterion):
    """What every criterion on gate derivatives takes."""

    gate: GateKind = Field(default="activation", description="what a gate multiplies")
    micro_batch_size: Count | None = Field(
        default=None, description="most samples of one pass; null = whole batches"
    )

    def gate_words(self) -> str:
        """What ``g`` is in a formula."""
        return gate_words(self.gate)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Gates on weights are not folded."""
        if self.compensates() and self.gate == "weight":
            yield (
                "compensate",
                "gates are folded where activations are read; write criterion.gate: activation, "
                "or compensate: false",
            )
        yield from super().conflicts()


class SecondOrderCriterion(GateCriterion):
    """What every criterion on second derivatives takes."""

    mode: Mode = Field(default="auto", description="auto = exact where kernels allow")
    eps: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="step of the differences; null = by the weights' dtype"
    )

    def training_passes(self, num_outputs: int | None = None) -> float:
        """As ``tests/bench/saliency.py`` measured: 1.7 to 2.6 exact, 1.4 to 1.8 by differences."""
        del num_outputs
        return 1.6 if self.mode == "differences" else 2.1


class StandardizedCriterion(Criterion):
    """What criteria take whose scores have the scale of their layer."""

    standardize: bool = Field(
        default=True, description="mean 0 and standard deviation 1 within each group"
    )

    def method(self) -> Method:
        """The words say whether."""
        return Method(self.formula, self.scaled(self.words))

    def scaled(self, words: str) -> str:
        """What the symbols mean, and whether scores are standardised."""
        return f"{words}{'; standardised within each group' * self.standardize}."

    def no_amounts(self) -> tuple[str, str] | None:
        """Standardised scores count from their mean."""
        if self.standardize:
            return (
                "standardised ones count from their mean",
                "write standardize: false, or leave out per",
            )
        return super().no_amounts()


class WatchedCriterion(StandardizedCriterion):
    """What criteria take that watch what layers read."""

    scores_only: ClassVar[str] = "read by a layer, whose input can be watched"

    @staticmethod
    def can_score(group: Any) -> bool:
        """Whether a module reads the group."""
        return any(site.module is not None for site in group.sites)


class PerSampleCriterion(Criterion):
    """What criteria take that give each sample its own gates."""

    scores_only: ClassVar[str] = "read by layers, in front of which each sample has its own gates"

    @staticmethod
    def can_score(group: Any) -> bool:
        """Gates that scale a weight would be shared by all samples."""
        return bool(group.sites) and all(site.module is not None for site in group.sites)


class RectifiedCriterion(Criterion):
    """What criteria take that look at a BatchNorm and the ReLU behind it."""

    formula: ClassVar[str] = "c0 - Phi((t - beta_s) / (|gamma_s| + 1e-8))"
    scores_only: ClassVar[str] = "read through a BatchNorm and the ReLU directly behind it"
    signed: ClassVar[bool] = True

    t: float = Field(default=0.05, description="below this a channel counts as off")
    c0: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.95, description="probability of being off above which a score is below 0"
    )

    @staticmethod
    def can_score(group: Any) -> bool:
        """Whether the group is behind such pairs alone."""
        return bool(group.rectified)


class MaskTrainedCriterion(RectifiedCriterion):
    """What criteria take that train the model with masks before it is scored.

    Attributes:
        untrained: The criterion that scores a model as it is by the same formula.
    """

    untrained: ClassVar[str]

    train: MaskTrainSection = Field(
        default=MaskTrainSection(),
        description="keys as in model.train, from its result on, and: sparsity, k, tau, held_out, "
        "select_from, control",
    )

    @classmethod
    def option_names(cls) -> list[str]:
        """What scores after the training."""
        return [name for name in super().option_names() if name != "train"]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What was silent when it went needs nothing that makes up for it."""
        if self.compensates():
            yield (
                "compensate",
                f"what {self.name} cuts is silent already and leaves nothing to make up for; leave "
                "it out",
            )
        yield from super().conflicts()


CRITERIA = Registry("sosp_hub.criteria", Criterion, noun="criterion", default="sosp_h")
AnyCriterion = Annotated[SerializeAsAny[Criterion], CRITERIA]
