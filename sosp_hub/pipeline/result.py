"""The output folder: written beside its place, moved there when it is whole."""

import importlib.metadata
import json
import platform
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from sosp_hub.atomic import write_text
from sosp_hub.checkpoint.io import save_pretrained
from sosp_hub.cost import cost
from sosp_hub.distributed import logger
from sosp_hub.errors import BudgetError, HubError
from sosp_hub.evaluate import time_passes
from sosp_hub.latency import Decoder
from sosp_hub.pipeline.measuring import hardware, timed_inputs
from sosp_hub.pipeline.memory import forward_peak
from sosp_hub.pipeline.output_folder import put
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.load import dump_recipe
from sosp_hub.recipe.schema import PushSection, Recipe
from sosp_hub.recipe.tasks import find_task
from sosp_hub.report.card import render_card
from sosp_hub.report.facts import scrub
from sosp_hub.report.licence import copy_licence_files
from sosp_hub.report.listing import CALIBRATION, CURVATURE, DENSE, RECIPE, SALIENCY
from sosp_hub.report.page import write_page
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.inputs import one_sample
from sosp_hub.zoo.load import Loaded

if TYPE_CHECKING:
    from sosp_hub.types import Saliency

_PACKAGES = ("sosp_hub", "torch", "transformers", "timm", "accelerate", "datasets", "safetensors")


def write_result(
    *,
    recipe: Recipe,
    loaded: Loaded,
    pruned: nn.Module,
    graph: Graph,
    plan: PruningPlan,
    saliency: "Saliency",
    metrics: Mapping[str, Any],
    rebuild: Mapping[str, Any],
    recovery: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    promise: Mapping[str, Any],
    calibration: Mapping[str, Any],
    base: Mapping[str, Any],
    curvature: Path | None,
    keep_inputs: Callable[[Path], None],
    keep_dense: bool,
    seconds: Mapping[str, float],
    draft: Path,
    output: Path,
    command: str,
) -> dict[str, Any]:
    """Writes weights, report, scores, figures and card; the report."""
    kept = plan.num_kept()
    criterion = recipe.criterion
    measured = recipe, loaded, pruned
    report = {
        "plan": json.loads(plan.to_json()),
        "saliency": {name: _summary(scores) for name, scores in saliency.items()},
        "metrics": dict(metrics),
        "rebuild": dict(rebuild),
        "cost": costs(graph, plan),
        "latency": {**latency_of(*measured), **decoding_of(*measured)}
        if recipe.evaluate.latency
        else {},
        "peak_memory": peak_memory_of(recipe, loaded, pruned),
        "groups": [
            {
                "name": group.name,
                "kind": group.kind,
                "size": group.size,
                "kept": kept.get(group.name, group.size),
                "exact": group.exact,
            }
            for group in graph.groups.values()
            if group.kind in recipe.structure.kinds or group.name in kept
        ],
        "criterion": {"name": criterion.name, "options": criterion.options()},
        "calibration": dict(calibration),
        "task": recipe.model.task,
        "versions": versions(),
        "timings_s": dict(seconds),
        "base": dict(base),
        "recipe": scrub(dump_recipe(recipe, whole=False)),
        "command": scrub(command),
        "history": recovery.get("history", []),
        "promise": dict(promise),
        "rounds": list(rounds),
        "recovery": {name: value for name, value in recovery.items() if name != "history"},
    }
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    save_pretrained(
        pruned,
        draft,
        base_model=loaded.base_model,
        base_revision=loaded.base_revision,
        report=report,
        tokenizer=loaded.tokenizer,
        processor=loaded.image_processor,
        max_shard_size=recipe.output.max_shard_size,
    )
    if keep_dense:
        save_pretrained(
            loaded.model,
            draft / DENSE,
            tokenizer=loaded.tokenizer,
            processor=loaded.image_processor,
        )
    write_text(draft / RECIPE, dump_recipe(recipe, whole=False))
    if saliency:  # none where each round of a schedule scores anew
        save_file(saliency, draft / SALIENCY)
    if curvature is not None:
        shutil.copyfile(curvature, draft / CURVATURE)
    for file in (draft / SALIENCY, draft / CURVATURE):
        if file.exists():
            file.chmod((draft / "config.json").stat().st_mode)  # safetensors: the owner alone reads
    keep_inputs(draft / CALIBRATION)
    if recipe.model.path is not None:
        copy_licence_files(Path(recipe.model.path).expanduser(), draft)
    render_card(draft, figures=recipe.output.figures)
    if recipe.output.figures:
        write_page(draft)
    put(draft, output)
    return report


