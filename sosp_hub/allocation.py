"""From saliency and a budget to a plan: how many structures each group keeps, and which."""

import difflib
import fnmatch
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import ceil, isfinite, lcm
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sosp_hub.cost import Cost, CostModel
from sosp_hub.errors import BudgetError, shortened
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.targets import Target, as_targets
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group
from sosp_hub.structure.plain import PlainSizes
from sosp_hub.types import DEFAULT_KINDS, Kind

if TYPE_CHECKING:
    from torch import Tensor


_LOG = logging.getLogger("sosp_hub")
_MOST_TRIED = 4096

MEASURED = ("latency_s", "prefill_s", "decode_s", "serving_bytes")
"""Budgets of what is measured, or told by a table of measurements."""


def allocate(
    graph: Graph,
    saliency: "Mapping[str, Tensor]",
    *,
    macs: float | None = None,
    params: float | None = None,
    structures: float | None = None,
    memory_bytes: float | None = None,
    latency_s: float | None = None,
    prefill_s: float | None = None,
    decode_s: float | None = None,
    serving_bytes: float | None = None,
    threshold: float | None = None,
    groups: Mapping[str, float] | None = None,
    keep_at_least: float | Mapping[str, float] = 0.1,
    round_to: int = 1,
    uniform: bool = False,
    kinds: Kind | Iterable[Kind] | None = None,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    target: "str | Target | Iterable[str | Target] | None" = None,
    measure: Callable[[PruningPlan], float | Mapping[str, float]] | None = None,
) -> PruningPlan:
    """Removes the least salient structures of all groups until every budget holds, and no more.

    Ties between groups, ``round_to`` and floors are part of every candidate, so the plan found
    meets them and the
    budget together.

    Args:
        graph: What ``trace`` found.
        saliency: One value per structure for each group that may be cut; higher = keep. Groups
            that are not listed
            stay whole.
        macs: Share of the multiply-accumulates that is kept, in (0, 1].
        params: Share of the parameters that is kept.
        structures: Share of the structures (of the groups that may be cut) that is kept.
        memory_bytes: Share of the bytes of parameters and buffers that is kept.
        latency_s: Share of the dense model's latency that is kept; needs ``measure``.
        prefill_s: The same of a language model's pass over a prompt.
        decode_s: The same of its pass over one token more.
        serving_bytes: Share of the bytes of weights and of a cache of keys and values; needs
            ``measure``.
        threshold: Structures that score below it go, as far as floors and ties allow; with a
            budget, more go until it holds.
        groups: Share that each of some groups keeps of its own structures, whatever the others
            do: by name, with ``*`` for any text (``{"*.mlp.*": 0.5}``); 0 = nothing of it stays,
            such as the MLP of a layer. Alone, without a budget, all other groups stay whole.
        keep_at_least: Share of each group that always stays (at least one structure): guards
            against layer collapse. Also by name, ``{"*": 0.1, "layer4.*": 0.5}``; where several
            fit the largest holds, and 0.1 where none does.
        round_to: Kept counts are multiples of this, where the group is large enough.
        uniform: Groups of the same kind and size keep equally many, so that a plain config can say
            it.
        kinds: Kinds that may be cut; channels, heads, KV groups and neurons by default.
        only: Names of the groups that may be cut, with ``*`` for any text; None = all.
        exclude: Names of groups that stay whole.
        target: Where the model will be loaded, such as ``deci`` or ``gguf``: counts are only those
            that its reader takes. Several must all be met.
        measure: What a plan measures: ``latency_s`` alone, or a number for each of the four that
            are asked for, such as ``sosp_hub.latency.LatencyTable`` and ``ServingMemory`` tell.

    Returns:
        The plan; its provenance lists the budgets, the predicted cost and each group where a floor
        bit.

    Raises:
        BudgetError: No budget or one outside (0, 1], saliency that does not fit its group, nothing
            to cut, or a budget
            that the floors do not allow (says what they allow).

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> scores = sosp_hub.score(net, graph, [], criterion="magnitude")
        >>> plan = sosp_hub.allocate(graph, scores, structures=0.5)
        >>> plan.num_kept()
        {'0:neuron': 4}
    """
    budgets = {
        name: value
        for name, value in (
            ("macs", macs), ("params", params), ("structures", structures),
            ("memory_bytes", memory_bytes), ("latency_s", latency_s), ("prefill_s", prefill_s),
            ("decode_s", decode_s), ("serving_bytes", serving_bytes),
        )
        if value is not None
    }  # fmt: skip
    if not isinstance(graph, Graph) or not isinstance(saliency, Mapping):
        raise BudgetError(
            f"allocate got a {type(graph).__name__} and a {type(saliency).__name__}; expected "
            "allocate(graph, saliency, macs=...), with what trace(...) and score(...) return"
        )
    if not isinstance(groups, Mapping | None):
        raise BudgetError(
            f"groups: a {type(groups).__name__}; write a share for each name, such as "
            "groups={'*.mlp.*': 0.5}"
        )
    floors = keep_at_least if isinstance(keep_at_least, Mapping) else {"*": keep_at_least}
    _check(budgets, threshold, groups or {}, floors, round_to, measure)
    allowed = (kinds,) if isinstance(kinds, str) else tuple(kinds or DEFAULT_KINDS)
    chosen = selected(_eligible(graph, saliency, allowed), only, exclude)
    scores = {name: _scores(graph.groups[name], saliency[name]) for name in chosen}
    targets = as_targets(target, BudgetError)
    candidates = _Candidates(
        graph,
        scores,
        _floors(chosen, floors, graph),
        round_to,
        uniform or any(each.uniform for each in targets),
        _fixed(chosen, groups or {}),
        _admissible(graph, chosen, targets),
    )
    if not budgets and threshold is None:
        candidates.rest_stays = True
    meter = _Meter(graph, candidates, measure)
    dense = meter.of({name: graph.groups[name].size for name in chosen})

    def least_removals(candidates: _Candidates, meter: _Meter) -> int | None:
        """The least number of removals that holds every budget; None where even all do not."""

        def holds(removed: int) -> bool:
            found = meter.of(candidates.counts(removed))
            return all(found[name] <= share * dense[name] for name, share in budgets.items())

        if not holds(total):
            return None
        low, high = candidates.below(threshold), total  # cost falls with every removal
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        return low

    total = sum(len(values) for values in scores.values())
    if (removals := least_removals(candidates, meter)) is None:
        reach = meter.of(candidates.counts(total))
        limits_in_words = ", ".join(
            f"{name}={share} was asked, "
            f"{reach[name] / max(dense[name], 1e-30):.3f} is the least that can be reached"
            for name, share in budgets.items()
        )
        limits = [f"keep_at_least={keep_at_least}"]
        limits += [f"round_to={round_to}"] * (round_to > 1) + ["uniform: true"] * uniform
        limits += [f"target {each.name}" for each in targets]
        raise BudgetError(
            f"budget: {limits_in_words}, with {', '.join(limits)} over {len(chosen)} groups. "
            "Ask for more, loosen one of these, or allow more kinds of structure"
            + _without_scores(graph, saliency, allowed)
        )
    counts = candidates.counts(removals)
    found = meter.cost(counts)
    plan = candidates.plan(counts)
    cost = ""
    if targets and measure is None:
        free = replace(candidates, uniform=uniform, admissible={})
        free_meter = _Meter(graph, free, None)
        if (others := least_removals(free, free_meter)) is not None:
            freely = free.counts(others)
            cost = _cost_of_targets(
                targets,
                [
                    each / graph.num_params
                    for each in (found.params, free_meter.cost(freely).params)
                ],
                [each.removed_saliency(n) for each, n in ((candidates, counts), (free, freely))],
            )
            _LOG.info(cost)
    return PruningPlan(
        kept=plan.kept,
        sizes=plan.sizes,
        provenance={
            "budget": budgets | ({} if threshold is None else {"threshold": threshold}),
            **({"groups": dict(groups)} if groups else {}),
            "keep_at_least": dict(floors) if isinstance(keep_at_least, Mapping) else keep_at_least,
            "round_to": round_to,
            "uniform": uniform,
            **({"target": [each.model_dump(mode="json") for each in targets]} if targets else {}),
            **({"target_cost": cost} if cost else {}),
            "floors": candidates.floors(removals),
            "predicted": {
                "macs": found.macs,
                "params": found.params,
                "bytes": found.bytes,
                "of_one": graph.sized.sample,
            },
        },
    )


