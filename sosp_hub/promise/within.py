"""``allocate_within``: the smallest plan that loses no more quality than was asked for."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sosp_hub.allocation import MEASURED, allocate
from sosp_hub.cost import CostModel
from sosp_hub.cut import apply
from sosp_hub.errors import BudgetError
from sosp_hub.evaluate import metrics_of_samples
from sosp_hub.modes import as_the_caller, check_models, in_own_modes
from sosp_hub.plan import PruningPlan
from sosp_hub.promise.search import Promise, not_met, smallest
from sosp_hub.recipe.metrics import DIVERGENCE, Drop, read_drops
from sosp_hub.reconstruction.norms import recalibrate_where_nearer
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from sosp_hub.structure.graph import Graph
from sosp_hub.tasks.batches import check_batches
from sosp_hub.tasks.metrics import Meter, OfAll

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn


_COSTS = ("macs", "params", "structures", "memory_bytes", *MEASURED, "threshold")


@dataclass(frozen=True, eq=False)
class Within:
    """The smallest model that keeps a promise.

    Attributes:
        plan: Of the cut.
        model: What it leaves, rebuilt and with its norms re-estimated where that was asked for.
        promise: What was promised, measured and tried.
    """

    plan: PruningPlan
    model: nn.Module
    promise: Promise


@in_own_modes
def allocate_within(
    model: nn.Module,
    graph: Graph,
    saliency: Mapping[str, Tensor],
    held_out: "Batches",
    *,
    max_drop: Mapping[str, float | str],
    rebuild: "Batches | None" = None,
    loss_fn: "LossFn | None" = None,
    meters: Mapping[str, Meter] = MappingProxyType({}),
    confidence: float = 0.95,
    num_probes: int = 6,
    **limits: Any,
) -> Within:
    """Cuts as much as a bound on the loss of quality allows, with a confidence.

    Every model that is tried is cut by one order of elimination, rebuilt, and measured beside the
    dense model on the same held-out samples. A third of them guides the search; the bound holds
    with the confidence on the others (see ``sosp_hub.promise.search``).

    Args:
        model: The dense model.
        graph: What ``trace`` found.
        saliency: What ``score`` gave.
        held_out: Batches that nothing was trained, scored or rebuilt with; each sample once.
        max_drop: By metric what may be lost: ``{"accuracy": 1.0}`` points, ``{"perplexity": "5%"}``
            of the dense model's, ``{"divergence": 0.05}`` nats; several must all hold.
        rebuild: Calibration batches with which each cut is rebuilt and its BatchNorm statistics are
            re-estimated; None = a bare cut.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        meters: Metrics beside accuracy, loss and perplexity.
        confidence: One-sided, of each bound.
        num_probes: Steps of bisection, beside three larger models.
        **limits: Keywords of ``allocate``: floors, ties, targets, and budgets that must hold too.

    Raises:
        BudgetError: An unknown metric, or a promise that nothing keeps: says what is kept, with
            all that was tried.
        DataError: Too few samples to prove it; says how many are needed.
        ModelError: Not a module.
        VerificationError: A cut goes wrong; its ``groups`` say where. A model of which a group
            stayed whole would be another one than the plan's.

    Example:
        >>> import sosp_hub, torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> images = torch.randn(3000, 4)
        >>> held_out = [(part, net(part).argmax(-1)) for part in images.split(500)]
        >>> within = sosp_hub.allocate_within(
        ...     net, graph, scores, held_out, max_drop={"accuracy": 30.0}, num_probes=2
        ... )
        >>> isinstance(within.plan, sosp_hub.PruningPlan)
        True
    """
    check_models(model)
    if not isinstance(graph, Graph) or not isinstance(saliency, Mapping):
        raise BudgetError(
            f"allocate_within got a {type(graph).__name__} and a {type(saliency).__name__}; "
            "expected allocate_within(model, graph, saliency, held_out, max_drop=...), with what "
            "trace(...) and score(...) return"
        )
    if not isinstance(max_drop, Mapping) or not max_drop:
        raise BudgetError(
            f"budget.max_drop: got {max_drop!r}; expected how much each metric may drop, such as "
            "{'accuracy': 1.0}"
        )
    names = ("accuracy", "loss", "perplexity", *meters)
    of_all = [name for name, meter in meters.items() if isinstance(meter, OfAll)]
    try:
        drops = read_drops(max_drop, names, of_all)
    except ValueError as error:
        raise BudgetError(f"budget.{error}") from None
    metrics = [drop.metric for drop in drops]

    for given in (held_out, rebuild or ()):
        check_batches(given, "allocate_within")
    held_out, rebuild_with = list(as_the_caller(held_out)), list(as_the_caller(rebuild or ()))

    def rows(pruned: nn.Module) -> dict[str, Tensor]:
        return metrics_of_samples(
            pruned, held_out, metrics, loss_fn=loss_fn, meters=meters, dense=model
        )

    def make(plan: PruningPlan) -> nn.Module:
        if not rebuild_with:
            return apply(model, graph, plan, verify="fast", strict=True)
        rebuilt = rebuilt_weights(model, graph, plan, rebuild_with)
        pruned = apply(rebuilt.model, graph, rebuilt.plan, verify="fast", strict=True)
        recalibrate_where_nearer(pruned, model, graph, plan, rebuild_with)
        return pruned

    def plan_of(targets: Mapping[str, Any]) -> PruningPlan:
        return allocate(graph, saliency, **limits, **targets)

    budgets = {key: limits.pop(key) for key in _COSTS if limits.get(key) is not None}
    promise, plan = search(
        graph,
        drops,
        rows_of_dense(drops, rows(model)),
        plan_of,
        lambda plan, _: rows(make(plan)),
        budgets,
        confidence=confidence,
        num_probes=num_probes,
    )
    return Within(plan, make(plan), promise)


def rows_of_dense(drops: Sequence[Drop], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense model's, whose divergence from itself is none."""
    return {
        drop.metric: torch.zeros_like(rows[drop.metric])
        if drop.metric == DIVERGENCE
        else rows[drop.metric]
        for drop in drops
    }


