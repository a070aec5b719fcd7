"""The recipe: one typed section per stage. Defaults and their meaning are written here alone."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from sosp_hub.recipe.criteria import CRITERIA, AnyCriterion, MaskTrainedCriterion
from sosp_hub.recipe.metrics import Drop, read_drops
from sosp_hub.recipe.schedule import ScheduleSection
from sosp_hub.recipe.section import Count, Scalar, Section, Seed, Share
from sosp_hub.recipe.targets import Targets
from sosp_hub.recipe.tasks import find_task, known_task, tasks
from sosp_hub.recipe.training import DenseTrainSection, TrainSection
from sosp_hub.types import DEFAULT_KINDS, BlockKind, Kind, Library

_SIZE = r"^(0\.\d*[1-9]\d*|[1-9]\d*(\.\d+)?)(KB|MB|GB|TB)$"
_REPO_ID = r"^[\w.-]+(/[\w.-]+)?$"
Verb = Literal["prune", "compare", "expand"]
BUDGETS = (
    "macs", "params", "structures", "memory_bytes", "latency_s", "prefill_s", "decode_s",
    "serving_bytes", "threshold",
)  # fmt: skip
_MOST_HELD_OUT = 3000  # for max_drop, where the recipe gives no number
Floor = Annotated[float, Field(ge=0, le=1)]
TaskName = Annotated[str, AfterValidator(lambda name: find_task(name).name)]


TrainT = TypeVar("TrainT", bound=TrainSection)


class ModelSection(Section):
    """What is pruned."""

    library: Library = Field(description="library that builds the model")
    id: Annotated[str, Field(min_length=1)] = Field(description="timm name, hub id or local folder")
    path: str | None = Field(
        default=None, description="local folder; goes before `id`, which then only names it"
    )
    task: TaskName = Field(
        default="self",
        description="fixes loss, example inputs and metrics; the hub's pipeline tag, or `self`, "
        "which needs inputs alone and compares with the dense model's outputs",
    )
    revision: str | None = Field(default=None, description="commit, branch or tag on the hub")
    pretrained: bool = Field(
        default=True, description="load weights; false = random weights, to be trained"
    )
    num_labels: Count | None = Field(
        default=None,
        description="classes of the head; null = the checkpoint's own, or a new one for the data",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the weights"
    )
    kwargs: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict,
        description="plain values for timm.create_model or the transformers config",
    )
    train: DenseTrainSection | None = Field(
        default=None, description="train the dense model first; keys as in `finetune`"
    )


class SourceSection(Section):
    """A data set: where it is, and which of its splits and columns are read."""

    id: str | None = Field(default=None, description="hub id, or sklearn/digits (in the box)")
    path: str | None = Field(
        default=None, description="local folder or file; goes before `id`, which then only names it"
    )
    name: str | None = Field(default=None, description="configuration of the hub data set")
    revision: str | None = Field(
        default=None, description="commit, branch or tag of the hub data set"
    )
    train: str = Field(default="train", description="name of the training split")
    test: str | None = Field(
        default="test", description="name of the test split; null = held out from train"
    )
    validation_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2,
        description="share of train held out where `test` is null, or no split has a name",
    )
    image: str = Field(default="image", description="column of the images")
    label: str = Field(default="label", description="column of the classes")
    text: str = Field(default="text", description="column of the texts")
    text_pair: str | None = Field(
        default=None,
        description="column of the second text, for text-classification of pairs; null = one text",
    )
    problem: Literal["single_label", "multi_label", "regression"] | None = Field(
        default=None,
        description="what a label of text-classification is; null = a class, several where the "
        "column has lists, a number to meet where it has fractions",
    )
    tokens: str = Field(default="tokens", description="column of lists of words")
    tags: str = Field(default="tags", description="column of lists of their tags")
    question: str = Field(default="question", description="column of the questions")
    context: str = Field(default="context", description="column of what answers stand in")
    answers: str = Field(
        default="answers", description="column of answers: {text: [...], answer_start: [...]}"
    )
    first: str = Field(default="sentence1", description="column of the first text of a pair")
    second: str = Field(default="sentence2", description="column of the second text of a pair")
    score: str = Field(default="score", description="column of how alike the texts of a pair are")
    source: str = Field(default="source", description="column of texts that are given")
    target: str = Field(
        default="target", description="column of texts that are wanted; a.b = part b of column a"
    )
    prefix: str = Field(default="", description="put before each given text, as T5 wants it")
    audio: str = Field(default="audio", description="column of recordings")
    objects: str = Field(
        default="objects", description="column of boxes: {bbox: [[...], ...], category: [...]}"
    )
    boxes: Literal["xywh", "xyxy"] = Field(
        default="xywh",
        description="pixels of a box: left, top, width, height; or left, top, right, bottom",
    )
    mask: str = Field(default="annotation", description="column of maps of class numbers")
    depth: str = Field(default="depth_map", description="column of maps of distances")
    depth_scale: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="unit of the distances, such as 0.001 for millimetres"
    )
    series: str = Field(default="target", description="column of lists of numbers over time")
    num_train: Count | None = Field(default=None, description="training samples used; null = all")
    num_test: Count | None = Field(default=None, description="test samples used; null = all")
    num_streamed: Count | None = Field(
        default=None,
        description="rows of each split of a hub data set that are streamed, the first after a "
        "shuffle of its files and of a buffer of 1000 rows; null = it is downloaded whole",
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.id is None and self.path is None:
            raise ValueError(
                "neither `id` nor `path` is given; write a hub id or a local folder or file"
            )
        return self


class DataSection(SourceSection):
    """What calibrates, trains and measures. Calibration samples come from ``train`` alone.

    Other data sets can calibrate too (``calibration``), and be measured too (``others``).
    """

    calibration: Annotated[tuple[SourceSection, ...], Field(strict=False)] = Field(
        default=(),
        description="further data sets whose train splits calibrate, in equal parts with `train`",
    )
    others: Annotated[tuple[SourceSection, ...], Field(strict=False)] = Field(
        default=(),
        description="further data sets whose test splits are measured too; report and card say "
        "which of them calibration has seen",
    )
    num_held_out: Count | None = Field(
        default=None,
        description="training samples that nothing is trained, scored or rebuilt with: "
        "budget.max_drop is measured on them; null = none, with max_drop 3000 but at most a fifth",
    )
    image_size: Count | None = Field(
        default=None, description="pixels; null = the model's own, or the data's"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(default=512, description="tokens of one sample")
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="processes that load data; 0 = this one"
    )

    def turned_to(self, source: SourceSection) -> "DataSection":
        """Another data set, in the form that this one has."""
        keys = SourceSection.model_fields
        other = {key: value for key, value in source if key in keys}
        return self.model_copy(update={**other, "calibration": (), "others": ()})


class BlocksSection(Section):
    """Whole blocks go first, by measured loss; the criterion then decides on the width of the rest.

    The block goes whose absence costs least loss for what it saves; measured anew after each.
    """

    kinds: Annotated[tuple[BlockKind, ...], Field(min_length=1, strict=False)] = Field(
        default=("attention",),
        description="attention and mlp of a layer, and whole layers",
    )
    most: Count = Field(default=3, description="blocks that go, at most, and within the budget")
    num_samples: Count = Field(
        default=32, description="calibration samples that the loss is measured on"
    )


class StructureSection(Section):
    """Which structures may go."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1, strict=False)] = Field(
        default=DEFAULT_KINDS,
        description="`residual` (transformer width) is opt-in",
    )
    only: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None, description="names of groups, with * for any text; null = all of these kinds"
    )
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="names of groups that stay whole, with * for any text"
    )
    outputs: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        default=None, description="outputs that count, where a model returns more; null = all"
    )
    blocks: BlocksSection | None = Field(
        default=None, description="let whole blocks go beside the width; null = none"
    )
    verify: Literal["thorough", "fast"] = Field(
        default="thorough", description="how each cut is proved equal to a mask"
    )


