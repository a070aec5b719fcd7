"""The stages of a run: what each does, and what it leaves for the next."""

import copy
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from sosp_hub.allocation import allocate
from sosp_hub.criteria.registry import check_per, scorable_groups, score
from sosp_hub.data.loading import Split, calibration_batches, load_split, make_loader
from sosp_hub.data.source import DataInfo, OpenData, SplitName, open_data
from sosp_hub.distributed import (
    OnDevice,
    from_main,
    is_main,
    logger,
    make_accelerator,
    process_sum,
    progress,
    to_device,
    wait_for_everyone,
)
from sosp_hub.errors import VerificationError
from sosp_hub.evaluate import evaluate, measure_latency
from sosp_hub.finetune import finetune, recalibrate_norm
from sosp_hub.pipeline import compensation
from sosp_hub.pipeline.eligible import eligible_groups
from sosp_hub.pipeline.masking import train_with_masks
from sosp_hub.pipeline.memory import PeakMemory
from sosp_hub.pipeline.scores import Scores
from sosp_hub.pipeline.work import WorkFolder, make_folder
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.criteria import ScpSection
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.training import TrainSection
from sosp_hub.soft_masks import SoftMasks
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.zoo.load import example_inputs
from sosp_hub.zoo.load import load_model as load_from_zoo

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


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
        self.check(graph)
        self.model.to(self.accelerator.device)
        return graph

    def check(self, graph: Graph) -> None:
        """Refuses kinds that the model does not have and a budget that cannot be met."""
        criterion = self.recipe.criterion
        check_per(criterion.name, criterion.per, criterion.options())
        able = scorable_groups(self.chosen(graph), criterion.name, self.recipe.structure.kinds)
        targets = self.recipe.budget.targets()
        targets.pop("latency_s", None)  # is measured, and takes its time
        if targets:
            equal = {name: torch.ones(group.size) for name, group in able.items()}
            self._allocate(graph, equal, targets)

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
        model, trains = self.recipe.model, self.recipe.criterion.name == "scp"
        return self.loaded.new_head or not model.pretrained or bool(model.train) or trains

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
        self._trained("dense", self.model, config, "train dense")

    def train_masks(self, graph: Graph) -> None:
        """Trains the model on with masks, where the criterion is such a training."""
        criterion, tensors = self.recipe.criterion, self.work.tensors("masked")
        if not isinstance(criterion, ScpSection) or self.scores is not None:
            return
        groups = scorable_groups(self.chosen(graph), criterion.name, self.recipe.structure.kinds)

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

    def score(self, graph: Graph) -> "Saliency":
        """Saliency of every structure that may go."""
        if self.scores is not None:
            return self.scores.saliency
        tensors = self.work.tensors("saliency")
        measured = damping = None
        if self.recipe.criterion.name == "sosp_i" and not self.work.read("saliency"):
            measured = compensation.curvature(self, graph)
            if self.recipe.criterion.by_damping():
                damping, _ = self._damping(graph, measured)

        def make() -> dict[str, Any]:
            saliency = self._scores(graph, measured, damping)
            whole = {name: scores.contiguous() for name, scores in saliency.items()}
            self.save(lambda: save_file(whole, tensors))
            return {}

        self.stage("saliency", make, with_peak=True)
        return load_file(tensors)

    def _scores(
        self, graph: Graph, measured: compensation.Curvature | None, damping: float | None
    ) -> "Saliency":
        options = self.recipe.criterion.options()
        if measured:
            options["curvature"] = measured.found
        if damping:
            options["damping"] = damping
        return score(
            self.model,
            self.chosen(graph),
            OnDevice(self.calibration_batches(), "score"),
            criterion=self.recipe.criterion.name,
            kinds=self.recipe.structure.kinds,
            seed=self.recipe.seed,
            process_sum=process_sum,
            per=self.recipe.criterion.per,
            **options,
        )

    def plan_and_cut(self, graph: Graph, saliency: "Saliency") -> tuple[PruningPlan, nn.Module]:
        """A plan, and the smaller model that is proved equal to a mask.

        Where that fails for some groups, they stay whole and another plan is made of the rest.
        """
        left, whole = dict(saliency), dict[str, str]()
        while True:
            try:
                plan = self.plan(graph, left, whole)
                with self.work.timed("cut"):
                    return plan, self.cut(graph, plan)
            except VerificationError as failure:
                found = [name for name in failure.groups if left.pop(name, None) is not None]
                if not found or not left:
                    raise
                logger.warning("%s stays whole, and the plan is made anew: %s", found, failure)
                whole |= dict.fromkeys(found, str(failure))
                self.work.forget("plan")

    def plan(
        self, graph: Graph, saliency: "Saliency", whole: Mapping[str, str] | None = None
    ) -> PruningPlan:
        """Which structures are kept, and what makes up for the others."""
        criterion = self.recipe.criterion
        measured, damping, losses = None, 0.0, {}
        if criterion.compensates() and not self.work.read("plan"):
            measured = compensation.curvature(self, graph)
            damping, losses = self._damping(graph, measured, whole or ())

        def make() -> dict[str, Any]:
            means = compensation.bias_means(self, graph)
            plan = self._plan(graph, saliency, measured, damping, means)
            if measured:
                plan = compensation.refine(self, graph, plan, measured)
            provenance = {
                **plan.provenance,
                "criterion": criterion.told(),
                "calibration": self.calibration,
                **({"not_verified": dict(whole)} if whole else {}),
            }
            if losses:
                provenance["compensation"] |= {"held_out_losses": losses}
            base = {
                "base_model": self.loaded.base_model,
                "base_revision": self.loaded.base_revision,
            }
            return {"plan": dataclasses.replace(plan, provenance=provenance, **base).to_json()}

        return PruningPlan.from_json(self.stage("plan", make)["plan"])

    def _plan(
        self,
        graph: Graph,
        saliency: "Saliency",
        measured: compensation.Curvature | None,
        damping: float,
        means: compensation.Means | None,
    ) -> PruningPlan:
        """The main process's, since latency is measured."""
        budget = self.recipe.budget
        measure = self._seconds_of(graph) if budget.latency_s else None
        plan = self._allocate(graph, saliency, budget.targets(), measure)
        plan = compensation.made_up_for(self, graph, plan, measured, damping, means)
        return PruningPlan.from_json(from_main(plan.to_json()))

    def _damping(
        self, graph: Graph, measured: compensation.Curvature, whole: Collection[str] = ()
    ) -> tuple[float, dict[str, float]]:
        """As the recipe says, or the best of some, with the losses of all."""
        criterion = self.recipe.criterion
        if self.scores is not None and self.scores.damping:
            return self.scores.damping, {}
        if criterion.damping != "auto":
            return criterion.damping, {}
        fixed = None if criterion.by_damping() else self.score(graph)
        means = compensation.bias_means(self, graph)

        def decide(damping: float) -> PruningPlan:
            saliency = fixed or self._scores(graph, measured, damping)
            left = {name: scores for name, scores in saliency.items() if name not in whole}
            return self._plan(graph, left, measured, damping, means)

        losses = self.stage("damping", lambda: compensation.choose_damping(self, graph, decide))
        return float(min(losses, key=lambda name: losses[name])), losses

    def _allocate(
        self,
        graph: Graph,
        saliency: "Saliency",
        targets: dict[str, float],
        measure: Callable[[PruningPlan], float] | None = None,
    ) -> PruningPlan:
        budget = self.recipe.budget
        return allocate(
            graph,
            saliency,
            measure=measure,
            **targets,
            keep_at_least=budget.keep_at_least,
            round_to=budget.round_to,
            uniform=budget.uniform,
            kinds=self.recipe.structure.kinds,
        )

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

    def follow_up(self, pruned: nn.Module) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """What follows a cut: metrics, norms re-estimated, fine-tuning; the loss curve of that.

        Metrics of ``cut``, ``recalibrated`` where there was a norm to re-estimate, and ``final``
        where there was fine-tuning.
        """
        metrics = {"cut": self.measure("cut_metrics", pruned)}
        with self.work.timed("recalibration"):
            recalibrated = self._recalibrate(pruned)
        if recalibrated:
            metrics["recalibrated"] = self.measure("recalibrated_metrics", pruned)
        history = self._recover(pruned)
        if history:
            metrics["final"] = self.measure("final_metrics", pruned)
        return metrics, history

    def _recalibrate(self, pruned: nn.Module) -> bool:
        """Re-estimates BatchNorm statistics; whether there was anything to do."""
        if not self.recipe.finetune.recalibrate_norm or self._data is None:
            return False
        return recalibrate_norm(pruned, self.calibration_batches()) > 0

    def _recover(self, pruned: nn.Module) -> list[dict[str, float]]:
        """Fine-tunes; the loss curve, empty where the recipe asks for none."""
        config = self.recipe.finetune
        if config.epochs == 0 or self._data is None:
            return []
        teacher = self.model if config.distill else None
        return self._trained("final", pruned, config, "fine-tune", teacher)

    def _trained(
        self,
        stage: str,
        model: nn.Module,
        config: TrainSection,
        description: str,
        teacher: nn.Module | None = None,
    ) -> list[dict[str, float]]:
        tensors = self.work.tensors(stage)

        def make() -> dict[str, Any]:
            history = finetune(
                model,
                self._augmented() if config.augment else self.train,
                config,
                teacher=teacher,
                checkpoint_dir=self.work.training_state(stage),
                accelerator=self.accelerator,
                seed=self.recipe.seed,
                num_workers=self._num_workers,
                description=description,
            )
            self.save(lambda: save_model(model, str(tensors)))
            return {"history": history}

        record = self.stage(stage, make)
        load_model(model, tensors)  # read on the CPU, copied to where the model is
        return record["history"]

    def _seconds_of(self, graph: Graph) -> Callable[[PruningPlan], float]:
        inputs = to_device(example_inputs(self.loaded, self.recipe.evaluate.latency_batch_size))

        def seconds(plan: PruningPlan) -> float:
            return measure_latency([self.cut(graph, plan, "fast")], inputs, budget_s=0.3)[0]

        return seconds

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