def check_push(push: PushSection) -> str | None:
    """What would keep the result from being published, before anything long begins.

    Only the main process asks: the hub counts how often.
    """
    from sosp_hub.hub.push import check_access

    try:
        check_access(push.repo_id, revision=push.revision, create_pr=push.create_pr)
    except HubError as error:
        return f"push: {error}"
    return None


def publish(output: Path, push: PushSection) -> None:
    """Sends the result to the hub."""
    from sosp_hub.hub.push import push_to_hub  # a run that is not published needs no client

    try:
        address = push_to_hub(output, push.repo_id, **push.model_dump(exclude={"repo_id"}))
    except HubError as error:
        later = f"python -m sosp_hub.push {output} {push.repo_id}"
        raise HubError(
            f"{error}\nthe result is whole in {output}; publish it with: {later}"
        ) from error
    logger.info("published: %s", address)


def costs(graph: Graph, plan: PruningPlan) -> dict[str, Any]:
    """MACs, parameters and bytes, before and after, and of which input the MACs are."""
    costs_of = {"before": cost(graph), "after": cost(graph, plan)}
    sized = graph.sized
    return {
        **{
            when: {"macs": one.macs, "params": one.params, "bytes": one.bytes}
            for when, one in costs_of.items()
        },
        "of_one": sized.sample,
        **({"tokens": sized.num_tokens} if sized.num_tokens else {}),
    }


def _summary(scores: torch.Tensor) -> dict[str, float]:
    return {
        "min": scores.min().item(),
        "median": scores.median().item(),
        "max": scores.max().item(),
    }


def latency_of(
    recipe: Recipe, loaded: Loaded, pruned: nn.Module, budget_s: float = 2.0
) -> dict[str, Any]:
    """Median seconds of a forward pass before and after, measured in turn, their spread, on what.

    Of a model that generates text it is the prefill: the pass over a prompt.
    """
    inputs, stated = _for_latency(recipe, loaded)
    return _both(time_passes([loaded.model.eval(), pruned.eval()], inputs, budget_s), stated)


def decoding_of(
    recipe: Recipe, loaded: Loaded, pruned: nn.Module, budget_s: float = 2.0
) -> dict[str, Any]:
    """Seconds of one token more after that prompt; nothing where none is generated."""
    inputs, stated = _for_latency(recipe, loaded)
    if find_task(loaded.task).name != "text-generation":
        return {}
    tokens = inputs["input_ids"]
    try:
        steps = [Decoder(model.eval(), tokens) for model in (loaded.model, pruned)]
    except BudgetError:  # it has no cache of keys and values
        return {}
    return {"decode": _both(time_passes(steps, (tokens[:, :1],), budget_s), stated)}


def _for_latency(recipe: Recipe, loaded: Loaded) -> tuple[Any, dict[str, Any]]:
    """Inputs of a measurement, and what is stated beside it."""
    batch = recipe.evaluate.latency_batch_size
    inputs = timed_inputs(recipe, loaded)
    tokens = inputs.get("input_ids") if isinstance(inputs, dict) else None
    return inputs, {
        "batch": batch,
        **({"length": tokens.shape[1]} if tokens is not None else {"of_one": one_sample(inputs)}),
        "dtype": recipe.model.dtype,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
    }


def _both(seconds: Sequence[Sequence[float]], stated: Mapping[str, Any]) -> dict[str, Any]:
    measured = {}
    for when, passes in zip(("before", "after"), seconds, strict=True):
        low, median, high = statistics.quantiles(passes, n=4)
        spread = {"quartiles": [low, high], "passes": len(passes)}
        measured[when] = {"seconds": median, **spread, **stated}
    return measured


def peak_memory_of(recipe: Recipe, loaded: Loaded, pruned: nn.Module) -> dict[str, Any]:
    """Bytes in tensors at the height of a forward pass before and after, and for what inputs."""
    batch = recipe.evaluate.latency_batch_size
    inputs = timed_inputs(recipe, loaded)
    models = {"before": loaded.model.eval(), "after": pruned.eval()}
    stated = {"batch": batch, "dtype": recipe.model.dtype, "hardware": hardware()}
    return {
        when: {"bytes": forward_peak(model, inputs), **stated} for when, model in models.items()
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | packages