class BudgetSection(Section):
    """What is kept, as a fraction. Several at once must all hold; none means ``macs: 0.5``.

    Criteria that decide for themselves how much goes have ``threshold: 0`` instead.
    """

    macs: Share | None = Field(default=None, description="multiply-accumulates of one sample")
    params: Share | None = Field(default=None, description="parameters")
    structures: Share | None = Field(default=None, description="structures")
    memory_bytes: Share | None = Field(default=None, description="bytes of the weights")
    latency_s: Share | None = Field(
        default=None,
        description="seconds of one forward pass, by a table of measured layers; batch and length "
        "in `evaluate`",
    )
    prefill_s: Share | None = Field(
        default=None, description="the same of a language model's pass over a prompt"
    )
    decode_s: Share | None = Field(
        default=None, description="the same of one token more, after a prompt of that length"
    )
    serving_bytes: Share | None = Field(
        default=None,
        description="bytes of a language model's weights and of its cache of keys and values",
    )
    threshold: float | None = Field(
        default=None,
        description="no share: what scores less goes; 0 alone is the default of criteria that "
        "decide how much goes, and beside any budget of scp",
    )
    max_drop: dict[str, float | str] = Field(
        default_factory=dict,
        description="what may be lost of the dense model's quality: the smallest model that is "
        "within it with confidence; {accuracy: 1.0} points, {perplexity: 5%}, {divergence: 0.05}",
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        default=0.95, description="of max_drop, one-sided, on samples that guided no choice"
    )
    probes: Annotated[int, Field(ge=1, le=20)] = Field(
        default=6, description="models that the search for max_drop tries, beside three larger ones"
    )
    groups: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict,
        description="shares that single groups keep, by name with * for any text, such as "
        '{"*.mlp.*": 0.5}; 0 = nothing of it stays; alone, all others stay whole',
    )
    keep_at_least: Floor | dict[str, Floor] = Field(
        default=0.1,
        description="floor of each group, as a share of it; at least one stays. Also by name, with "
        "* for any text: the largest that fits holds. 0 is the default of scp",
    )
    round_to: Count = Field(
        default=1, description="kept counts are multiples of this, where the group allows"
    )
    uniform: bool = Field(
        default=False, description="the same share in each layer, for a native checkpoint"
    )
    target: Targets = Field(
        default=(),
        description="where the model will be loaded: counts are only those that its reader takes; "
        "a name, a section such as {name: gguf, quantization: k}, or a list of these",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, data: Any) -> Any:
        named = isinstance(data, dict) and (data.get("groups") or data.get("max_drop"))
        if isinstance(data, dict) and not named and all(data.get(key) is None for key in BUDGETS):
            return {**data, "macs": 0.5}
        return data

    def targets(self) -> dict[str, float]:
        """The budgets that are set."""
        return {key: value for key in BUDGETS if (value := getattr(self, key)) is not None}


