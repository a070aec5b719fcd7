"""The scores of a finished run: what another budget is cut from, without scoring again."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sosp_hub.distributed import logger
from sosp_hub.errors import ModelError, OutputExistsError, RecipeError
from sosp_hub.pipeline.calibration_inputs import read_inputs
from sosp_hub.recipe.load import parse_recipe
from sosp_hub.recipe.schema import BUDGETS, ModelSection, Recipe
from sosp_hub.report.facts import own_recipe, scored_by, trained_before, with_spread
from sosp_hub.report.listing import CALIBRATION, CURVATURE, DENSE, REPORT, SALIENCY
from sosp_hub.report.schema import read_report

if TYPE_CHECKING:
    from sosp_hub.types import Saliency

_FREE = ("budget", "data", "evaluate", "finetune", "output", "push", "rebuild")
_FREE_KEYS = ("model.id", "model.path", "model.revision", "structure.verify")
_NEED_DATA = ("data", "finetune", "evaluate.metrics", "evaluate.harness")
_SIZES = ("data.image_size", "data.max_length")  # of the input that costs are for
_MOST_ELEMENTS = 4096  # of a parameter, for what tells weights apart


@dataclass(frozen=True)
class Scores:
    """What a finished run leaves for another budget.

    Attributes:
        folder: Output of that run.
        recipe: Its recipe, with another budget and output folder.
        saliency: Its scores.
        calibration: What they were made with, for the report.
        base: What its report says of the dense model.
        damping: What it compensated with.
        made: The recipe of that run, as it was.
        dense: What that run measured of its dense model.
        blocks: Which whole blocks it removed, by measured loss.
        trained: Whether it trained the dense model, and not only would have with a new head.
    """

    folder: Path
    recipe: Recipe
    saliency: "Saliency"
    calibration: Mapping[str, Any]
    base: Mapping[str, Any]
    damping: float | None = None
    made: Recipe | None = None
    dense: Mapping[str, Any] = field(default_factory=dict)
    blocks: Sequence[Mapping[str, Any]] = ()
    trained: bool = True

    @property
    def curvature(self) -> Path | None:
        """Where the matrix is that it compensated with, if that was kept."""
        path = self.folder / CURVATURE
        return path if path.is_file() else None

    @property
    def calibration_inputs(self) -> Path | None:
        """Where the inputs are that its rebuild was made with, if they were kept."""
        path = self.folder / CALIBRATION
        return path if path.is_file() else None

    def inputs(self, num_samples: int) -> list[Any]:
        """At most so many of those inputs, in batches.

        Raises:
            OutputExistsError: They were not kept, or are damaged.
        """
        if self.calibration_inputs is None:
            raise OutputExistsError(
                f"{self.folder} has no {CALIBRATION}, the inputs that another budget is rebuilt "
                "with; run its recipe with output.any_budget=true"
            )
        return read_inputs(self.calibration_inputs, num_samples)

    @property
    def has_dense(self) -> bool:
        """Whether the folder holds the dense weights, because that run made them."""
        return (self.folder / DENSE).is_dir()

    def model(self) -> ModelSection:
        """Where the dense weights are that were scored.

        Raises:
            ModelError: That run made them and did not keep them, or they are in a folder that its
            report does not name.
        """
        section = self.recipe.model
        if self.has_dense:
            kept = {"id": str(self.folder / DENSE), "path": None, "revision": None, "kwargs": {}}
            made = {"train": None, "pretrained": True, "num_labels": None}
            return section.model_copy(update=kept | made)
        if not section.pretrained or (section.train and self.trained):
            raise ModelError(
                f"{self.folder}: its dense model was trained in that run, and the folder "
                f"{DENSE}/ with its weights is gone or was not kept (output.keep_dense); "
                "run the recipe again with the other budget"
            )
        if (place := section.path or section.id).startswith(".../"):
            raise ModelError(
                f"{self.folder}: its report does not keep the folder {place} of the dense "
                "model; write model.path=FOLDER"
            )
        revision = section.revision or self.base.get("revision")
        return section.model_copy(update={"revision": revision, "train": None})

    def check_weights(self, model: nn.Module) -> None:
        """Compares the weights that are cut with those that were scored, where the report tells.

        Raises:
            ModelError: They differ: another model, another revision, or trained since.
        """
        scored, now = self.base.get("weights"), weights_of(model)
        if not self.has_dense and scored and now and scored != now:
            section = self.recipe.model
            raise ModelError(
                f"--from-scores: {section.path or section.id} has other weights than those that "
                f"were scored in {self.folder}; give these with model.path=FOLDER or "
                "model.revision=COMMIT, or run the recipe again"
            )

    def check_dense(self, measured: Mapping[str, Any]) -> None:
        """Compares what the dense model measures now with what that run measured.

        Raises:
            ModelError: They differ by more than the standard error, on the same data: weights,
            tokenizer or data are not those that were scored.
        """
        if not measured or not self.dense or self.made is None:
            return
        if _which_data(self.made) != _which_data(self.recipe):
            logger.info("this data differs from that of %s: metrics are not compared", self.folder)
            return
        for name, now in measured.items():
            stored = self.dense.get(name)
            if "/" in name or not stored:
                continue
            if stored["n"] != now["n"]:
                difference = f"{name} of {now['n']} samples, where {stored['n']} were measured"
            elif abs(now["value"] - stored["value"]) > _spread(stored, now):
                difference = f"{with_spread(name, now)}, stored is {with_spread(name, stored)}"
            else:
                continue
            raise ModelError(
                f"--from-scores: the dense model of {self.folder} measures another {name}: "
                f"{difference}. Its weights, its tokenizer or the data are not those that were "
                "scored; give the same data, or run the recipe again"
            )


def read_scores(folder: str | Path, overrides: Sequence[str], *, with_data: bool = False) -> Scores:
    """Reads the output folder of a run.

    Args:
        folder: The output.
        overrides: ``key.path=value`` for its recipe. A budget takes the place of the old one; what
            the scores depend on cannot be changed.
        with_data: Whether the data is opened; if not, overrides that only data needs are refused.

    Raises:
        OutputExistsError: No output of a run, or one without its scores.
        RecipeError: Overrides that the scores do not allow.
    """
    folder = Path(folder).expanduser()
    report, source = _report_of(folder), f"the recipe of {folder}"
    text = own_recipe(folder, str(report.get("recipe") or ""))
    read = partial(parse_recipe, text, source, criterion=scored_by(report))
    made = read()
    if made.schedule is not None:
        fault = "schedule: its scores are of models that were cut before; run the recipe again"
        raise RecipeError("--from-scores", [fault])
    dropped = [f"budget.{name}=null" for name in made.budget.targets()]
    dropped += ["budget.max_drop={}"] * bool(made.budget.max_drop)
    first = read([*dropped, *overrides])
    _check(folder, made, first, overrides, with_data=with_data)
    name = "-".join(
        [
            folder.resolve().name,
            *(f"{k}-{v:g}" for k, v in first.budget.targets().items()),
            *(f"{k}-{v}" for k, v in first.budget.max_drop.items()),
        ]
    )
    place = [f"output.dir={folder.resolve().with_name(name)}", *["push=null"] * bool(made.push)]
    recipe = read([*dropped, *place, *overrides])
    trained = trained_before(report) or not made.model.pretrained
    fitted = "dense model was trained" if trained else "scores were made"
    if not trained and made.criterion.needs == "nothing":
        fitted = ""
    if recipe.budget.max_drop and fitted and made.held_out_key() != recipe.held_out_key():
        raise RecipeError(
            "--from-scores",
            [
                f"budget.max_drop: the {fitted} in that run with samples that would have to be "
                "held out; run the recipe with it, or with data.num_held_out"
            ],
        )
    try:
        saliency = load_file(folder / SALIENCY)
    except (SafetensorError, OSError) as error:
        raise OutputExistsError(
            f"--from-scores: {folder / SALIENCY} is damaged ({error}); run the recipe again"
        ) from error
    for name, tensor in saliency.items():
        if not tensor.is_floating_point() or tensor.ndim != 1:
            raise OutputExistsError(
                f"--from-scores: {folder / SALIENCY}: {name} holds {tensor.dtype} in "
                f"{tensor.ndim} dimensions, expected one number with a fraction for each structure"
            )
    base = {key: value for key, value in (report.get("base") or {}).items() if value is not None}
    provenance = (report.get("plan") or {}).get("provenance") or {}
    compensation = provenance.get("compensation") or {}
    calibration = report.get("calibration") or {}
    dense = (report.get("metrics") or {}).get("dense") or {}
    blocks = provenance.get("blocks") or ()
    return Scores(
        folder,
        recipe,
        saliency,
        calibration,
        base,
        compensation.get("damping"),
        made,
        dense,
        blocks,
        trained=trained,
    )


def weights_of(model: nn.Module) -> str | None:
    """A digest of at most 4096 values of each parameter; None where they are not plain tensors.

    Neither names nor the order of parameters count: they are those of a version of a library.
    """
    digests = []
    for parameter in model.parameters():
        if type(parameter) not in (nn.Parameter, Tensor) or parameter.is_meta:
            return None
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _MOST_ELEMENTS)].cpu().contiguous()
        digests.append(hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a finished run.

    Raises:
        OutputExistsError: No output of a run, or one without its scores.
        RecipeError: A recipe that this version does not read.
    """
    report = _report_of(folder)
    text, source = str(report.get("recipe") or ""), f"the recipe of {folder}"
    return parse_recipe(text, source, criterion=scored_by(report))


