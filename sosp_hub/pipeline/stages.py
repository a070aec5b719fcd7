"""The stages of a run: what each does, and what it leaves for the next."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from accelerate.utils import set_seed
from safetensors.torch import load_model, save_model
from torch import nn

from sosp_hub.data.loading import Split, calibration_batches, load_split, make_loader
from sosp_hub.data.source import DataInfo, OpenData, SplitName, open_data
from sosp_hub.distributed import (
    is_main,
    logger,
    make_accelerator,
    progress,
    wait_for_everyone,
)
from sosp_hub.evaluate import evaluate
from sosp_hub.finetune import finetune, recalibrate_norm
from sosp_hub.pipeline import decide
from sosp_hub.pipeline.eligible import eligible_groups
from sosp_hub.pipeline.masking import train_with_masks
from sosp_hub.pipeline.memory import PeakMemory
from sosp_hub.pipeline.scores import Scores
from sosp_hub.pipeline.stage_cache import WorkFolder, make_folder
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.criteria import MaskTrainedCriterion
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recovery.recover import recover
from sosp_hub.scoring import scorable_groups
from sosp_hub.soft_masks import SoftMasks
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.zoo.load import example_inputs
from sosp_hub.zoo.load import load_model as load_from_zoo

if TYPE_CHECKING:
    pass


class Stages:
    """The stages, and what several of them need.

    Args:
        recipe: What to do.
        work: Where the stages leave what they made.
        scores: Of an earlier run, to be used instead of scoring.
        with_data: Open the data; without it nothing is measured and nothing trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: WorkFolder,
        scores: Scores | None = None,
        *,
        with_data: bool = True,
    ) -> None:
        if scores is not None:
            recipe = recipe.model_copy(update={"model": scores.model()})
        self.recipe, self.work, self.scores = recipe, work, scores
        self.accelerator = make_accelerator(recipe.finetune.mixed_precision, recipe.seed)
        set_seed(recipe.seed)
        self._data = (
            open_data(recipe.data, recipe.model.task, seed=recipe.seed) if with_data else None
        )
        info = self._data.info if self._data else DataInfo(image_size=recipe.data.image_size)
        self.loaded = load_from_zoo(recipe.model, data=info)
        self.model = self.loaded.model
        self._batches: dict[tuple[int, int, int], Sequence[Any]] = {}
        if self._data is None:
            logger.info("the data is not opened: nothing is measured, and nothing trained")
            return
        self.train = self._split(self._data, "train")
        self.test = self._split(self._data, "test")
        if scores is None and recipe.criterion.num_samples > len(self.train):
            logger.warning(
                "criterion.num_samples is %d; the train split has %d samples, all are used",
                recipe.criterion.num_samples,
                len(self.train),
            )

    @property
    def has_data(self) -> bool:
        """Whether anything can be measured."""
        return self._data is not None

    def turned_to(self, recipe: Recipe, work: WorkFolder) -> Self:
        """The same model and data for a recipe that differs in criterion, budget or kinds alone."""
        other = copy.copy(self)
        other.recipe, other.work = recipe, work
        return other

    def with_model(self, model: nn.Module, recipe: Recipe, work: WorkFolder) -> Self:
        """The same data for another model of the same kind."""
        other = self.turned_to(recipe, work)
        other.loaded = dataclasses.replace(self.loaded, model=model)
        other.model = model
        return other

    @property
    def calibration(self) -> Mapping[str, Any]:
        """What calibrates, for the report."""
        if self.scores is not None:
            return self.scores.calibration
        name = self._data.name if self._data else None
        found = {"data": name, "num_samples": self.num_samples, "seed": self.recipe.seed}
        return found | (self.work.read("curvature") or {}).get("made", {})

    def trace(self) -> Graph:
        """Finds the groups; refuses what cannot be cut so far before anything long begins."""
        inputs = example_inputs(self.loaded)
        graph = trace(self.model, inputs, outputs=self.recipe.structure.outputs)
        decide.check(self, graph)
        self.model.to(self.accelerator.device)
        return graph

    def groups(self, graph: Graph) -> dict[str, Group]:
        """The groups that may be cut."""
        return eligible_groups(graph, self.recipe)

    def chosen(self, graph: Graph) -> Graph:
        """The graph with the groups that may be cut alone."""
        return dataclasses.replace(graph, groups=self.groups(graph))

    @property
    def made_dense(self) -> bool:
        """Whether the dense weights are of this run's own making, so that nobody else has them."""
        if self.scores is not None:
            return self.scores.has_dense
        model = self.recipe.model
        trains = bool(model.train) or isinstance(self.recipe.criterion, MaskTrainedCriterion)
        return self.loaded.new_head or not model.pretrained or trains

    @property
    def base(self) -> dict[str, Any]:
        """Where the dense model comes from, for the report."""
        found = {
            "model": self.loaded.base_model,
            "revision": self.loaded.base_revision,
            "architecture": Path(self.recipe.model.id).name,
            **self.loaded.card,
        }
        return {**found, **self.scores.base} if self.scores is not None else found

    def train_dense(self) -> None:
        """Trains the dense model, where the recipe says so."""
        config = self.recipe.model.train
        if config is None or config.epochs == 0:
            if self.loaded.new_head or not self.recipe.model.pretrained:
                logger.warning(
                    "%s starts from random weights and is not trained before it is scored; "
                    "write model.train: {epochs: ...}",
                    "the head" if self.recipe.model.pretrained else "the model",
                )
            return

        def train(state: Path) -> dict[str, Any]:
            history = finetune(
                self.model,
                self._augmented() if config.augment else self.train,
                config,
                checkpoint_dir=state,
                accelerator=self.accelerator,
                seed=self.recipe.seed,
                num_workers=self._num_workers,
                description="train dense",
            )
            return {"history": history}

        self._trained("dense", self.model, train)

    def train_masks(self, graph: Graph) -> None:
        """Trains the model on with masks, where the criterion is such a training."""
        criterion, tensors = self.recipe.criterion, self.work.tensors("masked")
        if not isinstance(criterion, MaskTrainedCriterion) or self.scores is not None:
            return
        groups = scorable_groups(self.chosen(graph), type(criterion), self.recipe.structure.kinds)

        def make() -> dict[str, Any]:
            config = criterion.train
            made = train_with_masks(
                SoftMasks(self.model, groups, criterion.t, criterion.c0, config.k, config.tau),
                self.train,
                self._augmented() if config.augment else self.train,
                config,
                state=self.work.training_state("masked"),
                accelerator=self.accelerator,
                seed=self.recipe.seed,
                num_workers=self._num_workers,
            )
            self.save(lambda: save_model(self.model, str(tensors)))
            return made

        self.stage("masked", make)
        load_model(self.model, tensors)

    def measure(self, stage: str, model: nn.Module) -> dict[str, Any]:
        """Metrics on the test split; none without data."""
        section = self.recipe.evaluate
        if self._data is None:
            return {}

        def make() -> dict[str, Any]:
            loader = make_loader(self.test, section.batch_size, num_workers=self._num_workers)
            loader = self.accelerator.prepare_data_loader(loader)
            names = section.names(self.recipe.model.task)
            shown = progress(loader, f"measure {stage.removesuffix('_metrics')}")
            found = evaluate(model, shown, names, class_names=self.test.class_names)
            return {name: dataclasses.asdict(metric) for name, metric in found.items()}

        return self.stage(stage, make)

    def cut(
        self, graph: Graph, plan: PruningPlan, verify: Literal["thorough", "fast"] | None = None
    ) -> nn.Module:
        """The smaller model; a cut that is not proved equal to a mask raises.

        Cuts and proves on the CPU, where the traced inputs are and float32 means float32.
        """
        set_seed(self.recipe.seed)
        device = self.accelerator.device
        verify = verify or self.recipe.structure.verify
        try:
            return apply(self.model.cpu(), graph, plan, verify=verify).to(device)
        finally:
            self.model.to(device)

    def follow_up(self, pruned: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """What follows a cut: metrics, norms re-estimated, fine-tuning; what is told of that.

        Metrics of ``cut``, ``recalibrated`` where there was a norm to re-estimate, and ``final``
        where there was fine-tuning.
        """
        metrics = {"cut": self.measure("cut_metrics", pruned)}
        with self.work.timed("recalibration"):
            recalibrated = self._recalibrate(pruned)
        if recalibrated:
            metrics["recalibrated"] = self.measure("recalibrated_metrics", pruned)
        recovery = self._recover(pruned)
        if recovery:
            metrics["final"] = self.measure("final_metrics", pruned)
        return metrics, recovery

    def _recalibrate(self, pruned: nn.Module) -> bool:
        """Re-estimates BatchNorm statistics; whether there was anything to do."""
        if not self.recipe.recalibrates() or self._data is None:
            return False
        return recalibrate_norm(pruned, self.calibration_batches()) > 0

    def _recover(self, pruned: nn.Module) -> dict[str, Any]:
        """Fine-tunes; the loss curve and the state that was kept, none without fine-tuning."""
        config = self.recipe.finetune
        if config.epochs == 0 or self._data is None:
            return {}

        def train(state: Path) -> dict[str, Any]:
            recovery = recover(
                pruned,
                self.train,
                config,
                augmented=self._augmented() if config.augment else None,
                teacher=self.model if config.distill else None,
                checkpoint_dir=state,
                accelerator=self.accelerator,
                seed=self.recipe.seed,
                num_workers=self._num_workers,
            )
            return dataclasses.asdict(recovery)

        return self._trained("final", pruned, train)

    def _trained(
        self, stage: str, model: nn.Module, train: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        """What a training returns, which has a folder for its state; its weights are kept."""
        tensors = self.work.tensors(stage)

        def make() -> dict[str, Any]:
            made = train(self.work.training_state(stage))
            self.save(lambda: save_model(model, str(tensors)))
            return made

        record = self.stage(stage, make)
        load_model(model, tensors)  # read on the CPU, copied to where the model is
        return record

    def stage(
        self, stage: str, make: Callable[[], dict[str, Any]], *, with_peak: bool = False
    ) -> dict[str, Any]:
        """What a stage made, now unless it is there; ``with_peak`` notes the memory it took."""
        record = self.work.read(stage)
        if record is None:
            set_seed(self.recipe.seed)
            peak = PeakMemory() if with_peak else None
            start = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - start
            record = self.work.write(stage, made, seconds, peak.grown_bytes() if peak else None)
        return record["made"]

    def save(self, write: Callable[[], None]) -> None:
        """The main process writes to the work folder, and all wait for it."""
        if is_main():
            make_folder(self.work.folder)
            write()
        wait_for_everyone()

    def calibration_batches(self, start: int = 0, stop: int | None = None) -> Sequence[Any]:
        """This process's share of the calibration samples, or of those from start to stop."""
        stop = self.num_samples if stop is None else stop
        size = self.recipe.criterion.batch_size
        if (start, stop, size) not in self._batches:
            self._batches[start, stop, size] = calibration_batches(
                self.train,
                stop,
                size,
                start=start,
                seed=self.recipe.seed,
                rank=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
            )
        return self._batches[start, stop, size]

    def _split(self, data: OpenData, name: SplitName, augment: bool = False) -> Split:
        return load_split(data, name, self.loaded.processor, augment=augment)

    def _augmented(self) -> Split:
        assert self._data is not None  # nothing is trained without it
        return self._split(self._data, "train", augment=True)

    @property
    def num_samples(self) -> int:
        """Calibration samples of all processes."""
        return min(self.recipe.criterion.num_samples, len(self.train))

    @property
    def _num_workers(self) -> int:
        return self.recipe.data.num_workers