class RebuildSection(Section):
    """Weights that read what was cut, solved again on calibration inputs, layer by layer."""

    method: Literal["ridge"] | None = Field(
        default="ridge",
        description="least squares toward what each layer computed uncut; null = leave the cut as "
        "it is",
    )
    damping: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default="auto",
        description="how strongly weights are held to what they were, as a share of the mean "
        "square of a layer's inputs; auto = the best of each layer on samples held out",
    )
    dense_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="target: 0 = the layer's own uncut output of what it is given now, 1 = its "
        "output in the dense model, between = a mix",
    )
    refine_steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="then so many steps of Adam on all weights of each block toward its uncut "
        "output, without labels; takes several times as long",
    )
    num_samples: Count = Field(
        default=256, description="calibration samples, over all processes; no labels are needed"
    )

    def options(self) -> dict[str, Any]:
        """Keywords of ``sosp_hub.rebuild``."""
        return self.model_dump(include={"damping", "dense_share", "refine_steps"})


class TeacherSection(Section):
    """Another model that is followed."""

    library: Library | None = Field(default=None, description="null = that of the model")
    id: Annotated[str, Field(min_length=1)] = Field(description="timm name, hub id or local folder")
    path: str | None = Field(default=None, description="local folder; goes before `id`")
    revision: str | None = Field(default=None, description="commit, branch or tag on the hub")


