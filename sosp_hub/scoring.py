"""``score``: what a criterion says of each structure."""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from sosp_hub.compat.accelerate import check_weights
from sosp_hub.compat.torch import packed_weight, unwrapped
from sosp_hub.cost import Quantity, unit_costs
from sosp_hub.criteria.compute.context import Context
from sosp_hub.derivatives import GaussNewton
from sosp_hub.errors import CriterionError
from sosp_hub.gates import has_gate
from sosp_hub.modes import as_the_caller, in_own_modes, without_autocast
from sosp_hub.recipe.criteria import CRITERIA, Criterion, GateCriterion
from sosp_hub.recipe.faults import explain
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group, Groups
from sosp_hub.structure.isolation import isolated
from sosp_hub.summary import Summarised, Summary, alike
from sosp_hub.tasks.batches import as_batch, check_batches, has_targets
from sosp_hub.tasks.own_outputs import OwnOutputs
from sosp_hub.types import DEFAULT_KINDS, GateKind, Kind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency

logger = logging.getLogger("sosp_hub")


class Scores(Summarised, dict[str, Tensor]):
    """A score for each structure of each group; a dictionary that prints as a table."""

    def summary(self) -> Summary:
        """A row for the groups that are alike: their least, middle and greatest score."""
        rows = []
        for pattern, names in alike(self).items():
            scores = torch.cat([self[name].flatten().double() for name in names])
            numbers = (scores.min(), scores.median(), scores.max())
            rows.append((pattern, len(names), scores.numel(), *(f"{n:.3g}" for n in numbers)))
        head = ("group", "groups", "structures", "least", "median", "greatest")
        total = sum(scores.numel() for scores in self.values())
        return Summary((f"{total:,} scores; higher = keep",), head, rows)

    __repr__ = Summarised.__str__


class HasGroups(Protocol):
    """What scoring asks of a graph."""

    @property
    def groups(self) -> Mapping[str, Group]:
        """Groups by name."""
        ...


def make_criterion(name: str, **options: Any) -> Criterion:
    """The criterion with these options.

    Raises:
        CriterionError: An unknown name or option; names the nearest known one.
    """
    model = CRITERIA.require(name, CriterionError)
    known = model.option_names()
    for option in options:
        if option not in known:
            raise CriterionError(
                f"criterion {name!r} has no option {option!r}{_nearest(option, known)}; "
                f"its options are {', '.join(sorted(known)) or 'none'}"
            )
    try:
        return model(**options)
    except ValidationError as error:
        faults = "; ".join(explain(error, model))
        raise CriterionError(f"criterion {name!r}: {faults}") from None


@in_own_modes
def score(
    model: nn.Module,
    graph: HasGroups,
    batches: "Batches",
    criterion: str | Criterion = "sosp_h",
    *,
    loss_fn: "LossFn | None" = None,
    kinds: tuple[str, ...] | list[str] | None = None,
    seed: int = 0,
    process_sum: Callable[[Tensor], Tensor] | None = None,
    process_rows: Callable[[Tensor], Tensor] | None = None,
    per: Quantity | None = None,
    curvature: GaussNewton | None = None,
    **options: Any,
) -> "Saliency":
    """How much each structure matters.

    Args:
        model: The model; it comes back exactly as it was.
        graph: What ``trace`` found in it.
        batches: Calibration data, ``(inputs, labels)`` or dicts; ``[]`` where none is needed.
        criterion: Name of the criterion, or the criterion itself.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy, and for
            dicts of inputs alone the divergence from the model's own outputs (`OwnOutputs`).
        kinds: Kinds of structures to score; None = channels, heads, KV groups and neurons, or
            layers where the criterion scores those alone.
        seed: Of everything random.
        process_sum: Sum of a tensor over all processes, where each has its own batches.
        process_rows: Rows of all processes, where there are so few that they are exchanged.
        per: What matters is then divided by what a structure costs, in units of the mean structure
            (`sosp_hub.cost.unit_costs`), so that a budget of this quantity is met at the least
            loss. An order of removal takes the least loss per unit first.
        curvature: What was measured for these groups (`CurvatureMeasure`), for a criterion that
            uses it; no data is needed then.
        **options: Options of the criterion.

    Returns:
        One CPU tensor per group that the criterion can score; higher = keep.

    Raises:
        CriterionError: An unknown criterion or option, data that cannot be scored with, or a group
            that the criterion cannot score.

    Example:
        >>> import sosp_hub, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sosp_hub.trace(net, (torch.randn(1, 4),))
        >>> batches = [(torch.randn(16, 4), torch.randint(0, 2, (16,))) for _ in range(4)]
        >>> scores = sosp_hub.score(net, graph, batches, criterion="fisher")
        >>> scores["0:neuron"].shape
        torch.Size([8])
    """
    if not isinstance(model, nn.Module) or not hasattr(graph, "groups"):
        raise CriterionError(
            f"score got a {type(model).__name__} and a {type(graph).__name__}; expected "
            "score(model, graph, batches), with what trace(model, ...) returns as the graph"
        )
    model = unwrapped(model)
    if isinstance(criterion, str):
        method = make_criterion(criterion, **options)
    elif options:
        raise CriterionError(
            f"score got a {type(criterion).__name__} and the options {', '.join(options)}; set "
            "them when it is made, or give its name"
        )
    elif isinstance(criterion, Criterion):
        method = criterion
    else:
        raise CriterionError(
            f"score got a {type(criterion).__name__} as criterion; expected a name, such as "
            "'sosp_h', or a criterion that was made, such as make_criterion('fisher')"
        )
    check_per(method, per)
    _check_model(model, graph)
    if method.needs != "nothing" and curvature is None:
        check_weights(model, "score")
    check_batches(batches, "score", CriterionError)
    kind = type(batches).__name__
    if method.needs == "labels" and curvature is None:
        batches, loss_fn = _own_outputs_where_alone(batches, loss_fn)
    check_loss(method, loss_fn)
    chosen = _of_kinds(graph, type(method), kinds)
    groups = _able(type(method), chosen)
    if whole := [name for name in chosen if name not in groups]:
        logger.info(
            "criterion %r scores only groups that are %s; %d of %d stay whole: %s",
            *(method.name, method.scores_only, len(whole), len(chosen), _shown(whole)),
        )
    if isinstance(method, GateCriterion):
        groups = _with_gates(model, groups, method.name, method.gate)
    units = _units(graph, groups, per)
    context = Context(
        model=model,
        groups=groups,
        batches=_copies(as_the_caller(batches), kind),
        loss_fn=loss_fn,
        seed=seed,
        process_sum=process_sum,
        process_rows=process_rows,
        curvature=curvature,
        units=units if method.uses_units else None,
    )
    with isolated(model), without_autocast(model):
        scores = method.saliency(context)
    if context.unused:
        logger.info(
            "criterion %r: the loss does not depend on %d of %d groups, which stay whole: %s",
            *(method.name, len(context.unused), len(groups), _shown(context.unused)),
        )
        groups = {name: group for name, group in groups.items() if name not in context.unused}
    saliency = _checked(scores, groups, method)
    if units is not None and not method.uses_units:
        saliency = {name: one / units[name].to(one.dtype) for name, one in saliency.items()}
    return Scores(saliency)