def _cost_of_targets(
    targets: Iterable[Target], params: Sequence[float], removed: Sequence[float]
) -> str:
    """What a plan gives up against one that no target limits, in one line.

    Args:
        targets: Which.
        params: Share of the parameters that each of both plans keeps.
        removed: Saliency that each takes out.
    """
    line = (
        f"target {', '.join(each.name for each in targets)}: keeps {params[0]:.1%} of the "
        f"parameters, a free plan {params[1]:.1%}"
    )
    more = removed[0] / removed[1] if min(removed) > 0 else 1.0
    return f"{line}, and takes out {more:.2f} times as much saliency"


def _admissible(
    graph: Graph, names: Collection[str], targets: Iterable[Target]
) -> dict[str, frozenset[int]]:
    """The counts besides its size that all targets allow a group, where one of them limits it."""
    admissible: dict[str, frozenset[int]] = {}
    groups = [graph.groups[name] for name in names]
    for name in names:
        for target in targets:
            counts = target.counts(graph.groups[name], groups)
            if counts is not None:
                admissible[name] = admissible.get(name, frozenset(counts)) & frozenset(counts)
    return admissible


def _check(
    budgets: Mapping[str, float],
    threshold: float | None,
    groups: Mapping[str, float],
    floors: Mapping[str, float],
    round_to: int,
    measure: Callable[[PruningPlan], float | Mapping[str, float]] | None,
) -> None:
    if not budgets and threshold is None and not groups:
        raise BudgetError(
            "budget: give at least one of macs, params, structures, memory_bytes, latency_s, "
            "threshold, groups"
        )
    if threshold is not None and not (isinstance(threshold, Real) and isfinite(threshold)):
        raise BudgetError(f"budget: threshold is a score, a finite number; got {threshold!r}")
    free = [(f"groups: {pattern!r}", share) for pattern, share in groups.items()]
    free += [("keep_at_least", share) for share in floors.values()]
    for name, value in [*budgets.items(), *free]:
        number = isinstance(value, Real) and not isinstance(value, bool)
        least = number and (value > 0 if name in budgets else value >= 0)
        if not (least and value <= 1):
            span = "in (0, 1]" if name in budgets else "from 0 to 1"
            raise BudgetError(f"budget: {name} is the share that is kept, {span}; got {value!r}")
    if not isinstance(round_to, Integral) or round_to < 1:
        raise BudgetError(f"budget: round_to must be a whole number of at least 1, got {round_to}")
    if measure is None and (name := next((n for n in MEASURED if n in budgets), None)):
        raise BudgetError(
            f"budget: {name} is measured; give measure=, a function from a plan to its value, such "
            "as sosp_hub.latency.LatencyTable(model, graph, inputs)"
        )