class LoraSection(Section):
    """Low-rank adapters that are trained instead of the weights, and merged into them."""

    rank: Count = Field(default=8, description="of each adapter")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=16.0, description="adapters count alpha / rank times"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="of what adapters read"
    )
    modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = Field(
        default=None,
        description="ends of the names of linear layers and convolutions that get one; null = all "
        "whose weights are not tied",
    )


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def _tokens(value: Any) -> Any:
    """A number of tokens, also as text such as 50M."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", value) if isinstance(value, str) else None
    return round(float(match[1]) * _UNITS[match[2]]) if match else value


class FinetuneSection(TrainSection):
    """Recovery after the cut."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        default=None, description="of all training in the run; null = as `accelerate launch` says"
    )
    tokens: Annotated[Count, BeforeValidator(_tokens)] | None = Field(
        default=None,
        description="of texts, to be trained with, such as 50M; goes before `epochs`; null = by "
        "epochs",
    )
    lora: LoraSection | None = Field(
        default=None, description="train adapters instead of the weights (PEFT); null = the weights"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass: less memory"
    )
    recalibrate_norm: bool | None = Field(
        default=None,
        description="re-estimate BatchNorm statistics on the calibration data, before fine-tuning, "
        "unless the loss on held-out samples rises; null = yes, but for compensate_steps and "
        "refine_steps, which are made for the statistics as they are",
    )
    freeze_norm: bool | None = Field(
        default=None,
        description="BatchNorm keeps its statistics while the model is trained; null = yes where "
        "the task has no labels and the dense model is followed",
    )
    distill: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="weight of the dense model's outputs"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=2.0, description="of the distillation"
    )
    top_k: Count | None = Field(
        default=None,
        description="the teacher's most probable outputs are computed once and kept on disk, so "
        "many for each place; null = it runs with each batch",
    )
    hidden: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="weight of the squared distance from the teacher's hidden states, as a share "
        "of their mean square",
    )
    relations: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="weight of the squared distance from the cosines between the teacher's hidden "
        "states, of the places of a text or image or else of the samples of a batch",
    )
    layers: dict[str, str] | None = Field(
        default=None,
        description="which modules follow which of the teacher's with `hidden` and `relations`; "
        "null = up to four layers at equal depth",
    )
    teacher: TeacherSection | None = Field(
        default=None,
        description="another model with the same classes or vocabulary; null = the dense model",
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="share of the train split that is not trained with and selects the state that "
        "is kept, the cut as it was among them; 0 = the last state",
    )
    most_held_out: Count = Field(default=1000, description="samples of them, at most")
    probe_steps: Count | None = Field(
        default=None,
        description="steps of a short training at a tenth, a third, once, three and ten times the "
        "learning rate; the one that is best on held-out samples is used; null = the rate as it is",
    )

    def follows(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.distill or self.follows_states())

    def follows_states(self) -> bool:
        """Whether hidden states of the teacher count."""
        return bool(self.hidden or self.relations)

    @model_validator(mode="after")
    def _follows_something(self) -> Self:
        if self.top_k and self.follows_states():
            key = "hidden" if self.hidden else "relations"
            raise ValueError(f"top_k: no hidden states are kept; leave out `{key}` or `top_k`")
        if self.top_k and self.augment:
            raise ValueError("top_k: outputs are kept for images as they are; write augment: false")
        for key in ("top_k", "teacher"):
            if getattr(self, key) and not self.follows():
                raise ValueError(f"{key}: nothing is followed; write distill: 0.5 or hidden: 1.0")
        if self.layers and not self.follows_states():
            raise ValueError(
                "layers: needs a weight of hidden states; write hidden: 1.0 or relations: 1.0"
            )
        return self

    @model_validator(mode="after")
    def _probes_on_something(self) -> Self:
        if self.probe_steps and not self.held_out:
            raise ValueError("probe_steps: the rate is chosen on held-out samples; raise held_out")
        return self


