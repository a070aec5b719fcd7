"""What the steps of a run share: recipe, data, model and its groups, and the cache; no steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from sosp_hub.compat.accelerate import load_whole_models
from sosp_hub.data.loading import Split, calibration_batches, load_split, most_calibration
from sosp_hub.data.source import DataInfo, OpenData, SplitName, open_data
from sosp_hub.data.split import Part
from sosp_hub.distributed import logger, make_accelerator
from sosp_hub.errors import DataError, shortened
from sosp_hub.pipeline.eligible import eligible_groups
from sosp_hub.pipeline.scores import Scores, weights_of
from sosp_hub.pipeline.stage_cache import StageCache
from sosp_hub.recipe.criteria import MaskTrainedCriterion
from sosp_hub.recipe.schema import Recipe, SourceSection
from sosp_hub.recipe.tasks import find_task
from sosp_hub.recipe.training import DenseTrainSection
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group
from sosp_hub.structure.trace import trace
from sosp_hub.tasks.batches import num_samples as count_samples
from sosp_hub.zoo.load import Loaded, example_inputs
from sosp_hub.zoo.load import load_model as load_from_zoo

if TYPE_CHECKING:
    from sosp_hub.types import LossFn

_Key = tuple[SplitName, bool, SourceSection | None]


@dataclass(frozen=True)
class Context:
    """What the steps of a run share.

    Attributes:
        recipe: What to do.
        cache: Where steps leave what they made.
        accelerator: Of this run.
        loaded: The dense model and what came with it.
        graph: Of the dense model.
        data: Opened data; None where nothing is measured and nothing trained.
        scores: Of an earlier run, to be used instead of scoring.
        sources: The other data sets of the recipe, opened.
        original: The dense model, where `model` was cut in rounds before; None = `model`.
        stuck: Groups whose whole blocks cannot go, as a cut without them was not verified.
    """

    recipe: Recipe
    cache: StageCache
    accelerator: Accelerator
    loaded: Loaded
    graph: Graph
    data: OpenData | None = None
    scores: Scores | None = None
    sources: Mapping[SourceSection, OpenData] = field(default_factory=dict)
    _splits: dict[_Key, Split] = field(default_factory=dict, repr=False)
    _batches: dict[tuple[int, int, int], Sequence[Any]] = field(default_factory=dict, repr=False)
    original: nn.Module | None = None
    stuck: set[str] = field(default_factory=set)

    def turned_to(self, recipe: Recipe, cache: StageCache) -> Self:
        """The same model and data for a recipe that differs in criterion, budget or kinds alone."""
        return dataclasses.replace(self, recipe=recipe, cache=cache)

    def with_model(self, model: nn.Module, recipe: Recipe, cache: StageCache) -> Self:
        """The same data for another model of the same kind."""
        loaded = dataclasses.replace(self.loaded, model=model)
        return dataclasses.replace(
            self,
            recipe=recipe,
            cache=cache,
            loaded=loaded,
            graph=_traced(loaded, recipe, self.accelerator),
        )

    @property
    def model(self) -> nn.Module:
        """The model that is cut."""
        return self.loaded.model

    @property
    def dense(self) -> nn.Module:
        """The dense model, which is what is cut unless it was cut in rounds before."""
        return self.model if self.original is None else self.original

    @property
    def groups(self) -> dict[str, Group]:
        """The groups that may be cut."""
        return eligible_groups(self.graph, self.recipe)

    @property
    def graph_of_groups(self) -> Graph:
        """The graph with the groups that may be cut alone."""
        return dataclasses.replace(self.graph, groups=self.groups)

    @property
    def train(self) -> Split:
        """The train split, without what is held out of everything."""
        return self._parts("train", held_out=False)

    @property
    def augmented(self) -> Split:
        """The same, shifted and flipped."""
        return self._parts("train", held_out=False, augment=True)

    @property
    def held_out(self) -> Split:
        """Training samples that nothing is trained, scored or rebuilt with."""
        return self._parts("train", held_out=True)

    @property
    def test(self) -> Split:
        """The test split."""
        return self._split("test")

    @property
    def others(self) -> dict[str, tuple[Split, bool]]:
        """Test splits of other data sets by a short name, and whether their texts calibrated."""
        found: dict[str, tuple[Split, bool]] = {}
        for source in self.recipe.data.others:
            name = short = Path(self.sources[source].name).name
            number = 2
            while name in found:
                name, number = f"{short} {number}", number + 1
            seen = source in self.recipe.data.calibration
            found[name] = self._split("test", source=source), seen
        return found

    @property
    def calibration_splits(self) -> list[Split]:
        """Train splits that calibrate: of the data, and of what the recipe mixes in."""
        more = [self._split("train", source=other) for other in self.recipe.data.calibration]
        return [self.train, *more]

    @property
    def num_samples(self) -> int:
        """Calibration samples of all processes."""
        return self.at_most(self.recipe.criterion.num_samples)

    def at_most(self, num_samples: int) -> int:
        """So many calibration samples, or as many as there are."""
        if self.data is None and self.scores is not None:
            return sum(count_samples(batch) for batch in self.scores.inputs(num_samples))
        return min(num_samples, most_calibration(self.calibration_splits))

    def calibration_batches(self, start: int = 0, stop: int | None = None) -> Sequence[Any]:
        """This process's share of the calibration samples, or of those from start to stop."""
        stop = self.num_samples if stop is None else stop
        size = self.recipe.criterion.batch_size
        if (start, stop, size) not in self._batches:
            self._batches[start, stop, size] = calibration_batches(
                self.calibration_splits,
                stop,
                size,
                start=start,
                seed=self.recipe.seed,
                rank=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
            )
        return self._batches[start, stop, size]

    @property
    def has_inputs(self) -> bool:
        """Whether there are inputs to rebuild with: of the data, or of the run that scored."""
        kept = self.scores and self.scores.calibration_inputs
        return self.data is not None or bool(kept)

    def inputs(self, num_samples: int) -> Sequence[Any]:
        """This process's share of so many calibration inputs, of the data or of an earlier run."""
        if self.data is None:
            assert self.scores is not None
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            return self.scores.inputs(num_samples)[rank::world]
        return self.calibration_batches(0, self.at_most(num_samples))

    def loss_fn(self, model: nn.Module) -> "LossFn | None":
        """The loss of the dense model or of one that was cut from it; None = the model's own."""
        dense = None if model is self.dense else self.dense
        return find_task(self.recipe.model.task).loss_fn(model, dense)

    @property
    def made_dense(self) -> bool:
        """Whether the dense weights are of this run's own making, so that nobody else has them."""
        if self.scores is not None:
            return self.scores.has_dense
        masked = isinstance(self.recipe.criterion, MaskTrainedCriterion)
        return self.has_random_weights or self.dense_training is not None or masked

    @property
    def has_random_weights(self) -> bool:
        """Whether the head, or the whole model, begins with random weights."""
        return self.loaded.new_head or not self.recipe.model.pretrained

    @property
    def dense_training(self) -> DenseTrainSection | None:
        """How the dense model is trained; None where it is not."""
        config = self.recipe.model.train
        if config is None or (config.when == "new_head" and not self.has_random_weights):
            return None
        return config

    @property
    def base(self) -> dict[str, Any]:
        """Where the dense model comes from, for the report."""
        base = {
            "model": self.loaded.base_model,
            "revision": self.loaded.base_revision,
            "architecture": Path(self.recipe.model.id).name,
            "weights": weights_of(self.model),
            "trained": bool(self.dense_training),
            **self.loaded.card,
        }
        return base if self.scores is None else {**base, **self.scores.base, "cut_again": True}

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What calibrates, for the report."""
        if self.scores is not None:
            return self.scores.calibration
        mixed = [_in_words(source, self.sources[source]) for source in self.recipe.data.calibration]
        name = ", ".join([_in_words(self.recipe.data, self.data), *mixed]) if self.data else None
        seen = [other for other, (_, seen) in self.others.items() if seen] if self.data else []
        told = {"data": name, "num_samples": self.num_samples, "seed": self.recipe.seed}
        return {**told, "seen": seen} if seen else told

    def _parts(self, name: SplitName, *, held_out: bool, augment: bool = False) -> Split:
        """The samples of a split that are held out of everything, or the others."""
        whole = self._split(name, augment)
        number = self.recipe.num_held_out(len(whole))
        if not number and not held_out:
            return whole
        if number >= len(whole):
            raise DataError(
                f"data.num_held_out: {number} of {len(whole)} training samples leave none to train "
                "and to calibrate with; raise data.num_train"
            )
        generator = torch.Generator().manual_seed(self.recipe.seed)
        order = torch.randperm(len(whole), generator=generator).tolist()
        return Part(whole, order[:number] if held_out else sorted(order[number:]))

    def _split(
        self, name: SplitName, augment: bool = False, source: SourceSection | None = None
    ) -> Split:
        assert self.data is not None  # nothing is measured or trained without it
        key = name, augment, source
        if key not in self._splits:
            data = self.data if source is None else self.sources[source]
            split = load_split(data, name, self.loaded.processor, augment=augment)
            if source is not None and split.class_names != self.train.class_names:
                raise DataError(
                    f"data: {data.name} has the classes {shortened(str(split.class_names))}, and "
                    f"{self.data.name} has {shortened(str(self.train.class_names))}; only data "
                    "sets with the same classes can be mixed or measured beside each other"
                )
            self._splits[key] = split
        return self._splits[key]


def _in_words(source: SourceSection, opened: OpenData) -> str:
    """What was read; a name alone where that was fetched by it, and not from local files."""
    local = source.path if source.id else None
    return opened.name if local is None else f"{opened.name} (local files {Path(local).name})"


def open_context(
    recipe: Recipe, cache: StageCache, scores: Scores | None = None, *, with_data: bool = True
) -> Context:
    """Opens data and model of a recipe, and finds the groups.

    Args:
        recipe: What to do.
        cache: Where steps leave what they made.
        scores: Of an earlier run, to be used instead of scoring.
        with_data: Open the data; without it nothing is measured and nothing trained.
    """
    if scores is not None:
        recipe = recipe.model_copy(update={"model": scores.model()})
    with cache.timed("load", "load model and data"):
        load_whole_models()
        accelerator = make_accelerator(recipe.finetune.mixed_precision, recipe.seed)
        set_seed(recipe.seed)
        data = open_data(recipe.data, recipe.model.task, seed=recipe.seed) if with_data else None
        sources = {
            source: open_data(recipe.data.turned_to(source), recipe.model.task, seed=recipe.seed)
            for source in (*recipe.data.calibration, *recipe.data.others)
            if with_data
        }
        info = data.info if data else DataInfo(image_size=recipe.data.image_size)
        loaded = load_from_zoo(recipe.model, data=info)
        if scores is not None:
            scores.check_weights(loaded.model)
        splits: dict[_Key, Split] = {}
        if data is None:
            logger.info("the data is not opened: nothing is measured or trained")
        else:
            splits["train", False, None] = load_split(data, "train", loaded.processor)
            splits["test", False, None] = load_split(data, "test", loaded.processor)
            num_train, wanted = len(splits["train", False, None]), recipe.criterion.num_samples
            if scores is None and wanted > num_train:
                logger.warning(
                    "criterion.num_samples is %d; the train split has %d samples, all are used",
                    wanted,
                    num_train,
                )
    with cache.timed("trace", "find groups"):
        graph = _traced(loaded, recipe, accelerator)
        logger.info("costs are for one input of %s", graph.sized.sample)
    return Context(recipe, cache, accelerator, loaded, graph, data, scores, sources, _splits=splits)


def _traced(loaded: Loaded, recipe: Recipe, accelerator: Accelerator) -> Graph:
    """The graph of a model, which then goes to its device."""
    outputs = recipe.structure.outputs or find_task(recipe.model.task).outputs
    length = recipe.data.max_length if recipe.data else None
    sized = None if length is None else example_inputs(loaded, num_tokens=length)
    graph = trace(loaded.model, example_inputs(loaded), outputs=outputs, cost_inputs=sized)
    loaded.model.to(accelerator.device)
    return graph