def _report_of(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise OutputExistsError(f"--from-scores: {folder}: no such folder")
    report = read_report(folder)
    for name, present in (
        (REPORT, report is not None),
        (SALIENCY, (folder / SALIENCY).is_file() or bool((report or {}).get("rounds"))),
    ):
        if not present:
            raise OutputExistsError(
                f"--from-scores: {folder} has no {name}; give the output folder of a run"
            )
    return report or {}


def _which_data(recipe: Recipe) -> dict[str, Any]:
    """What decides which samples are measured; of a path its last part, which is all a report has.

    The report of a run holds no folders of the machine it was made on.
    """
    data = recipe.data.model_dump(exclude={"num_workers", "calibration", "others"})
    path = data["path"] and Path(data["path"]).name
    return {**data, "path": path, "seed": recipe.seed, "dtype": recipe.model.dtype}


def _spread(stored: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """The larger standard error: of the same weights on the same samples only rounding differs."""
    rounding = 1e-3 * abs(stored["value"])
    return max(rounding, *((metric["stderr"] or 0.0) * (1 + 1e-9) for metric in (stored, now)))


def _check(
    folder: Path, made: Recipe, changed: Recipe, overrides: Sequence[str], *, with_data: bool
) -> None:
    faults = []
    keys = [override.partition("=")[0].strip() for override in overrides]
    kept = (folder / DENSE).is_dir()
    for key in keys:
        section = key.partition(".")[0]
        if key in _FREE_KEYS or section in _FREE:
            if kept and section == "model":
                faults.append(
                    f"{key}: the dense model that was scored is in {folder / DENSE}; leave it out, "
                    "or run the recipe with it"
                )
            elif not with_data and key.startswith(_NEED_DATA) and key not in _SIZES:
                faults.append(
                    f"{key}: the data is not opened, nothing is trained or measured; add "
                    "--with-data, or leave it out"
                )
        elif (was := _value(made, key)) != _value(changed, key):
            faults.append(
                f"{key}: the scores in {folder} were made with {was}; leave it out, or run the "
                "recipe with it"
            )
    budgets = {"budget", *(f"budget.{name}" for name in (*BUDGETS, "max_drop"))}
    if not any(key in budgets or key.startswith("budget.max_drop.") for key in keys):
        faults.append("no other budget is given; write one, such as budget.macs=0.3")
    if with_data and str(changed.data.path).startswith(".../"):
        faults.append(
            f"data.path: the report of {folder} does not keep the folder of {changed.data.path}; "
            "write data.path=FILE_OR_FOLDER"
        )
    if faults:
        raise RecipeError("--from-scores", faults)


def _value(recipe: Recipe, key: str) -> Any:
    """What a recipe says at a key."""
    value: Any = recipe.model_dump()
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
