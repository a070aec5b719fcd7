"""Verifies a published model against its card: hashes, plan, size, and metrics measured again."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile
from torch import nn

from sosp_hub.compat.huggingface_hub import git_hash
from sosp_hub.cut import from_pretrained
from sosp_hub.data.loading import load_split, make_loader
from sosp_hub.data.source import DataInfo, open_data
from sosp_hub.errors import HubError, PlanError, SospHubError
from sosp_hub.evaluate import evaluate
from sosp_hub.hub.attempts import Patience, check_token, explain, persistently
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.load import parse_recipe
from sosp_hub.recipe.schema import Recipe
from sosp_hub.recipe.tasks import find_task
from sosp_hub.report.facts import own_metrics, own_recipe, scored_by
from sosp_hub.report.listing import DENSE
from sosp_hub.report.markers import read_card
from sosp_hub.report.numbers import is_share, metric_value
from sosp_hub.report.schema import read_report
from sosp_hub.report.snippets import read_checkpoint
from sosp_hub.untrusted import MOST_CARD_BYTES, UnreadableError, read_text
from sosp_hub.zoo.load import load_model

_ROUNDING = 1e-4


@dataclass(frozen=True)
class Check:
    """One check: name, result, details.

    Attributes:
        name: Of the check.
        holds: Whether it is as published; None where it could not be checked.
        detail: What was seen, in a sentence.
    """

    name: str
    holds: bool | None
    detail: str


@dataclass
class Verification:
    """All checks of one model."""

    source: str
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Nothing contradicts what was published, and the metrics were measured again."""
        measured = any(check.holds for check in self.checks if check.name.startswith("metric"))
        return measured and all(check.holds is not False for check in self.checks)

    def __str__(self) -> str:
        marks = {True: "holds", False: "DIFFERS", None: "not checked"}
        lines = [f"  {check.name}: {marks[check.holds]}; {check.detail}" for check in self.checks]
        verdict = (
            "what was published holds" if self.holds else "what was published is not confirmed"
        )
        return "\n".join([f"{self.source}: {verdict}", *lines])


def verify(
    repo_id_or_folder: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    num_samples: int = 1000,
    overrides: Sequence[str] = (),
    model: nn.Module | None = None,
) -> Verification:
    """Downloads a published model and checks it against its own report and card.

    Args:
        repo_id_or_folder: Hub id, or a folder.
        revision: Commit, branch or tag; None = main.
        token: None = the one of ``hf auth login``.
        num_samples: Test samples to measure on; the published subset is used where it is smaller.
        overrides: ``key.path=value`` for the recipe, such as ``data.path=FOLDER``.
        model: For a model of no library: what was cut, as it is built.

    Raises:
        HubError: The hub cannot be reached, or has no such model; or there is no report.
    """
    result = Verification(repo_id_or_folder)
    folder = Path(repo_id_or_folder)
    if folder.is_dir():
        result.checks.append(Check("files", None, "a folder has no hashes to compare with"))
    else:
        folder, check = _download(repo_id_or_folder, revision, token)
        result.checks.append(check)
    report = read_report(folder)
    if report is None:
        raise HubError(
            f"{repo_id_or_folder}: there is no sosp_report.json, so nothing to compare with"
        )
    result.checks += [_check_plan(report), _check_card(folder, report)]
    if model is None and not read_checkpoint(folder).can_run:
        detail = "a model of no library; verify(..., model=Net()) loads and counts it"
        result.checks.append(Check("weights", None, detail))
        return result
    try:
        loaded = from_pretrained(str(folder), **({} if model is None else {"model": model}))
    except SospHubError as error:
        result.checks.append(Check("weights", False, str(error)))
        return result
    result.checks.append(_check_size(loaded, report))
    result.checks += _measure(folder, loaded, report, num_samples, overrides)
    return result


def _download(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, Check]:
    check_token(token)
    api = HfApi(token=token)
    try:
        limit = Patience().longest_silence_s
        info = persistently(
            lambda: api.model_info(repo_id, revision=revision, timeout=limit), "commit", Patience()
        )
        commit = info.sha
        listed = persistently(lambda: _files(api, repo_id, commit), "list files", Patience())
        folder = Path(snapshot_download(repo_id, revision=commit, token=token))
    except Exception as error:  # noqa: BLE001 - told in words that say what to do
        why = explain(error, repo_id, api)
        raise why from why.__cause__
    wrong = [entry.path for entry in listed if not _is_listed(folder / entry.path, entry)]
    if wrong:
        return folder, Check("files", False, f"other bytes than the hub lists: {', '.join(wrong)}")
    detail = f"{len(listed)} files of commit {str(commit)[:7]} have the hashes that the hub lists"
    return folder, Check("files", True, detail)


