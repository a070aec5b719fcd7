"""The step that finds the smallest model within `budget.max_drop`, and tests of what follows it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sosp_hub.atomic import put_in_place
from sosp_hub.data.loading import make_loader
from sosp_hub.distributed import from_main, logger
from sosp_hub.errors import BudgetError
from sosp_hub.evaluate import metrics_of_samples
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.training import dense
from sosp_hub.plan import PruningPlan
from sosp_hub.progress import progress
from sosp_hub.promise.bound import Lost
from sosp_hub.promise.search import check_samples, proof_of
from sosp_hub.promise.within import rows_of_dense, search
from sosp_hub.recipe.tasks import find_task


def check_promise(context: Context) -> None:
    """Refuses a promise that no data can prove, before anything long begins."""
    budget = context.recipe.budget
    if not budget.max_drop:
        return
    if context.data is None:
        raise BudgetError("budget.max_drop: is measured, and there is no data; write --with-data")
    check_samples(context.recipe.drops(), len(context.held_out), budget.confidence)


@step("promised", dense, "structure", "criterion", "budget")
def promised(
    context: Context,
    plan_of: Callable[[Mapping[str, float]], PruningPlan],
    make: Callable[[PruningPlan], nn.Module],
) -> dict[str, Any]:
    """Searches; what each model that was tried counts on each sample is kept for another start."""
    budget, folder = context.recipe.budget, context.cache.training_state(promised)

    def rows_of(plan: PruningPlan, share: float) -> Mapping[str, Tensor]:
        path = folder / f"{share:.6f}.safetensors"
        if not from_main(path.is_file()):
            rows = rows_held_out(context, make(plan), f"try {100 * share:.1f} % of MACs")
            draft = path.with_suffix(".draft")
            context.cache.save(lambda: save_file(rows, draft))
            context.cache.save(lambda: put_in_place(draft, path))
        return load_file(path)

    found, _ = search(
        context.graph,
        context.recipe.drops(),
        dense_rows(context),
        plan_of,
        rows_of,
        budget.targets(),
        confidence=budget.confidence,
        num_probes=budget.probes,
    )
    point = found.point
    assert point is not None
    logger.info(
        "budget.max_drop: %.1f %% of the MACs are kept; of %d models that were tried it is the "
        "smallest within the bound on %d held-out samples",
        100 * point.cost["macs"],
        len(found.curve),
        found.num_proof,
    )
    return {**found.record(), "macs": point.macs}


def dense_rows(context: Context) -> dict[str, Tensor]:
    """What the dense model counts on each held-out sample."""
    rows = rows_held_out(context, context.model, "dense, held out")
    return rows_of_dense(context.recipe.drops(), rows)


def rows_held_out(context: Context, model: nn.Module, what: str) -> dict[str, Tensor]:
    """What a model counts on each held-out sample, by metric."""
    assert context.data is not None  # nothing is promised without it
    section, data = context.recipe.evaluate, context.recipe.data
    loader = make_loader(context.held_out, section.batch_size, num_workers=data.num_workers)
    shown = progress(context.accelerator.prepare_data_loader(loader), what)
    names = [drop.metric for drop in context.recipe.drops()]
    meters = find_task(context.recipe.model.task).meters(
        context.data.info, context.loaded.processor
    )
    loss_fn = context.loss_fn(model)
    return metrics_of_samples(
        model, shown, names, loss_fn=loss_fn, meters=meters, dense=context.model
    )


def tested(context: Context, model: nn.Module) -> dict[str, Lost]:
    """What a model loses on the samples of the proof, by metric."""
    rows = rows_held_out(context, model, "test the promise")
    confidence = context.recipe.budget.confidence
    return proof_of(context.recipe.drops(), dense_rows(context), rows, confidence)


def keeps(lost: Mapping[str, Lost]) -> bool:
    """Whether all of it is within what was allowed."""
    return all(one.holds for one in lost.values())


def as_record(lost: Mapping[str, Lost]) -> dict[str, Any]:
    """Plain data, for the report."""
    return {name: dataclasses.asdict(one) for name, one in lost.items()}