def _check_model(model: nn.Module, graph: HasGroups) -> None:
    """Refuses a graph of another model; quantised weights have shapes of their own."""
    traced = {} if packed_weight(model) else getattr(graph, "tensors", {})
    for name, tensor in model.named_parameters():
        expected = [size_of(axis) for axis in traced.get(name, ())]
        whole = tensor.is_floating_point() or tensor.is_complex()  # else packed, and told later
        if name in traced and whole and list(tensor.shape) != expected:
            raise CriterionError(
                f"score: this is not the model that was traced: {name!r} has "
                f"{list(tensor.shape)}, expected {expected}; trace it again"
            )


def _shown(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:4]) + ", ..." * (len(first) > 4)


def _copies(batches: "Batches", kind: str) -> "Batches":
    """Batches that a model may write to; an iterator (of this kind) still passes them once."""
    if isinstance(batches, Iterator):
        return _CopiesOnce(batches, kind)
    return _Copies(batches)


@dataclass(frozen=True)
class _CopiesOnce(Iterator[Any]):
    batches: Iterator[Any]
    given: str

    def __next__(self) -> Any:
        return as_batch(copy_inputs(next(self.batches)))


@dataclass(frozen=True)
class _Copies:
    batches: "Batches"

    def __iter__(self) -> Iterator[Any]:
        return (as_batch(copy_inputs(batch)) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def check_per(criterion: Criterion, per: str | None) -> None:
    """Refuses to divide scores that are no amounts, or by what is no cost.

    Raises:
        CriterionError: Says what to write instead.
    """
    if per is None:
        return
    if per not in get_args(Quantity):
        raise CriterionError(f"per={per!r}, expected one of {', '.join(get_args(Quantity))}")
    if reason := criterion.no_amounts():
        why, instead = reason
        raise CriterionError(
            f"criterion {criterion.name!r}: per={per} divides scores by what a structure costs, "
            f"and {why}; {instead}"
        )


def check_loss(criterion: Criterion, loss_fn: "LossFn | None") -> None:
    """Refuses to rank by a gradient that is zero.

    Raises:
        CriterionError: Says which criteria rank all the same.
    """
    if getattr(loss_fn, "at_minimum", False) and criterion.first_order:
        raise CriterionError(
            f"criterion {criterion.name!r} ranks by the gradient, which is zero where a model is "
            f"compared with its own outputs; use sosp_h, sosp_i or hap, or a loss with labels"
        )


def _own_outputs_where_alone(
    batches: "Batches", loss_fn: "LossFn | None"
) -> "tuple[Batches, LossFn | None]":
    """The comparison with the model's own outputs, where batches are dicts of inputs alone."""
    if loss_fn is not None:
        return batches, loss_fn
    if isinstance(batches, Iterator):
        first = next(batches, None)
        batches = batches if first is None else chain([first], batches)
    elif isinstance(batches, Sequence):  # a pass of its own would be shown as one
        first = batches[0] if batches else None
    else:
        first = next(iter(batches), None)
    first = as_batch(first)
    if isinstance(first, Mapping):
        inputs = None if has_targets(first) else ", ".join(map(str, first))
    else:
        alone = isinstance(first, tuple | list) and len(first) == 2 and first[1] is None
        inputs = "a tensor" if alone else None
    if inputs is None:
        return batches, None
    logger.info(
        "the batches have inputs but no labels (%s): the loss is the divergence from the model's "
        "own outputs (sosp_hub.tasks.OwnOutputs)",
        inputs,
    )
    return batches, OwnOutputs(None)


def _units(graph: HasGroups, groups: Groups, per: Quantity | None) -> "Saliency | None":
    if per is None:
        return None
    if not isinstance(graph, Graph):
        raise CriterionError(f"per={per}: costs need what trace(...) returns as the graph")
    costs = unit_costs(replace(graph, groups=dict(groups)), per)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in costs.items()}


