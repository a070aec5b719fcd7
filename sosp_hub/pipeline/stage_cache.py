"""The work folder beside the output: what each stage left, and whether it still fits the recipe."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sosp_hub.atomic import write_text
from sosp_hub.distributed import is_main, wait_for_everyone
from sosp_hub.errors import OutputExistsError
from sosp_hub.recipe.schema import Recipe

_MODEL = ("model", "data", "seed")
_CUT = (*_MODEL, "structure", "criterion", "budget")
STAGES: Mapping[str, tuple[str, ...]] = {
    "dense": _MODEL,
    "dense_metrics": (*_MODEL, "evaluate"),
    "masked": (*_MODEL, "structure", "criterion.scores"),
    "curvature": (*_MODEL, "structure", "criterion.curvature"),
    "damping": _CUT,
    "saliency": (*_MODEL, "structure", "criterion.scores"),
    "plan": _CUT,
    "cut_metrics": (*_CUT, "evaluate"),
    "recalibrated_metrics": (*_CUT, "finetune", "evaluate"),
    "final": (*_CUT, "finetune"),
    "final_metrics": (*_CUT, "finetune", "evaluate"),
    "cell": (*_CUT, "finetune", "evaluate"),
}
"""Each stage, with the sections of the recipe, or what of them, that its result depends on.

``cell`` is a row of a comparison, made of all the others.
"""


class WorkFolder:
    """Results of stages. A stage is done when its record is there; the record is written last.

    What fits is decided once, when the folder is opened, the same way by every process.

    Args:
        folder: Where it is.
        recipe: What its results have to fit.
        shared: Results of many recipes are in the folder, each under a name of what it depends on,
            so that recipes that agree in that share it.

    Attributes:
        folder: Made when the first result is written, so that a refused run leaves nothing.
        changes: Keys of the recipe whose value differs from the one the folder was made with.
        kept: Stages whose results are used again.
        stale: Stages that have to be done again because of ``changes``.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, shared: bool = False) -> None:
        self.folder = folder
        self._recipe = recipe.model_dump(mode="json")
        self._shared = shared
        data = recipe.criterion.model_dump(mode="json", include={"num_samples", "batch_size"})
        scores = {"name": recipe.criterion.name, **recipe.criterion.options()}
        scores |= recipe.criterion.model_dump(mode="json", include={"train", "per"})
        auto = recipe.criterion.damping == "auto"
        if auto:
            best_for = [self._recipe["budget"], recipe.recalibrates()]
            self._recipe["criterion"]["damping"] = f"auto, for {json.dumps(best_for)}"
        if recipe.criterion.by_damping():
            scores["damping"] = self._recipe["criterion"]["damping"]
        parts = {"damping": "auto"} if auto else {}  # some samples are held out
        self._recipe["criterion.curvature"] = data | recipe.criterion.curvature() | parts
        self._recipe["criterion.scores"] = data | scores
        self._records: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self.changes: dict[str, tuple[Any, Any]] = {}
        self.stale: list[str] = []
        for stage in STAGES:
            record = _read(self._path(stage, "json")) or _read(
                self._state(stage) / "made_with.json"
            )
            if record is None:
                continue
            changes = self._changes(stage, record["made_with"])
            if changes:
                self.changes |= changes
                self.stale.append(stage)
            elif "made" in record:
                self._records[stage] = record
        self.kept = list(self._records)
        wait_for_everyone()

    def read(self, stage: str) -> dict[str, Any] | None:
        """What the stage left; None where it has to be done."""
        return self._records.get(stage)

    def write(
        self,
        stage: str,
        made: Mapping[str, Any],
        seconds: float,
        peak_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Marks a stage as done, after its tensors were written; its training state is dropped."""
        took = {"seconds": seconds, "peak_bytes": peak_bytes}
        record = {"made_with": self._made_with(stage), **took, "made": dict(made)}
        self._records[stage] = record
        if is_main():
            make_folder(self.folder)
            write_text(self._path(stage, "json"), json.dumps(record))
            shutil.rmtree(self._state(stage), ignore_errors=True)
        wait_for_everyone()
        return record

    def tensors(self, stage: str) -> Path:
        """Where the tensors of a stage are."""
        return self._path(stage, "safetensors")

    def forget(self, stage: str) -> None:
        """Deletes what a stage left, where only numbers that were made from it are wanted."""
        self._records.pop(stage, None)
        if is_main():
            self._path(stage, "json").unlink(missing_ok=True)
            self._path(stage, "safetensors").unlink(missing_ok=True)
        wait_for_everyone()

    def training_state(self, stage: str) -> Path:
        """Folder for the resumable state of a training, emptied if of another recipe."""
        state = self._state(stage)
        if is_main():
            if stage in self.stale:
                shutil.rmtree(state, ignore_errors=True)
            make_folder(state)
            marker = {"made_with": self._made_with(stage)}
            (state / "made_with.json").write_text(json.dumps(marker))
        wait_for_everyone()
        return state

    def remove(self) -> None:
        """Deletes the folder, once the output is in its place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Notes how long something takes that leaves no result of its own."""
        start = time.perf_counter()
        yield
        self._seconds[what] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """How long each stage took, whenever it ran, and what was done besides in this run."""
        stages = {stage: record["seconds"] for stage, record in self._records.items()}
        return {**self._seconds, **stages}

    def _state(self, stage: str) -> Path:
        return self._path(stage, "state")

    def _path(self, stage: str, kind: str) -> Path:
        name = stage
        if self._shared:
            made_with = json.dumps(self._made_with(stage), sort_keys=True)
            name = f"{stage}-{hashlib.sha256(made_with.encode()).hexdigest()[:16]}"
        return self.folder / f"{name}.{kind}"

    def _made_with(self, stage: str) -> dict[str, Any]:
        return {name.partition(".")[0]: self._recipe[name] for name in STAGES[stage]}

    def _changes(self, stage: str, made_with: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        then, now = _flat(made_with), _flat(self._made_with(stage))
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
