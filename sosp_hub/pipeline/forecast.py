"""What a run will need, told by the model's config alone: no weights and no data are opened."""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.allocation import MEASURED
from sosp_hub.compat.torch import operation, result_aliases
from sosp_hub.cost import CostModel
from sosp_hub.data.source import DataInfo
from sosp_hub.distributed import num_shards, process_state
from sosp_hub.errors import BudgetError
from sosp_hub.pipeline.eligible import eligible_groups
from sosp_hub.pipeline.output_folder import check_usable
from sosp_hub.pipeline.planning import allocated
from sosp_hub.recipe.criteria import SecondOrderCriterion
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.tasks import find_task
from sosp_hub.report import numbers
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import trace
from sosp_hub.summary import table
from sosp_hub.zoo.load import Loaded, example_inputs, load_model

_SECOND_ORDER_PEAK = 1.5
"""Peak over that of a plain training pass, at most: 0.7 to 1.4 in tests/bench/results/saliency.md
and its later lines."""

_ASSUMED_SAMPLES = 1000
"""Where the recipe gives no number and the data is not opened."""

_BASIS = (
    "seconds: multiply-accumulates by the rate of this device in a product of two matrices of "
    "1024 x 1024 in the weights' dtype, which was just measured; real passes took 1.1 to 1.5 times "
    "as long, 2.8 times in a MobileNet (docs/how-to/large-models.md), and files and data come on "
    "top",
    "memory: weights, and for a backward pass the results of all operations of the trace, which "
    "was 0.7 to 1.4 times what one held; the libraries take 0.5 to 1 GB of RAM beside it",
)


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: As in the report's seconds.
        num_samples: Samples that go through the model.
        seconds: At the measured rate, on one process; None where the recipe does not tell enough.
        memory_bytes: At the height of the stage, where it runs.
        place: ``device`` or ``cpu``.
        fits: Whether that is free there now; None where that is not known.
        change: Keys of the recipe that make it smaller, where it does not fit.
    """

    name: str
    num_samples: int
    seconds: float | None
    memory_bytes: int
    place: str
    fits: bool | None = None
    change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What a run will need; ``print`` shows it on a screen.

    Attributes:
        model: As the recipe names it.
        architecture: Class of the model.
        dtype: Of the weights.
        sample: One input that costs are of, in words.
        macs: Multiply-accumulates of one such input.
        params: Parameters.
        bytes: Of the weights.
        groups: Of each kind that may go: groups and structures.
        pinned: Dimensions of parameters that keep their size.
        least: What can be reached with the floors of the recipe, as a share of the dense model.
        budget: What is asked.
        faults: What the run will refuse, such as a budget that cannot be reached.
        device: What stages run on.
        macs_per_s: Its measured rate; None where no time was taken for it.
        free_bytes: Free memory by place; None where it is not known.
        stages: In the order of a run.
        basis: How times and memory were estimated.
    """

    model: str
    architecture: str
    dtype: str
    sample: str
    macs: int
    params: int
    bytes: int
    groups: dict[str, dict[str, int]]
    pinned: int
    least: dict[str, float]
    budget: dict[str, float]
    faults: tuple[str, ...]
    device: str
    macs_per_s: float | None
    free_bytes: dict[str, int | None]
    stages: tuple[Stage, ...]
    basis: tuple[str, ...] = _BASIS

    @property
    def fits(self) -> bool:
        """Whether nothing is refused and no stage is known not to fit."""
        return not self.faults and all(stage.fits is not False for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**dataclasses.asdict(self), "fits": self.fits}

    def __str__(self) -> str:
        """Tables of structures and stages, then what does not fit and what would."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.model}: {self.architecture}, {self.dtype}, "
            f"{numbers.count(self.params)} parameters, {numbers.size(self.bytes)}, "
            f"{numbers.count(self.macs)} multiply-accumulates for {self.sample}"
        )
        rows = [[kind, each["groups"], each["structures"]] for kind, each in self.groups.items()]
        yield "\n" + table(("may go", "groups", "structures"), rows)
        yield f"{self.pinned} dimensions of parameters keep their size"
        if self.least:
            reach = ", ".join(f"{key} {share:.3f}" for key, share in self.least.items())
            yield f"least that can be reached: {reach} of the dense model"
        asked = ", ".join(f"{key} {share}" for key, share in self.budget.items())
        yield f"asked: {asked or 'no share'}"
        free = ", ".join(
            f"{'?' if free is None else numbers.size(free)} free on the {place}"
            for place, free in self.free_bytes.items()
        )
        yield f"\n{self.device}: {free}"
        says = {True: "yes", False: "NO", None: "?"}
        cells = [
            [
                stage.name,
                stage.num_samples,
                "?" if stage.seconds is None else numbers.seconds(stage.seconds),
                numbers.size(stage.memory_bytes),
                stage.place,
                says[stage.fits],
            ]
            for stage in self.stages
        ]
        yield table(("stage", "samples", "at least", "memory", "on", "fits"), cells)
        yield from (f"- {line}" for line in self.basis)
        for stage in self.stages:
            if stage.fits is False:
                yield f"{stage.name} does not fit: " + "; or ".join(stage.change)
        yield from (f"WILL BE REFUSED: {fault}" for fault in self.faults)


def forecast(recipe: Recipe) -> Forecast:
    """What a run of a recipe will need: structures, least budgets, time and memory of each stage.

    The model is built without weights from its config, and neither its weights nor the data are
    opened; a head that only the data decides keeps the size that config or recipe give.

    Args:
        recipe: As for a run.

    Raises:
        SospHubError: What a run of the recipe would raise too before it opens weights or data.
    """
    if recipe.output.dir is not None:
        check_usable(Path(recipe.output.dir))
    data = DataInfo(image_size=recipe.data.image_size)
    loaded = load_model(recipe.model, data=data, weights=False)
    inputs = example_inputs(loaded, num_tokens=recipe.data.max_length)
    outputs = recipe.structure.outputs or find_task(recipe.model.task).outputs
    graph = trace(loaded.model, inputs, outputs=outputs)
    groups = eligible_groups(graph, recipe)
    cost = CostModel(graph)()
    kinds: dict[str, dict[str, int]] = {}
    for group in groups.values():
        kind = kinds.setdefault(group.kind, {"groups": 0, "structures": 0})
        kind["groups"] += 1
        kind["structures"] += group.size
    least, kept, faults = _budgets(recipe, graph)
    device = process_state().device or torch.device("cpu")
    rate = _matmul_rate(device, getattr(torch, recipe.model.dtype))
    free = {"cpu": _free_ram()}
    if device.type != "cpu":
        free["device"] = _free_on(device)
    stages = _stages(recipe, loaded, graph, kept, device.type)
    stages = tuple(_judged(each, recipe, rate, free) for each in stages)
    return Forecast(
        model=recipe.model.id,
        architecture=type(loaded.model).__name__,
        dtype=recipe.model.dtype,
        sample=graph.sized.sample,
        macs=cost.macs,
        params=cost.params,
        bytes=cost.bytes,
        groups=kinds,
        pinned=len(graph.pinned),
        least=least,
        budget=recipe.budget.targets(),
        faults=faults,
        device=_name_of(device),
        macs_per_s=rate,
        free_bytes=free,
        stages=stages,
    )


def too_large(
    recipe: Recipe, loaded: Loaded, graph: Graph, *, num_train: int, num_test: int
) -> list[Stage]:
    """The stages of a run that its machine has too little memory for, as far as can be told.

    Args:
        recipe: Of the run.
        loaded: Its model, where it runs.
        graph: Of that model.
        num_train: Samples that there are to calibrate and to train with.
        num_test: Samples that are measured.
    """
    device = next((tensor.device for tensor in loaded.model.parameters()), torch.device("cpu"))
    free = {"cpu": _free_ram()}
    if device.type != "cpu":
        free["device"] = _free_on(device)
    place, weights = "cpu" if device.type == "cpu" else "device", CostModel(graph)().bytes
    if (room := free[place]) is not None:
        free[place] = room + weights  # which are there already, and count in every stage
    counts = {"num_train": num_train, "num_test": num_test}
    stages = _stages(recipe, loaded, graph, 1.0, device.type, **counts)
    judged = (_judged(each, recipe, None, free) for each in stages)
    return [stage for stage in judged if stage.fits is False]


def _budgets(recipe: Recipe, graph: Graph) -> tuple[dict[str, float], float, tuple[str, ...]]:
    """The least shares, the share of multiply-accumulates that is kept, and what is refused."""
    groups = eligible_groups(graph, recipe)
    equal = {name: torch.ones(group.size) for name, group in groups.items()}
    dense = CostModel(graph)()
    try:
        # More than any score: all goes that floors, ties and rounding let go.
        least = allocated(recipe, graph, equal, {"threshold": 2.0})
    except BudgetError as error:
        return {}, 1.0, (str(error),)
    told = least.provenance["predicted"]
    sizes = sum(group.size for group in groups.values())
    kept = sum(len(least.kept[name]) for name in groups if name in least.kept)
    kept += sum(group.size for name, group in groups.items() if name not in least.kept)
    shares = {
        "macs": told["macs"] / max(dense.macs, 1),
        "params": told["params"] / max(dense.params, 1),
        "memory_bytes": told["bytes"] / max(dense.bytes, 1),
        "structures": kept / max(sizes, 1),
    }
    targets = recipe.budget.targets()
    asked = {key: share for key, share in targets.items() if key not in MEASURED}
    asked = {key: share for key, share in asked.items() if key != "threshold"}
    if not asked:
        return shares, 1.0, ()
    try:
        plan = allocated(recipe, graph, equal, asked)
    except BudgetError as error:
        return shares, shares["macs"], (str(error),)
    return shares, plan.provenance["predicted"]["macs"] / max(dense.macs, 1), ()


def _stages(
    recipe: Recipe,
    loaded: Loaded,
    graph: Graph,
    kept: float,
    device: str,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
) -> Iterator[tuple[Stage, float]]:
    """Stages without times, and the multiply-accumulates of each.

    Numbers of samples are those of the recipe, and assumed where it gives none and nor do these.
    """
    place, cost = "cpu" if device == "cpu" else "device", CostModel(graph)()
    activations, largest = _activation_bytes(graph)
    weights, params = cost.bytes, cost.params
    criterion, section = recipe.criterion, recipe.evaluate
    num_train = num_train or recipe.data.num_train or _ASSUMED_SAMPLES
    measured = num_test or recipe.data.num_test or _ASSUMED_SAMPLES

    def pass_over(batch: int, num: int = measured) -> int:
        return weights + 3 * largest * min(batch, num)

    def training(config: Any, of: int) -> int:
        size = max(weights // max(params, 1), 1)
        state = {"adamw": 2 * 4, "adamw_8bit": 2, "sgd": 4}[config.optimizer]
        if size < 4 and config.optimizer != "adamw_8bit":
            state += 4  # the weights in float32
        spread = (2 * of + state * (of // size)) // num_shards()
        return max(of, spread) + activations * min(config.batch_size, num_train)  # whole at first

    yield Stage("load", 0, None, weights, "cpu"), 0.0
    config = recipe.model.train
    new_head = find_task(recipe.model.task).head or not recipe.model.pretrained  # there may be one
    if config is not None and (config.when == "always" or new_head):
        num = min(num_train, config.num_samples or num_train) * config.epochs
        need = training(config, weights)
        yield Stage("dense", num, None, need, place), 3.0 * num * cost.macs
    yield (
        Stage("dense_metrics", measured, None, pass_over(section.batch_size), place),
        float(measured * cost.macs),
    )
    passes = criterion.training_passes(loaded.num_labels)
    num = criterion.num_samples if passes else 0
    size = min(criterion.batch_size, num_train)
    batch = min(size, getattr(criterion, "micro_batch_size", None) or size)
    ratio = _SECOND_ORDER_PEAK if isinstance(criterion, SecondOrderCriterion) else 1.0
    need = weights + round(ratio * activations * batch) if passes > 1 / 3 else pass_over(batch, num)
    yield (
        Stage("saliency", num, None, need if num else weights, place),
        3.0 * passes * num * cost.macs,
    )
    need = round((1.0 + kept) * weights)  # verified or not
    yield Stage("cut", graph.num_samples, None, need, "cpu"), 4.0 * cost.macs
    if recipe.rebuilds():
        grams, held, work = _rebuild_cost(graph, recipe)
        num = recipe.rebuild.num_samples
        need = 2 * weights + grams + held * min(num, num_train) + 3 * largest * size
        macs = num * (3.0 * cost.macs + work)
        if steps := recipe.rebuild.refine_steps:
            need += 3 * held * min(num, num_train)  # what a block is given, gives, and gave uncut
            macs += 3.0 * (num + steps * size) * cost.macs
        yield Stage("rebuilt", num, None, need, place), macs
    config = recipe.finetune
    left = round(kept * weights)
    if config.epochs:
        num = min(num_train, config.num_samples or num_train) * config.epochs
        need, held = training(config, left), activations * min(config.batch_size, num_train)
        if config.lora:
            need = left + held
        if config.gradient_checkpointing:
            need -= round(0.7 * held)
        if config.follows():
            need += weights
        yield Stage("final", num, None, need, place), 3.0 * num * kept * cost.macs
    yield (
        Stage("final_metrics", measured, None, pass_over(section.batch_size), place),
        measured * kept * cost.macs,
    )


def _judged(
    stage: tuple[Stage, float], recipe: Recipe, rate: float | None, free: Mapping[str, int | None]
) -> Stage:
    """A stage with its time, whether it fits, and what to change where it does not."""
    of, macs = stage
    seconds = None if rate is None or of.name == "load" else macs / rate
    room = free[of.place]
    fits = None if room is None else of.memory_bytes <= room
    change = tuple(_changes(of, recipe)) if fits is False else ()
    return dataclasses.replace(of, seconds=seconds, fits=fits, change=change)


def _changes(stage: Stage, recipe: Recipe) -> Iterator[str]:
    """Keys of the recipe that make a stage smaller, those that are not as small already."""
    batches = {
        "dense": ("model.train.batch_size", recipe.model.train and recipe.model.train.batch_size),
        "dense_metrics": ("evaluate.batch_size", recipe.evaluate.batch_size),
        "saliency": ("criterion.batch_size", recipe.criterion.batch_size),
        "rebuilt": ("rebuild.num_samples", recipe.rebuild.num_samples),
        "final": ("finetune.batch_size", recipe.finetune.batch_size),
        "final_metrics": ("evaluate.batch_size", recipe.evaluate.batch_size),
    }
    key, number = batches.get(stage.name, ("", 0))
    if number and number > 1:
        yield f"{key}={max(1, number // 8)}"
    if recipe.model.dtype == "float32":
        yield "model.dtype=bfloat16"
    texts = find_task(recipe.model.task).inputs == "texts"
    of_weights = stage.name in ("load", "cut")  # whatever the inputs are
    if texts and not of_weights and recipe.data.max_length > 128:
        yield f"data.max_length={recipe.data.max_length // 4}"
    if stage.name == "saliency" and isinstance(recipe.criterion, SecondOrderCriterion):
        yield "criterion.name=flap or another criterion that needs no gradients"
    if of_weights:
        yield "a plan of another machine and `sosp cut`, which never loads the model"
    if stage.name == "final":
        if not recipe.finetune.lora:
            yield "finetune.lora.rank=8"
        if not recipe.finetune.gradient_checkpointing:
            yield "finetune.gradient_checkpointing=true"
        yield "finetune.epochs=0"
    yield "a machine with more memory"


def _activation_bytes(graph: Graph) -> tuple[int, int]:
    """Bytes of all results of a pass of one sample, and of the largest of them; views are none.

    Of a sample of the size that costs are told for, taken to be larger by what it costs more.
    """
    total = largest = 0
    item = max((graph.item_bytes[name] for name in graph.parameters), default=4)
    for step in graph.steps:
        if any(alias is not None for alias in result_aliases(operation(step.name))):
            continue
        for axes in step.outputs:
            held = prod(size_of(axis) for axis in axes) * item
            total += held
            largest = max(largest, held)
    traced, sized = (
        sum(prod(size_of(axis) for axis in axes) for _, axes in of.macs) / of.num_samples
        for of in (graph, graph.sized)
    )
    longer = sized / traced if traced else 1.0
    total, largest = (round(each * longer / graph.num_samples) for each in (total, largest))
    return total, largest


def _rebuild_cost(graph: Graph, recipe: Recipe) -> tuple[int, int, float]:
    """What a rebuild holds and computes.

    Returns:
        Bytes of the largest Gram matrix (two of them, in float64), bytes of the largest result of
        a layer that reads a cut axis for one sample, and MACs of all Gram matrices for a sample.
    """
    widths: dict[str, int] = {}
    for name in eligible_groups(graph, recipe):
        for member in graph.readers(name):
            shape = [size_of(axis) for axis in graph.tensors[member.tensor]]
            widths[member.tensor] = prod(shape) // shape[0]
    rows: dict[str, float] = {}
    for module, axes in graph.sized.macs:
        rows[module] = rows.get(module, 0.0) + prod(size_of(axis) for axis in axes)
    work = held = 0.0
    for tensor, width in widths.items():
        params = prod(size_of(axis) for axis in graph.tensors[tensor])
        places = rows.get(tensor.rpartition(".")[0], 0.0) / params
        work += places * width**2
        held = max(held, places * params / width * graph.item_bytes.get(tensor, 4))
    largest, num = max(widths.values(), default=0), graph.sized.num_samples
    return 2 * 8 * largest**2, round(held / num), work / num


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Multiply-accumulates a second in a product of two 1024 x 1024 matrices, the best of some.

    On a CPU by the time of its threads, so that other work on it does not count. About a fifth of a
    second is taken for it, and two products at least.
    """
    size, best, began = 1024, float("inf"), time.perf_counter()
    on_cpu = device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    clock = time.process_time if on_cpu else time.perf_counter
    try:
        one = torch.ones(size, size, device=device, dtype=dtype)
        torch.mm(one, one)  # what is made once is not counted
        for _ in range(50):
            start = clock()
            torch.mm(one, one)
            if not on_cpu:
                torch.accelerator.synchronize()
            best = min(best, (clock() - start) / threads)
            if time.perf_counter() - began > 0.2:
                break
    except RuntimeError:  # no such kernel, or no room
        return None
    return size**3 / best


def _free_ram() -> int | None:
    """Bytes of RAM that this process may still take: of the machine and of its control group."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (free,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except (OSError, ValueError):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    try:
        group = Path("/sys/fs/cgroup")
        most, now = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        free = min(free, int(most) - int(now))
    except (OSError, ValueError):  # no limit
        pass
    return max(0, free)


def _free_on(device: torch.device) -> int | None:
    """Free bytes of an accelerator."""
    module: nn.Module | Any = getattr(torch, device.type, None)
    told = getattr(module, "mem_get_info", None)
    return None if told is None else int(told(device)[0])


def _name_of(device: torch.device) -> str:
    from sosp_hub.pipeline.measuring import hardware

    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{hardware()}{threads}"
