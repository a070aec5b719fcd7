"""Cuts in rounds: all but the last, each scored, rebuilt and trained; the last is the run's own."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sosp_hub.cost import cost
from sosp_hub.distributed import logger
from sosp_hub.pipeline.after_cut import follow_up
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.planning import decide_and_cut, score
from sosp_hub.pipeline.stage_cache import StageCache
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.schedule import kept_after
from sosp_hub.recipe.schema import Recipe

_COSTS = {"macs": "macs", "params": "params", "memory_bytes": "bytes"}
_NO_MATTER = {"output", "push"}


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What was done before the last cut.

    Attributes:
        context: Of the last one: the model as it is now, and what of it may stay.
        plans: Of the cuts before, each for the model as it was then.
        record: A row for each: shares that it kept of the dense model, and its metrics.
    """

    context: Context
    plans: Sequence[PruningPlan] = ()
    record: Sequence[dict[str, Any]] = ()

    def whole(self, last: PruningPlan) -> PruningPlan:
        """The one plan that equals all of them."""
        if not self.plans:
            return last
        made, *others = self.plans
        for plan in (*others, last):
            made = made.compose(plan)
        return dataclasses.replace(
            made,
            provenance={**last.provenance, "rounds": len(self.plans) + 1},
            base_model=self.plans[0].base_model,
            base_revision=self.plans[0].base_revision,
        )


def in_rounds(context: Context) -> Rounds:
    """Does all rounds but the last; none where the recipe cuts at once.

    What a round leaves is kept in a folder of its own beside the run's, so that a schedule that was
    stopped goes on in the middle.
    """
    schedule = context.recipe.schedule
    if schedule is None:
        return Rounds(context)
    parts = context.recipe.model_dump(mode="json", exclude=_NO_MATTER)
    made_with = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = context.cache.folder / f"rounds-{made_with}"
    plans, record, current = list[PruningPlan](), list[dict[str, Any]](), context
    for number in range(1, schedule.rounds + 1):
        recipe = _recipe_of(context, current, number)
        cache = StageCache(folder / str(number), recipe)
        logger.info("round %d of %d", number, schedule.rounds)
        current = dataclasses.replace(current.turned_to(recipe, cache), original=context.model)
        if number == schedule.rounds:
            break
        plan, pruned = decide_and_cut(current, score(current))
        metrics, _ = follow_up(current, plan, pruned)
        found = cost(current.graph, plan)
        dense = cost(context.graph)
        shares = {name: getattr(found, name) / getattr(dense, name) for name in ("macs", "params")}
        record.append({"kept": shares, "metrics": metrics})
        plans.append(plan)
        current = current.with_model(pruned, recipe, cache)
        current = dataclasses.replace(current, graph=current.graph.after(plans))
    return Rounds(current, plans, record)


def _recipe_of(context: Context, current: Context, number: int) -> Recipe:
    """The recipe of a round: a share of what is left, and its own training."""
    recipe, schedule = context.recipe, context.recipe.schedule
    assert schedule is not None
    dense, now = cost(context.graph), cost(current.graph)
    shares = {}
    for name, kept in recipe.budget.targets().items():
        wanted = kept_after(kept, number, schedule.rounds, schedule.share)
        what = _COSTS[name]
        shares[name] = min(1.0, wanted * getattr(dense, what) / getattr(now, what))
    changes: dict[str, Any] = {
        "budget": recipe.budget.model_copy(update=shares),
        "schedule": None,
    }
    if number < schedule.rounds:
        training = {"epochs": schedule.epochs, "tokens": None}
        changes["finetune"] = recipe.finetune.model_copy(update=training)
    return recipe.model_copy(update=changes)
