"""What each step of a run left in the folder beside the output, and whether it still fits.

A step is declared beside the function that does it, with what its result depends on::

    @step("saliency", dense, "structure", "criterion.scores")
    def saliency(context: Context) -> dict[str, Any]: ...

Called, it gives what the function returned, plain data, from the cache where that still fits. What
is larger the function writes to ``saliency.tensors(context)``.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from accelerate.utils import set_seed

from sosp_hub.atomic import write_text
from sosp_hub.distributed import is_main, wait_for_everyone
from sosp_hub.errors import OutputExistsError
from sosp_hub.pipeline.memory import PeakMemory
from sosp_hub.progress import progress_bar
from sosp_hub.recipe.criteria import MaskTrainedCriterion
from sosp_hub.recipe.schema import Recipe

_OF_MASKS = ("sparsity", "k", "tau", "control")


class HasCache(Protocol):
    """What a step asks of its context."""

    @property
    def recipe(self) -> Recipe:
        """What to do."""
        ...

    @property
    def cache(self) -> "StageCache":
        """Where the results are."""
        ...


C = TypeVar("C", bound=HasCache)
P = ParamSpec("P")
STEPS: "dict[str, Step[Any, ...]]" = {}
"""All that are declared, by name."""


class Step(Generic[C, P]):
    """A function whose result is kept.

    Args:
        name: Of its files.
        needs: The parts of a recipe that its result depends on (`recipe_parts`).
        make: The function.
        with_peak: Note the memory that it took.
        says: What a person is told that is done; empty where the function shows what it does.
    """

    def __init__(
        self,
        name: str,
        needs: tuple[str, ...],
        make: Callable[Concatenate[C, P], dict[str, Any]],
        *,
        with_peak: bool,
        says: str,
    ) -> None:
        self.name, self.needs, self._make, self._with_peak = name, needs, make, with_peak
        self._says = says

    def __call__(self, context: C, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """What the function made, now unless it is there."""
        record = context.cache.read(self)
        if record is None:
            context.cache.begin(self)
            set_seed(context.recipe.seed)
            peak = PeakMemory() if self._with_peak else None
            start = time.perf_counter()
            with progress_bar(self._says) if self._says else nullcontext():
                made = self._make(context, *args, **kwargs)
            seconds = time.perf_counter() - start
            peak_bytes = peak.grown_bytes() if peak else None
            record = context.cache.write(self, made, seconds, peak_bytes)
        return record["made"]

    def made(self, context: HasCache) -> dict[str, Any] | None:
        """What is there; None where it has to be done."""
        record = context.cache.read(self)
        return None if record is None else record["made"]

    def tensors(self, context: HasCache) -> Path:
        """Where its tensors are."""
        return context.cache.tensors(self)


def step(
    name: str, *needs: "str | Step[Any, ...]", with_peak: bool = False, says: str = ""
) -> Callable[[Callable[Concatenate[C, P], dict[str, Any]]], Step[C, P]]:
    """Declares a step; a decorator of its function, which takes the context first.

    Args:
        name: Of its files.
        needs: Parts of a recipe (`recipe_parts`), and steps whose needs it has as well.
        with_peak: Note the memory that it takes.
        says: What a person is told that is done; empty where the function shows what it does.

    Raises:
        ValueError: A name that is taken.
    """
    if name in STEPS:
        raise ValueError(f"two steps are called {name!r}")
    parts = [part for need in needs for part in (need.needs if isinstance(need, Step) else (need,))]

    def declare(make: Callable[Concatenate[C, P], dict[str, Any]]) -> Step[C, P]:
        declared = Step(name, tuple(dict.fromkeys(parts)), make, with_peak=with_peak, says=says)
        STEPS[name] = declared
        return declared

    return declare


def recipe_parts(recipe: Recipe) -> dict[str, Any]:
    """What results can depend on: the sections of a recipe, and parts of ``criterion``.

    ``criterion.scores`` is what the scores depend on, ``criterion.curvature`` what the matrix does,
    ``criterion.training`` what a training without masks does.
    """
    parts = recipe.model_dump(mode="json")
    if recipe.budget.max_drop:  # its choice depends on what follows each cut that it tries
        parts["budget"]["after_cut"] = [parts["rebuild"], recipe.recalibrates()]
        parts["data"]["num_held_out"] = recipe.held_out_key()
    criterion = recipe.criterion
    data = criterion.model_dump(mode="json", include={"num_samples", "batch_size"})
    scores = {"name": criterion.name, **criterion.options()}
    scores |= criterion.model_dump(mode="json", include={"train", "per"})
    if isinstance(criterion, MaskTrainedCriterion):
        scores["budget"] = recipe.budget.targets()
    auto = criterion.damping == "auto"
    if auto:
        best_for = [parts["budget"], recipe.recalibrates()]
        parts["criterion"]["damping"] = f"auto, for {json.dumps(best_for)}"
    if criterion.by_damping():
        scores["damping"] = parts["criterion"]["damping"]
    held_out = {"damping": "auto"} if auto else {}
    parts["criterion.curvature"] = data | criterion.curvature() | held_out
    parts["criterion.scores"] = data | scores
    parts["criterion.training"] = {
        "train": {k: v for k, v in (scores.get("train") or {}).items() if k not in _OF_MASKS}
    }
    return parts


class StageCache:
    """Results of steps. A step is done when its record is there; the record is written last.

    What fits is decided once, when the folder is opened, the same way by every process.

    Args:
        folder: Where it is.
        recipe: What its results have to fit.
        shared: Results of many recipes are in the folder, each under a name of what it depends on,
            so that recipes that agree in that share it.

    Attributes:
        folder: Made when the first result is written, so that a refused run leaves nothing.
        changes: Keys of the recipe whose value differs from the one the folder was made with.
        kept: Steps whose results are used again.
        stale: Steps that have to be done again because of ``changes``.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, shared: bool = False) -> None:
        self.folder = folder
        self._parts = recipe_parts(recipe)
        self._shared = shared
        self._records: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self.changes: dict[str, tuple[Any, Any]] = {}
        self.stale: list[str] = []
        for name, step in STEPS.items():
            record = _read(self._path(step, "json")) or _read(self._state(step) / "made_with.json")
            if record is None:
                continue
            changes = self._changes(step, record["made_with"])
            if changes:
                self.changes |= changes
                self.stale.append(name)
            elif "made" in record:
                self._records[name] = record
        self.kept = list(self._records)
        wait_for_everyone()

    def read(self, step: "Step[Any, ...]") -> dict[str, Any] | None:
        """The record of a step; None where it has to be done."""
        return self._records.get(step.name)

    def begin(self, step: "Step[Any, ...]") -> None:
        """Before a step is done again, its record of another recipe goes: the tensors change."""
        if is_main() and step.name in self.stale:
            self._path(step, "json").unlink(missing_ok=True)

    def write(
        self,
        step: "Step[Any, ...]",
        made: Mapping[str, Any],
        seconds: float,
        peak_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Marks a step as done, after its tensors were written; its training state is dropped."""
        took = {"seconds": seconds, "peak_bytes": peak_bytes}
        record = {"made_with": self._made_with(step), **took, "made": dict(made)}
        self._records[step.name] = record
        if is_main():
            make_folder(self.folder)
            write_text(self._path(step, "json"), json.dumps(record))
            shutil.rmtree(self._state(step), ignore_errors=True)
        wait_for_everyone()
        return record

    def save(self, write: Callable[[], None]) -> None:
        """The main process writes to the folder, and all wait for it."""
        if is_main():
            make_folder(self.folder)
            write()
        wait_for_everyone()

    def tensors(self, step: "Step[Any, ...]") -> Path:
        """Where the tensors of a step are."""
        return self._path(step, "safetensors")

    def forget(self, step: "Step[Any, ...]") -> None:
        """Deletes what a step left, where only numbers that were made from it are wanted."""
        self._records.pop(step.name, None)
        if is_main():
            self._path(step, "json").unlink(missing_ok=True)
            self._path(step, "safetensors").unlink(missing_ok=True)
        wait_for_everyone()

    def training_state(self, step: "Step[Any, ...]") -> Path:
        """Folder for the resumable state of a training, emptied if of another recipe."""
        state = self._state(step)
        marker = state / "made_with.json"
        if is_main():
            made_with = json.dumps({"made_with": self._made_with(step)})
            if _read(marker) != json.loads(made_with):
                marker.unlink(missing_ok=True)  # first: half of a state belongs to no recipe
                shutil.rmtree(state, ignore_errors=True)
            make_folder(state)
            write_text(marker, made_with)
        wait_for_everyone()
        return state

    def remove(self) -> None:
        """Deletes the folder, once the output is in its place; first what says that it is whole."""
        for record in (*self.folder.glob("*.json"), *self.folder.glob("*.state/made_with.json")):
            record.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def timed(self, name: str, says: str) -> Iterator[None]:
        """Notes how long something takes that leaves no result of its own, and shows it."""
        start = time.perf_counter()
        with progress_bar(says):
            yield
        self._seconds[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """How long each step took, whenever it ran, and what was done besides in this run."""
        steps = {name: record["seconds"] for name, record in self._records.items()}
        return {**self._seconds, **steps}

    def _state(self, step: "Step[Any, ...]") -> Path:
        return self._path(step, "state")

    def _path(self, step: "Step[Any, ...]", kind: str) -> Path:
        name = step.name
        if self._shared:
            made_with = json.dumps(self._made_with(step), sort_keys=True)
            name = f"{name}-{hashlib.sha256(made_with.encode()).hexdigest()[:16]}"
        return self.folder / f"{name}.{kind}"

    def _made_with(self, step: "Step[Any, ...]") -> dict[str, Any]:
        return {part.partition(".")[0]: self._parts[part] for part in step.needs}

    def _changes(
        self, step: "Step[Any, ...]", made_with: Mapping[str, Any]
    ) -> dict[str, tuple[Any, Any]]:
        then, now = _flat(made_with), _flat(self._made_with(step))
        keys = sorted(then.keys() | now.keys())
        return {k: (then.get(k), now.get(k)) for k in keys if then.get(k) != now.get(k)}


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        OutputExistsError: A file is in the way, or the place cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputExistsError(
            f"output.dir: the folder {folder} cannot be made ({error.strerror}); "
            "write another output.dir=FOLDER"
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and "made_with" in record else None


def _flat(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        inner = _flat(value, f"{above}{key}.") if isinstance(value, dict) else {}
        flat |= inner or {f"{above}{key}": value}
    return flat