def _files(api: HfApi, repo_id: str, commit: str | None) -> list[RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return [entry for entry in tree if isinstance(entry, RepoFile)]


def _is_listed(path: Path, entry: RepoFile) -> bool:
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    if entry.lfs is None:
        return git_hash(path.read_bytes()) == entry.blob_id
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.lfs.sha256


def _check_plan(report: Mapping[str, Any]) -> Check:
    record = report.get("plan")
    if not record:
        return Check("plan", None, "the report holds no plan")
    try:
        kept = PruningPlan.from_json(json.dumps(record)).num_kept()
    except PlanError as error:
        return Check("plan", False, str(error))
    listed = {group["name"]: group["kept"] for group in report.get("groups") or []}
    odd = [name for name, count in kept.items() if listed.get(name, count) != count]
    if odd:
        return Check("plan", False, f"other counts than the report's groups: {', '.join(odd)}")
    return Check("plan", True, f"{len(kept)} groups, sorted and in range")


def _check_card(folder: Path, report: Mapping[str, Any]) -> Check:
    path = folder / "README.md"
    if not path.is_file():
        return Check("card", None, "there is no README.md")
    try:
        data, _ = read_card(read_text(path, MOST_CARD_BYTES))
    except (HubError, UnreadableError) as error:
        return Check("card", False, str(error))
    final = (report.get("metrics") or {}).get("final") or {}
    stated = {
        one.metric_type: one.metric_value
        for one in data.get("eval_results") or []
        if isinstance(one.metric_value, int | float)
    }
    wrong = [
        f"{name} {value} (report: {final[name]['value']:.6g})"
        for name, value in stated.items()
        if name in final and not math.isclose(value, final[name]["value"], abs_tol=_ROUNDING)
    ]
    if wrong:
        return Check("card", False, f"the card states another number: {', '.join(wrong)}")
    return Check(
        "card", True if stated else None, f"{', '.join(stated) or 'no metric'}, as in the report"
    )


def _check_size(model: nn.Module, report: Mapping[str, Any]) -> Check:
    stated = ((report.get("cost") or {}).get("after") or {}).get("params")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if stated is None:
        return Check("weights", None, f"{num_parameters:,} parameters; the report states none")
    detail = f"{num_parameters:,} parameters loaded, {stated:,} published"
    return Check("weights", num_parameters == stated, detail)


def _measure(
    folder: Path,
    model: nn.Module,
    report: Mapping[str, Any],
    num_samples: int,
    overrides: Sequence[str],
) -> list[Check]:
    """The published metrics once more, on a subset of the published test samples."""
    final = (report.get("metrics") or {}).get("final") or {}
    names = own_metrics({"final": final})
    if not names or not report.get("recipe"):
        return [Check("metrics", None, "the report publishes none, or no recipe to repeat them")]
    try:
        text = own_recipe(folder, str(report["recipe"]))
        recipe = parse_recipe(text, "the published recipe", overrides, criterion=scored_by(report))
        measured = _evaluate(folder, model, recipe, names, num_samples)
    except SospHubError as error:
        return [Check("metrics", None, f"could not be measured: {error}")]
    return [_compare(name, final[name], measured[name]) for name in names]


def _evaluate(
    folder: Path, model: nn.Module, recipe: Recipe, names: Sequence[str], num_samples: int
) -> dict[str, Mapping[str, Any]]:
    data = open_data(recipe.data, recipe.model.task, seed=recipe.seed)
    local = {"id": str(folder), "path": None, "revision": None, "kwargs": {}}
    local |= {"pretrained": True, "train": None}
    loaded = load_model(recipe.model.model_copy(update=local), data=data.info)
    test = load_split(data, "test", loaded.processor)
    loader = make_loader(test, recipe.evaluate.batch_size)
    batches, left = [], num_samples
    for batch in loader:
        if left <= 0:
            break
        batches.append(batch)
        left -= recipe.evaluate.batch_size
    task = find_task(recipe.model.task)
    loss_fn = task.loss_fn(model, None if task.learns else _dense(folder, recipe, data.info))
    meters = task.meters(data.info, loaded.processor)
    measured = evaluate(model, batches, names, loss_fn=loss_fn, meters=meters)
    return {name: {"value": m.value, "n": m.n, "stderr": m.stderr} for name, m in measured.items()}


def _dense(folder: Path, recipe: Recipe, info: DataInfo) -> nn.Module:
    """The model that a published one is compared with: kept beside it, or named in the recipe."""
    if (folder / DENSE).is_dir():
        return from_pretrained(str(folder / DENSE))
    if not recipe.model.pretrained:
        raise HubError(
            f"{recipe.model.task} is measured against the dense model, which was random and is not "
            f"kept in {DENSE}/"
        )
    return load_model(recipe.model, data=info).model


def _compare(name: str, published: Mapping[str, Any], measured: Mapping[str, Any]) -> Check:
    spread = 1.96 * math.hypot(published.get("stderr") or 0.0, measured["stderr"] or 0.0)
    if measured["n"] == published.get("n"):  # the same samples: only arithmetic may differ
        spread = max(
            _ROUNDING, 2 / measured["n"] if is_share(name) else 1e-3 * abs(published["value"])
        )
    holds = abs(measured["value"] - published["value"]) <= spread
    detail = (
        f"{metric_value(name, measured['value'])} on {measured['n']:,} test samples, published "
        f"{metric_value(name, published['value'])} on {published.get('n') or 0:,}"
    )
    return Check(f"metric {name}", holds, detail)