def scorable_groups(
    graph: HasGroups,
    criterion: type[Criterion],
    kinds: tuple[str, ...] | list[str] | None = None,
) -> Groups:
    """The groups that ``score`` gives a score with these kinds.

    Raises:
        CriterionError: An unknown kind, none of the kinds, or one that the criterion cannot score.
    """
    return _able(criterion, _of_kinds(graph, criterion, kinds))


def _of_kinds(
    graph: HasGroups, criterion: type[Criterion], kinds: tuple[str, ...] | list[str] | None
) -> Groups:
    scorable = criterion.kinds
    if isinstance(kinds, str):
        raise CriterionError(f"kinds={kinds!r}: write a list of kinds, such as [{kinds!r}]")
    for kind in kinds or ():
        if kind not in get_args(Kind):
            raise CriterionError(
                f"unknown kind {kind!r}{_nearest(str(kind), get_args(Kind))}; "
                f"there are {', '.join(get_args(Kind))}"
            )
    if kinds is None:
        kinds = DEFAULT_KINDS if set(DEFAULT_KINDS) <= set(scorable) else scorable
    chosen = {name: group for name, group in graph.groups.items() if group.kind in kinds}
    if not chosen:
        present = sorted({group.kind for group in graph.groups.values()})
        raise CriterionError(
            f"nothing to score: the graph has no group of the kinds {', '.join(kinds)}; "
            f"it has {', '.join(present) or 'no groups'}"
        )
    if wrong := {group.kind for group in chosen.values()} - set(scorable):
        raise CriterionError(
            f"criterion {criterion.key()!r} cannot score the kinds {', '.join(sorted(wrong))}; it "
            f"scores {', '.join(scorable)}. Name other kinds, or use {_others(wrong)}"
        )
    return chosen


def _with_gates(model: nn.Module, groups: Groups, criterion: str, gate: GateKind) -> Groups:
    """The groups that a gate can stand for; the others stay whole."""
    gated = {name: group for name, group in groups.items() if has_gate(model, group, gate)}
    rest = [name for name in groups if name not in gated]
    if rest and gated:
        shown = ", ".join(rest[:4]) + ", ..." * (len(rest) > 4)
        where = {
            "activation": "activations where weights read them; %d of %d groups are read otherwise",
            "weight": "the filters that make what is cut; %d of %d groups have none",
        }
        logger.info(
            f"criterion %r gates {where[gate]} and stay whole: %s",
            *(criterion, len(rest), len(groups), shown),
        )
    return gated or groups  # none at all: the gates say so


def _able(criterion: type[Criterion], groups: Groups) -> Groups:
    able = {name: group for name, group in groups.items() if criterion.can_score(group)}
    if not able:
        kinds = {group.kind for group in groups.values()}
        raise CriterionError(
            f"criterion {criterion.key()!r} scores only groups that are {criterion.scores_only}, "
            f"and none of the {len(groups)} of this model ({', '.join(sorted(kinds))}) is; use "
            f"{_others(kinds)}"
        )
    return able


def _others(kinds: Iterable[str]) -> str:
    """Criteria that score every group of these kinds."""
    return " or ".join(
        name
        for name, criterion in CRITERIA.known().items()
        if set(kinds) <= set(criterion.kinds) and not criterion.scores_only
    )


def _checked(saliency: "Saliency", groups: Groups, criterion: Criterion) -> "Saliency":
    named = f"criterion {criterion.name!r}"
    result = {name: saliency[name].detach().cpu() for name in groups}
    for name, group in groups.items():
        assert result[name].shape == (group.size,), f"{name}: {result[name].shape}"
        if not result[name].isfinite().all():
            raise CriterionError(
                f"{named}: the scores of group {name!r} are not finite; look at the weights and "
                "the data, or score in float32"
            )
    if criterion.needs != "nothing" and not any(scores.any() for scores in result.values()):
        raise CriterionError(
            f"{named}: all scores are 0, which ranks nothing: the activations are 0, or the loss "
            "does not change with them. Look at the data, the weights and the loss"
        )
    return result


def _nearest(given: str, known: Any) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