def search(
    graph: Graph,
    drops: Sequence[Drop],
    dense: Mapping[str, Tensor],
    plan_of: Callable[[Mapping[str, float]], PruningPlan],
    rows_of: Callable[[PruningPlan, float], Mapping[str, Tensor]],
    budgets: Mapping[str, float],
    *,
    confidence: float,
    num_probes: int,
) -> tuple[Promise, PruningPlan]:
    """The promise and the plan that keeps it.

    Args:
        graph: Of the dense model.
        drops: What may be lost.
        dense: Rows of the dense model.
        plan_of: From budgets to a plan.
        rows_of: From a plan and its share to the rows of the model that it leaves.
        budgets: Of cost, that must hold as well.
        confidence: Of each bound.
        num_probes: Steps of bisection.

    Raises:
        BudgetError: Nothing keeps it.
    """
    cost = CostModel(graph)
    whole = cost()

    def shares(plan: PruningPlan) -> dict[str, float]:
        found = cost(plan.num_kept(), plan.kept)
        return {
            name: getattr(found, name) / max(getattr(whole, name), 1)
            for name in ("macs", "params", "bytes")
        }

    seen: dict[float, Mapping[str, Tensor]] = {}

    def probe(share: float) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        plan = plan_of({"macs": share})
        found = shares(plan)
        if found["macs"] not in seen:  # rounding and ties leave fewer plans than shares
            seen[found["macs"]] = rows_of(plan, share)
        return found, seen[found["macs"]]

    least = shares(plan_of({"threshold": sys.float_info.max}))["macs"]
    promise = smallest(
        drops, dense, probe, least=least, confidence=confidence, num_probes=num_probes
    )
    if promise.point is None or promise.point.is_whole:
        raise not_met(promise, {})
    kept = {"macs": promise.point.macs}
    plan = plan_of(kept)
    if budgets and plan_of({**kept, **_tighter(budgets, kept)}).kept != plan.kept:
        raise not_met(promise, budgets)
    return promise, plan


def _tighter(budgets: Mapping[str, float], kept: Mapping[str, float]) -> dict[str, float]:
    """Budgets that must hold beside a share that is kept."""
    return {key: min(value, kept.get(key, value)) for key, value in budgets.items()}