class EvaluateSection(Section):
    """What is measured: before the cut, after it, and at the end."""

    metrics: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="what the task can measure; null = its own"
    )
    harness: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="tasks of lm-evaluation-harness, where it is installed, such as [arc_easy]; of "
        "language models",
    )
    harness_folder: str | None = Field(default=None, description="with task files of one's own")
    harness_limit: Count | None = Field(default=None, description="samples of each task, at most")
    batch_size: Count = Field(default=64, description="samples of one step")
    latency: bool = Field(
        default=True, description="measure seconds of a forward pass before and after"
    )
    latency_batch_size: Count = Field(default=8, description="samples of that pass")
    latency_tokens: Annotated[int, Field(ge=2)] = Field(
        default=128, description="tokens of each, where the model takes texts"
    )


class OutputSection(Section):
    """Where the result goes."""

    dir: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="output folder; null = runs/NAME_OF_THE_RECIPE"
    )
    max_shard_size: Annotated[str, Field(pattern=_SIZE)] = Field(
        default="5GB", description="largest safetensors file, such as 500MB or 5GB"
    )
    figures: bool = Field(default=True, description="draw kept widths, saliency and metrics")
    keep_dense: bool = Field(
        default=True,
        description="keep dense weights that this run made or trained, for --from-scores",
    )
    any_budget: bool = Field(
        default=False,
        description="keep the rebuild's calibration inputs, so that from_pretrained(FOLDER, "
        "budget=...) and --from-scores rebuild at any budget without the data; they are published "
        "with the model",
    )

    @field_validator("dir")
    @classmethod
    def _has_a_name(cls, given: str | None) -> str | None:
        if given is not None and Path(given).name in ("", ".."):
            raise ValueError(
                f"got {given!r}, a folder that is there already; write the name of a new folder, "
                "such as runs/small"
            )
        return given


def _named(entry: Any) -> Any:
    """An entry that is a name alone, as a section."""
    return {"name": entry} if isinstance(entry, str) else entry


class CompareSection(Section):
    """What ``python -m sosp_hub.compare`` runs through: every criterion, budget and seed."""

    criteria: Annotated[
        tuple[Annotated[dict[str, Any], BeforeValidator(_named)], ...],
        Field(min_length=1, strict=False),
    ] = Field(
        description="names, or keys as in `criterion`, and `kinds` where they are not "
        "structure.kinds; what all criteria take is taken from `criterion`"
    )
    budgets: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = Field(
        default=(), description="keys as in `budget`, from which the rest is taken; [] = that alone"
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)] = Field(
        default=(0, 1, 2), description="each trains and scores anew; instead of `seed`"
    )


class ExpandSection(Section):
    """What ``python -m sosp_hub.expand`` does between two cuts."""

    widen: Annotated[float, Field(gt=1, le=4)] = Field(
        default=2.0, description="how many times as wide a bottleneck becomes"
    )
    threshold: Annotated[float, Field(gt=0)] = Field(
        default=0.5,
        description="a layer is a bottleneck where less than this times the share of all "
        "structures goes",
    )
    init: Literal["net2net", "fresh"] = Field(
        default="net2net",
        description="new structures are copies, or random and not yet read; exact both ways",
    )
    train: TrainSection | None = Field(
        default=None, description="training after widening, keys as there; null = `model.train`"
    )
    keep: Annotated[tuple[Share, ...], Field(strict=False)] = Field(
        default=(),
        description="shares of the base's cost, counted as in `budget`; [] = that of `budget`",
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)] = Field(
        default=(0, 1, 2), description="each trains and scores anew; instead of `seed`"
    )


class PushSection(Section):
    """Where on the hub the result goes."""

    repo_id: Annotated[str, Field(pattern=_REPO_ID)] = Field(description="NAMESPACE/NAME")
    private: bool = Field(default=True, description="of a repository that is created")
    revision: str | None = Field(default=None, description="branch; null = main")
    create_pr: bool = Field(default=False, description="open a pull request instead of a commit")
    commit_message: str | None = Field(
        default=None, description="null = one that names model and budget"
    )


