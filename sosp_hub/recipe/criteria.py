"""The section ``criterion``: one for each criterion, with its options and their defaults."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sosp_hub.recipe.section import Count, Section, Share
from sosp_hub.recipe.training import MaskTrainSection


def _damping(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 < value < math.inf):
        raise ValueError(f"got {value!r}; expected a number more than 0, or auto")
    return value


class CriterionSection(Section):
    """What every criterion takes."""

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

    def options(self) -> dict[str, Any]:
        """The options of this criterion alone, those that are set."""
        shared = {"name", *CriterionSection.model_fields}
        return self.model_dump(exclude=shared, exclude_none=True)

    def told(self) -> dict[str, Any]:
        """What a plan says of where its scores come from."""
        named = self.model_dump(include={"name", "per"}, exclude_none=True)
        return {**named, "options": self.options()}

    def compensates(self) -> bool:
        """Whether what is kept makes up for what is cut."""
        return bool(self.compensate)

    def by_damping(self) -> bool:
        """Whether the scores depend on the damping."""
        return False

    def curvature(self) -> dict[str, Any]:
        """How the matrix of ``sosp_i`` and of compensation is measured."""
        return SospISection().curvature()


class GateSection(CriterionSection):
    """What every criterion on gate derivatives takes."""

    gate: Literal["activation", "weight"] = Field(
        default="activation", description="what a gate multiplies"
    )
    micro_batch_size: Count | None = Field(
        default=None, description="most samples of one pass; null = whole batches"
    )


class SecondOrderSection(GateSection):
    """What every criterion on second derivatives takes."""

    mode: Literal["exact", "differences", "auto"] = Field(
        default="auto", description="auto = exact where kernels allow"
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="step of the differences; null = by the weights' dtype"
    )


class SospHSection(SecondOrderSection):
    """Second-order saliency with exact Hessian products in gate space."""

    name: Literal["sosp_h"] = Field(default="sosp_h", description="abs(g) + 1/2 abs(r)")


class SospISection(GateSection):
    """Correlations between the structures of all layers, from the Gauss-Newton matrix."""

    name: Literal["sosp_i"] = Field(default="sosp_i", description="correlations of structures")
    selection: Literal["row_sum", "greedy", "signed", "surgeon"] = Field(
        default="row_sum", description="scores, or an order of removal (see the criterion)"
    )
    rescore_every: Count | None = Field(
        default=None,
        description="of the surgeon: removals between two measurements of the matrix; null = one",
    )
    keep_at_least: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of each group that no order removes"
    )
    loss: Literal["auto", "cross_entropy", "squared"] = Field(
        default="auto", description="which curvature by the outputs; auto = that of the loss"
    )
    max_classes: Count = Field(
        default=32, description="above so many classes, labels are drawn from the model"
    )
    num_draws: Count = Field(default=1, description="labels drawn per sample")

    def options(self) -> dict[str, Any]:
        """As of any criterion, and the damping that `surgeon` shares with compensation."""
        return {**super().options(), "damping": self.damping}

    def compensates(self) -> bool:
        """By default where the order of removal counts on it."""
        return self.selection == "surgeon" if self.compensate is None else self.compensate

    def by_damping(self) -> bool:
        """The order of a surgeon does."""
        return self.selection == "surgeon"

    def curvature(self) -> dict[str, Any]:
        """As this section says."""
        return self.model_dump(include={"loss", "max_classes", "num_draws", "gate"})


class TaylorSection(GateSection):
    """First-order saliency."""

    name: Literal["taylor"] = Field(default="taylor", description="first-order gate gradient")
    form: Literal["abs", "squared"] = Field(
        default="abs", description="abs(g) of the mean, or the mean over batches of g^2"
    )


class MagnitudeSection(CriterionSection):
    """Norm of the weights; needs no data."""

    name: Literal["magnitude"] = Field(
        default="magnitude", description="L2 norm of a structure's weights"
    )
    normalize: Literal["none", "mean"] = Field(
        default="none", description="mean = over the mean of the norms in the same group"
    )


class RandomSection(CriterionSection):
    """The control; needs no data."""

    name: Literal["random"] = Field(default="random", description="uniform, from the recipe's seed")


class FisherSection(CriterionSection):
    """Squared per-sample gate gradients."""

    name: Literal["fisher"] = Field(
        default="fisher", description="mean over samples of the squared gate gradient of each"
    )
    micro_batch_size: Count | None = Field(
        default=None, description="most samples of one pass; null = whole batches"
    )


class StandardizedSection(CriterionSection):
    """What criteria take whose scores have the scale of their layer."""

    standardize: bool = Field(
        default=True, description="mean 0 and standard deviation 1 within each group"
    )


class ScpScoreSection(CriterionSection):
    """BatchNorm and ReLU; needs no data."""

    name: Literal["scp_score"] = Field(
        default="scp_score", description="how improbably a ReLU turns the channel off"
    )
    t: float = Field(default=0.05, description="below this a channel counts as off")
    c0: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.95, description="probability of being off at which the score is 0"
    )


class ScpSection(CriterionSection):
    """BatchNorm and ReLU, after a training with masks that decides how much goes."""

    name: Literal["scp"] = Field(default="scp", description="trains with masks, then as scp_score")
    t: float = Field(default=0.05, description="below this a channel counts as off")
    c0: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.95, description="probability of being off above which a channel goes"
    )
    train: MaskTrainSection = Field(
        default=MaskTrainSection(),
        description="keys as in model.train, from its result on, and: sparsity, k, tau, held_out, "
        "select_from",
    )

    def options(self) -> dict[str, Any]:
        """What scores after the training."""
        return {"t": self.t, "c0": self.c0}


class LampSection(CriterionSection):
    """Magnitude that compares between layers; needs no data."""

    name: Literal["lamp"] = Field(
        default="lamp", description="squared norm over that of all in the group that are as large"
    )


class FpgmSection(StandardizedSection):
    """Distance of filters; needs no data."""

    name: Literal["fpgm"] = Field(
        default="fpgm", description="sum of the distances to the other filters of the group"
    )


class ActivationSection(StandardizedSection):
    """Size of activations; needs no labels."""

    name: Literal["activation"] = Field(
        default="activation", description="mean over places, root mean square over samples"
    )


class EapSection(StandardizedSection):
    """Energy of feature maps; needs no labels."""

    name: Literal["eap"] = Field(default="eap", description="nuclear norm of feature maps")
    reading: Literal["set", "map"] = Field(
        default="set", description="one matrix of several samples' maps, or one of each map"
    )
    set_size: Count = Field(default=32, description="most samples of one matrix with `set`")


class WandaSpSection(StandardizedSection):
    """Weights times activations; needs no labels."""

    name: Literal["wanda_sp"] = Field(
        default="wanda_sp", description="mean of abs(weight) times the size of its input"
    )


class FlapSection(StandardizedSection):
    """Weights times the fluctuation of what they read; needs no labels."""

    name: Literal["flap"] = Field(
        default="flap", description="squared norm of weights times the variance of their input"
    )


class GraspSection(SecondOrderSection):
    """Gradient flow."""

    name: Literal["grasp"] = Field(
        default="grasp", description="what the squared gradient loses with a structure"
    )


class HapSection(SecondOrderSection):
    """Diagonal of the Hessian in gate space."""

    name: Literal["hap"] = Field(default="hap", description="1/2 of the Hessian's diagonal")
    num_probes: Count = Field(default=8, description="random vectors, each one pass over the data")


class BlockInfluenceSection(CriterionSection):
    """Depth: scores whole layers alone (``structure.kinds: [layer]``); needs no labels."""

    name: Literal["block_influence"] = Field(
        default="block_influence", description="1 - cosine of a layer's input and output"
    )


class SglpSection(CriterionSection):
    """Depth: scores whole layers alone (``structure.kinds: [layer]``)."""

    name: Literal["sglp"] = Field(
        default="sglp", description="layers of the least gradient in segments of alike layers"
    )
    keep: Share = Field(
        default=0.5, description="share of the layers that stays where budget.threshold decides"
    )
    kept_per_segment: Annotated[tuple[int, ...], Field(strict=False)] | None = Field(
        default=None, description="blocks that each segment keeps instead"
    )
    num_segments: Count | None = Field(default=None, description="null = automatic")
    max_segments: Count | None = Field(
        default=None, description="of the automatic number; null = a third of the blocks"
    )
    max_subsets: Count = Field(
        default=20, description="above so many subsets of a segment, each layer's own norm decides"
    )
    max_rows: Count = Field(
        default=500, description="samples (or tokens) of a batch whose similarity is compared"
    )
    norm_samples: Count = Field(default=128, description="samples of a gradient norm")
    norms: Literal["auto", "fresh", "pretrained"] = Field(
        default="auto", description="of layers in a new net, or (language models) as they are"
    )


CRITERIA = (
    SospHSection,
    SospISection,
    TaylorSection,
    MagnitudeSection,
    RandomSection,
    FisherSection,
    ScpScoreSection,
    ScpSection,
    LampSection,
    FpgmSection,
    ActivationSection,
    EapSection,
    WandaSpSection,
    FlapSection,
    GraspSection,
    HapSection,
    BlockInfluenceSection,
    SglpSection,
)
CRITERION_NAMES = tuple(section.model_fields["name"].default for section in CRITERIA)
AnyCriterion = Annotated[
    SospHSection
    | SospISection
    | TaylorSection
    | MagnitudeSection
    | RandomSection
    | FisherSection
    | ScpScoreSection
    | ScpSection
    | LampSection
    | FpgmSection
    | ActivationSection
    | EapSection
    | WandaSpSection
    | FlapSection
    | GraspSection
    | HapSection
    | BlockInfluenceSection
    | SglpSection,
    Field(discriminator="name"),
]