def matching(names: Collection[str], pattern: str, key: str) -> list[str]:
    """The groups whose name fits a pattern, with ``*`` for any text.

    Raises:
        BudgetError: There is none; says which there are.
    """
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        near = difflib.get_close_matches(pattern, list(names), n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        more = f" and {len(names) - 20} others" if len(names) > 20 else ""
        raise BudgetError(
            f"{key}: {pattern!r} is no group that may be cut{guess}; there are "
            f"{', '.join(list(names)[:20])}{more}"
        )
    return matches


def _patterns(given: Any, key: str) -> list[str]:
    if isinstance(given, str):
        return [given]
    listed: list[Any] = list(given or ()) if isinstance(given, Iterable | None) else [given]
    if strange := [each for each in listed if not isinstance(each, str)]:
        raise BudgetError(
            f"{key}: {strange[0]!r} is no name of a group; write names, or patterns such as "
            f"{key}=['*.mlp.*']"
        )
    return listed


def selected(
    names: Collection[str], only: str | Iterable[str] | None, exclude: str | Iterable[str]
) -> list[str]:
    """The groups that are named, without those that are excluded, in their order.

    Raises:
        BudgetError: A name that is no group's, or nothing is left.
    """
    patterns = [_patterns(only, "only"), _patterns(exclude, "exclude")]
    selection = list(names)
    if only is not None:
        named = {name for pattern in patterns[0] for name in matching(names, pattern, "only")}
        selection = [name for name in names if name in named]
    gone = {name for pattern in patterns[1] for name in matching(names, pattern, "exclude")}
    selection = [name for name in selection if name not in gone]
    if not selection:
        raise BudgetError(
            f"{'exclude' if exclude else 'only'}: nothing to cut: "
            f"{patterns[1] if exclude else patterns[0]} leaves none of "
            f"{len(names)} groups: {shortened(', '.join(names), 300)}"
        )
    return selection


def _fixed(names: Collection[str], groups: Mapping[str, float]) -> dict[str, float]:
    """The share of its own that a group keeps, where it is named."""
    fixed: dict[str, tuple[str, float]] = {}
    for pattern, share in groups.items():
        for name in matching(names, pattern, "budget.groups"):
            other, earlier = fixed.setdefault(name, (pattern, share))
            if earlier != share:
                raise BudgetError(
                    f"budget.groups: {name!r} is to keep {earlier} ({other!r}) and {share} "
                    f"({pattern!r}); name it once"
                )
    return {name: share for name, (_, share) in fixed.items()}


def _floors(names: Collection[str], shares: Mapping[str, float], graph: Graph) -> dict[str, float]:
    """The least share that each group keeps of what it has now."""
    floors: dict[str, float] = {}
    for pattern, share in shares.items():
        for name in matching(names, pattern, "budget.keep_at_least"):
            floors[name] = max(floors.get(name, 0.0), share)

    def of_the_rest(name: str) -> float:
        size = graph.groups[name].size
        return min(1.0, floors.get(name, _FLOOR) * graph.uncut_sizes.get(name, size) / size)

    return {name: of_the_rest(name) for name in names}


_FLOOR = 0.1  # where a mapping of floors leaves a group out


def _eligible(graph: Graph, saliency: "Mapping[str, Tensor]", kinds: tuple[Kind, ...]) -> list[str]:
    strange = [name for name in saliency if name not in graph.groups]
    if strange:
        raise BudgetError(
            f"saliency: this model has no group {strange[0]!r}; "
            f"it has {', '.join(list(graph.groups)[:5])}"
        )
    chosen = [
        name
        for name, group in graph.groups.items()
        if name in saliency and group.kind in kinds and name not in graph.unproved
    ]
    if not chosen:
        present = sorted({group.kind for group in graph.groups.values()})
        raise BudgetError(
            f"budget: nothing to cut: kinds {', '.join(kinds)} were allowed, the model has "
            f"{', '.join(present) or 'no groups at all'}"
        )
    return chosen


def _without_scores(graph: Graph, saliency: "Mapping[str, Tensor]", kinds: tuple[Kind, ...]) -> str:
    """What keeps groups of these kinds whole that a budget could have cut."""
    unscored = graph.groups.keys() - saliency.keys() - graph.unproved.keys()
    names = [name for name in graph.groups if name in unscored and graph.groups[name].kind in kinds]
    if not names:
        return ""
    return (
        f". {len(names)} more of these kinds have no score, as they were left out or the criterion "
        f"does not score them (another may): {shortened(', '.join(names), 300)}"
    )


def _scores(group: Group, values: "Tensor") -> NDArray[np.float64]:
    is_tensor = hasattr(values, "detach")
    if is_tensor and values.is_complex():
        raise BudgetError(f"saliency: group {group.name!r} has complex values; expected scores")
    if is_tensor and values.is_meta:
        raise BudgetError(f"saliency: group {group.name!r} has no values (meta device); score it")
    if str(values.dtype if is_tensor else np.asarray(values).dtype).endswith("bool"):
        raise BudgetError(
            f"saliency: group {group.name!r} has true and false; expected one number for each "
            "structure, higher = keep (for a choice of your own: PruningPlan(kept=..., sizes=...))"
        )
    given = values.detach().cpu().double() if is_tensor else values
    scores = np.asarray(given, dtype=np.float64)
    if scores.shape != (group.size,):
        raise BudgetError(
            f"saliency: group {group.name!r} has {group.size} structures, "
            f"got values of shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise BudgetError(
            f"saliency: group {group.name!r} has values that are not finite; score it again"
        )
    return scores


@dataclass
class _Candidates:
    """Plans by number of removals asked for, least salient structures first."""

    graph: Graph
    scores: dict[str, NDArray[np.float64]]
    keep_at_least: Mapping[str, float]
    round_to: int
    uniform: bool
    fixed: Mapping[str, float]
    admissible: Mapping[str, frozenset[int]]
    rest_stays: bool = False

    def __post_init__(self) -> None:
        names = list(self.scores)
        owner = np.concatenate([np.full(len(self.scores[name]), i) for i, name in enumerate(names)])
        values = np.concatenate([self.scores[name] for name in names])
        self._owner = owner[np.argsort(values, kind="stable")]
        self._names = names
        self._sets = self._tied()

    def _tied(self) -> list[list[str]]:
        """Groups that keep equally many; one that may not be cut holds its partners whole."""
        sets = {name: [name] for name in self._names}
        alike: dict[tuple[object, ...], list[str]] = {}
        for name in self._names if self.uniform else ():
            group = self.graph.groups[name]
            alike.setdefault((group.kind, group.size), []).append(name)
        for names in (*self.graph.ties, *alike.values()):
            inside = [name for name in names if name in sets]
            for name in inside[1:]:
                if sets[name] is not sets[inside[0]]:
                    sets[inside[0]] += sets[name]
                    sets.update(dict.fromkeys(sets[name], sets[inside[0]]))
        return list({id(names): names for names in sets.values()}.values())

    def _frozen(self, names: list[str]) -> bool:
        tied = {other for tie in self.graph.ties if set(tie) & set(names) for other in tie}
        return bool(tied - set(self._names))

    def counts(self, removed: int) -> dict[str, int]:
        """Kept structures of each group."""
        lost = np.bincount(self._owner[:removed], minlength=len(self._names))
        raw = {name: len(self.scores[name]) - int(lost[i]) for i, name in enumerate(self._names)}
        result: dict[str, int] = {}
        for names in self._sets:
            size = len(self.scores[names[0]])
            fixed = [self.fixed[name] for name in names if name in self.fixed]
            if self._frozen(names) or (self.rest_stays and not fixed):
                count = size
            elif fixed and max(fixed) == 0:
                result.update(dict.fromkeys(names, 0))
                continue
            elif fixed:
                count = ceil(max(fixed) * size - 1e-9)
            else:
                count = ceil(sum(raw[name] for name in names) / len(names))
            count = max(count, self._floor(names, size))
            result.update(dict.fromkeys(names, next(self._numbers(names, count))))
        return self._plain(result)

    def _numbers(self, names: list[str], least: int) -> Iterator[int]:
        """What groups that keep equally many may keep, from ``least`` on."""
        size = len(self.scores[names[0]])
        step = lcm(self.round_to, *(self.graph.groups[name].multiple for name in names))
        barred = {n for name in names for n in self.graph.groups[name].barred}
        allowed = [self.admissible[name] for name in names if name in self.admissible]
        for n in range(ceil(least / step) * step, size, step):
            if n not in barred and all(n in counts for counts in allowed):
                yield n
        yield size

    def _plain(self, counts: dict[str, int]) -> dict[str, int]:
        """The next numbers that the model's configs take too, where plain ones are to say them.

        Unchanged where there are none.
        """
        for plain in self.graph.plain if self.uniform else ():
            counts = self._admitted(plain, counts)
        return counts

    def _admitted(self, plain: PlainSizes, counts: dict[str, int]) -> dict[str, int]:
        if plain.admits(counts):
            return counts
        order = ("residual", "kv_group", "head")
        sets = {kind: [] for kind in order}
        for names in self._sets:
            if kind := next((plain.kinds[name] for name in names if name in plain.kinds), None):
                sets[kind].append(names)
        free = [names for kind in order for names in sets[kind]]
        choices = (self._numbers(names, counts[names[0]]) for names in free)
        for chosen in islice(product(*choices), _MOST_TRIED):
            tried = {**counts}
            for names, count in zip(free, chosen, strict=True):
                tried.update(dict.fromkeys(names, count))
            if plain.admits(tried):
                return tried
        return counts

    def _floor(self, names: list[str], size: int) -> int:
        return max(1, ceil(max(self.keep_at_least[name] for name in names) * size - 1e-9))

    def below(self, threshold: float | None) -> int:
        """How many structures score less."""
        if threshold is None:
            return 0
        return sum(int((values < threshold).sum()) for values in self.scores.values())

    def floors(self, removed: int) -> dict[str, dict[str, int]]:
        """Groups that would have lost more without a floor, a tie or rounding."""
        lost = np.bincount(self._owner[:removed], minlength=len(self._names))
        counts = self.counts(removed)
        wanted = {name: len(self.scores[name]) - int(lost[i]) for i, name in enumerate(self._names)}
        for name in self._names if self.rest_stays else self.fixed:
            size = len(self.scores[name])
            wanted[name] = ceil(self.fixed.get(name, 1.0) * size - 1e-9)
        return {
            n: {"wanted": wanted[n], "kept": counts[n]}
            for n in self._names
            if counts[n] > wanted[n]
        }

    def removed_saliency(self, counts: Mapping[str, int]) -> float:
        """What goes, in the unit of the scores."""
        return sum(
            float(np.sort(scores)[: len(scores) - counts[name]].sum())
            for name, scores in self.scores.items()
        )

    def plan(self, counts: Mapping[str, int]) -> PruningPlan:
        """The most salient structures of each group; groups that lose nothing are left out."""
        kept: dict[str, tuple[int, ...]] = {}
        for name, count in counts.items():
            scores = self.scores[name]
            if count < len(scores):
                best = np.argsort(-scores, kind="stable")[:count]
                kept[name] = tuple(int(i) for i in np.sort(best))
        return PruningPlan(kept, {name: len(self.scores[name]) for name in kept})


class _Meter:
    """Every budgeted quantity of a candidate."""

    def __init__(
        self,
        graph: Graph,
        candidates: _Candidates,
        measure: Callable[[PruningPlan], float | Mapping[str, float]] | None,
    ) -> None:
        self.cost_model = CostModel(graph)
        self.candidates = candidates
        self.measure = measure
        self.deep = any(graph.groups[name].layers for name in candidates.scores)

    def cost(self, counts: Mapping[str, int]) -> Cost:
        return self.cost_model(counts, self.candidates.plan(counts).kept if self.deep else None)

    def of(self, counts: Mapping[str, int]) -> dict[str, float]:
        cost = self.cost(counts)
        measured = {} if self.measure is None else self.measure(self.candidates.plan(counts))
        measured = measured if isinstance(measured, Mapping) else {"latency_s": measured}
        return {
            "macs": cost.macs,
            "params": cost.params,
            "structures": sum(counts.values()),
            "memory_bytes": cost.bytes,
            **measured,
        }