def with_criterion(data: Any, scored_by: str | None = None) -> Any:
    """A recipe as it was read, with a criterion where it names none: that of its task.

    Args:
        data: Its sections.
        scored_by: What scored the run that it is of, whatever its task scores with today.
    """
    if not isinstance(data, dict) or data.get("compare") is not None:  # each cell names its own
        return data
    model, given = data.get("model"), data.get("criterion", {})
    name = model.get("task") if isinstance(model, dict) else None
    task = known_task(name) if isinstance(name, str) else None
    own = {} if task is None else _for_budget(task.criterion, data.get("budget"))
    own = {"name": scored_by} if scored_by else own
    if not own or not isinstance(given, dict) or "name" in given:
        return data
    return {**data, "criterion": {**own, **given}}


def _for_budget(criterion: Mapping[str, Any], budget: Any) -> Mapping[str, Any]:
    """Scores that are divided by a cost are divided by what the budget counts."""
    asked = budget if isinstance(budget, dict) else {}
    for key, unit in (("params", "params"), ("memory_bytes", "bytes")):
        if "per" in criterion and asked.get(key) is not None and asked.get("macs") is None:
            return {**criterion, "per": unit}
    return criterion


class Recipe(Section):
    """A whole run: model, data, decisions, recovery and where the result goes."""

    model: ModelSection
    data: DataSection
    structure: StructureSection = Field(default=StructureSection())
    criterion: AnyCriterion = Field(default_factory=lambda: CRITERIA.validate({}))
    budget: BudgetSection = Field(default=BudgetSection())
    rebuild: RebuildSection = Field(default=RebuildSection())
    finetune: FinetuneSection = Field(default=FinetuneSection())
    schedule: ScheduleSection | None = Field(
        default=None, description="cut in several rounds; null = at once"
    )
    evaluate: EvaluateSection = Field(default=EvaluateSection())
    output: OutputSection = Field(default=OutputSection())
    push: PushSection | None = Field(
        default=None, description="publish the result; null = keep it here"
    )
    compare: CompareSection | None = Field(
        default=None, description="for `python -m sosp_hub.compare`; null = one run"
    )
    expand: ExpandSection | None = Field(
        default=None, description="for `python -m sosp_hub.expand`; null = one run"
    )
    seed: Seed = Field(default=0, description="of everything random")

    @model_validator(mode="before")
    @classmethod
    def _criterion_of_the_task(cls, data: Any) -> Any:
        return with_criterion(data)

    @model_validator(mode="before")
    @classmethod
    def _default_threshold(cls, data: Any) -> Any:
        criterion = CRITERIA.given(data.get("criterion")) if isinstance(data, dict) else None
        if criterion is None or not criterion.decides_budget:
            return data
        budget = {} if data.get("budget") is None else data["budget"]
        if not isinstance(budget, dict) or budget.get("max_drop"):
            return data
        given = {
            key for key in (*BUDGETS, "groups", "keep_at_least") if budget.get(key) is not None
        }
        decided = {}
        if criterion.silences:  # what is off goes whatever else is asked, but for one of a group
            decided = {"threshold": 0.0, "keep_at_least": 0.0}
        elif not given - {"keep_at_least"}:
            decided = {"threshold": 0.0}
        if "groups" in given:
            decided.pop("threshold", None)
        return {**data, "budget": {**decided, **{k: v for k, v in budget.items() if v is not None}}}

    @model_validator(mode="after")
    def _criterion_fits_the_kinds(self) -> Self:
        if self.compare is not None:  # which says for each criterion what it scores
            return self
        criterion, kinds = self.criterion, self.structure.kinds
        if unscorable := [kind for kind in kinds if kind not in criterion.kinds]:
            others = [
                name
                for name, other in CRITERIA.known().items()
                if set(unscorable) <= set(other.kinds)
            ]
            raise ValueError(
                f"criterion.name: {criterion.name} cannot score {', '.join(unscorable)}; "
                + (
                    f"write structure.kinds: [{', '.join(criterion.kinds)}]"
                    if criterion.kinds == ("layer",)
                    else f"write {', '.join(others[:-1])} or {others[-1]}, or leave "
                    f"{', '.join(unscorable)} out of structure.kinds"
                )
            )
        for key, asked in (
            ("compensate", criterion.compensates()),
            ("compensate_bias", criterion.compensate_bias),
        ):
            if asked and "layer" in kinds:
                raise ValueError(
                    f"criterion.{key}: a whole layer cannot be compensated; leave it out, or leave "
                    "layer out of structure.kinds"
                )
        for key, conflict in criterion.conflicts():
            raise ValueError(f"criterion.{key}: {conflict}")
        return self

    @model_validator(mode="after")
    def _tokens_of_texts(self) -> Self:
        task, option = known_task(self.model.task), self.criterion.of_tokens()
        if task is None or task.tokens:
            return self
        for key, asked, instead in (
            (f"criterion.{option}", option, "leave it out"),
            ("finetune.tokens", self.finetune.tokens, "write finetune.epochs"),
        ):
            if asked:
                raise ValueError(
                    f"{key}: needs texts, and samples of {task.name} have no tokens; {instead}"
                )
        return self

    @model_validator(mode="after")
    def _at_one_budget(self) -> Self:
        for key, many in (
            ("schedule", self.schedule),
            ("budget.max_drop", self.budget.max_drop),
            ("expand", self.expand),
        ):
            if many and self.structure.blocks is not None:
                raise ValueError(
                    f"structure.blocks: blocks are chosen for one budget, and {key} cuts at "
                    "several; leave one of them out"
                )
            if many and self.output.any_budget and key != "budget.max_drop":
                raise ValueError(
                    f"output.any_budget: needs scores of the dense model alone; leave out {key}"
                )
        return self

    @model_validator(mode="after")
    def _fits_expansion(self) -> Self:
        if self.expand is None:
            return self
        known = ("macs", "params", "memory_bytes")
        odd = [key for key in self.budget.targets() if key not in known]
        if odd:
            raise ValueError(
                f"budget.{odd[0]}: a wider model is cut back to what the base costs in "
                f"{', '.join(known)}; write one of these"
            )
        if self.expand.keep and len(self.budget.targets()) > 1:
            raise ValueError(
                "expand.keep: needs one cost, and `budget` has "
                f"{', '.join(self.budget.targets())}; leave one of them"
            )
        if self.push or self.compare:
            key = "push" if self.push else "compare"
            raise ValueError(f"{key}: goes with `prune` alone; leave it out beside `expand`")
        return self

    @model_validator(mode="after")
    def _fits_serving(self) -> Self:
        generates = find_task(self.model.task).name == "text-generation"
        for key in ("prefill_s", "decode_s", "serving_bytes"):
            if getattr(self.budget, key) is not None and not generates:
                raise ValueError(
                    f"budget.{key}: is of language models that generate, task text-generation; "
                    "write latency_s or memory_bytes"
                )
        if self.evaluate.harness and not generates:
            raise ValueError(
                "evaluate.harness: is of language models, task text-generation; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fits_a_schedule(self) -> Self:
        if self.schedule is None:
            return self
        known = ("macs", "params", "memory_bytes")
        targets = self.budget.targets()
        if self.budget.max_drop or self.budget.groups or not set(targets) <= set(known):
            raise ValueError(
                f"schedule: rounds lead to a share of {', '.join(known)}; write one of these as "
                "`budget`, and nothing else that decides how much goes"
            )
        if self.criterion.compensate_bias:
            raise ValueError("schedule: plans that shift biases cannot be put together")
        if "layer" in self.structure.kinds and len(self.structure.kinds) > 1:
            raise ValueError(
                "schedule: layers have other numbers once some are gone, so that cuts inside them "
                "cannot be put together with those of earlier rounds; write structure.kinds: "
                "[layer], or leave layer out of it"
            )
        if self.compare or self.expand or isinstance(self.criterion, MaskTrainedCriterion):
            raise ValueError("schedule: goes with `prune` alone, and with criteria that only score")
        return self

    @model_validator(mode="after")
    def _fits_a_promise(self) -> Self:
        if not self.budget.max_drop:
            return self
        try:
            self.drops()
        except ValueError as error:
            raise ValueError(f"budget.{error}") from None
        if self.expand or self.compare:
            what = "expand" if self.expand else "compare"
            raise ValueError(f"budget.max_drop: goes with `prune` alone; leave it out of {what}")
        if self.criterion.damping == "auto":
            raise ValueError(
                "criterion.damping: auto is chosen at one budget, and max_drop tries many; write a "
                "number"
            )
        return self

    @model_validator(mode="after")
    def _reads_the_columns(self) -> Self:
        task = find_task(self.model.task)
        every = {key for each in tasks().values() for key in (*each.columns, *each.more_columns)}
        read = (*task.columns, *task.more_columns)
        fields = type(self.data).model_fields
        odd = [k for k in sorted(every - {*read}) if getattr(self.data, k) != fields[k].default]
        if odd:
            raise ValueError(
                f"data.{odd[0]}: {task.name} does not read it; its columns are named by "
                f"{', '.join(f'data.{key}' for key in read)}"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        task = find_task(self.model.task)
        for number, metric in enumerate(self.evaluate.metrics or ()):
            if metric not in task.metrics:
                near = difflib.get_close_matches(metric, task.metrics, n=1, cutoff=0.5)
                guess = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"evaluate.metrics.{number}: {task.name} has no {metric!r}{guess}; it has "
                    f"{', '.join(task.metrics)}"
                )
        if self.model.num_labels is not None and not task.head and task.auto_class:
            raise ValueError(
                f"model.num_labels: {task.name} has no head with an output for each label; leave "
                "it out"
            )
        if not task.learns:
            for key, asked in (
                ("model.train", self.model.train),
                ("criterion.name", isinstance(self.criterion, MaskTrainedCriterion)),
            ):
                if asked:
                    raise ValueError(
                        f"{key}: {task.name} has no labels to train a dense model with; give a "
                        "trained model, or a task with labels"
                    )
        if task.pixels or not self.augments():
            return self
        raise ValueError("augment: only images of one size are augmented; leave it out")

    def at_rate(self, training: TrainT) -> TrainT:
        """A training with the rate and the norms that suit task and weights, where it gives none.

        A rate that trains random weights ruins pretrained ones: at 1e-3 a text classifier fell from
        62.5 % after the cut to 46.0 %, at 5e-5 it rose to 63.5 %.
        """
        task = find_task(self.model.task)
        if isinstance(training, FinetuneSection) and training.freeze_norm is None:
            training = training.model_copy(update={"freeze_norm": not task.learns})
        return training.at_rate(task.pretrained_rate if self.model.pretrained else task.random_rate)

    def drops(self) -> tuple[Drop, ...]:
        """What may be lost of the dense model's quality."""
        task = find_task(self.model.task)
        return read_drops(self.budget.max_drop, task.metrics, task.of_all)

    def held_out_key(self) -> int | str | None:
        """What decides how many training samples nothing is fitted to."""
        return self.data.num_held_out or ("for max_drop" if self.budget.max_drop else None)

    def num_held_out(self, num_train: int) -> int:
        """Of so many training samples, those that nothing is fitted to."""
        asked = self.data.num_held_out
        if asked is not None:
            return asked
        return min(_MOST_HELD_OUT, num_train // 5) if self.budget.max_drop else 0

    def recalibrates(self) -> bool:
        """Whether BatchNorm statistics are re-estimated after a cut."""
        asked = self.finetune.recalibrate_norm
        refines = self.rebuilds() and self.rebuild.refine_steps > 0
        trained = self.criterion.compensate_steps > 0 or refines
        return not trained if asked is None else asked

    def rebuilds(self) -> bool:
        """Whether weights are solved again after a cut, where there is calibration data."""
        layers = set(self.structure.kinds) == {"layer"}
        return self.rebuild.method is not None and not layers

    def augments(self) -> bool:
        """Whether any training shifts and flips images."""
        trainings = [self.finetune, self.model.train, self.expand and self.expand.train]
        return any(training is not None and training.augment for training in trainings)
