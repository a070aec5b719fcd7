"""Criteria by name, and ``score``."""

import difflib
import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn

import sosp_hub.criteria
from sosp_hub.cost import Quantity, unit_costs
from sosp_hub.errors import CriterionError
from sosp_hub.gates import GateKind, has_gate
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group, Groups
from sosp_hub.structure.isolation import isolated
from sosp_hub.types import DEFAULT_KINDS, Kind

if TYPE_CHECKING:
    from sosp_hub.types import Batches, LossFn, Saliency

logger = logging.getLogger("sosp_hub")

WIDTH_KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "layer")
Needs = Literal["nothing", "inputs", "labels"]


class HasGroups(Protocol):
    """What a criterion asks of a graph."""

    @property
    def groups(self) -> Mapping[str, Group]:
        """Groups by name."""
        ...


class Criterion(Protocol):
    """A way to score structures. A dataclass whose fields are its options; its file has its name.

    The fields ``loss_fn``, ``seed``, ``process_sum`` and ``units``, where a criterion has them, are
    filled by ``score``. A class attribute ``kinds`` lists the kinds of structures that it can
    score; without it they are all but whole layers. Where it cannot score every group of these, a
    static method ``able(group)`` tells which, and ``scores_only`` says it in words; the others have
    no score. A class attribute ``signed`` says that scores may be negative,
    ``first_order`` that they are made of the gradient alone, which is 0 at a minimum of the loss.

    Attributes:
        name: Name in recipes and in ``score``.
        paper: Where it comes from.
        needs: What it needs of the calibration data.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[Needs]

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One number per structure of each group; higher = keep."""
        ...


C = TypeVar("C", bound=type[Criterion])
_CRITERIA: dict[str, type[Criterion]] = {}


def register(criterion: C) -> C:
    """Makes a criterion known; a decorator of its class.

    Raises:
        ValueError: A name that is taken.
    """
    known = _CRITERIA.get(criterion.name)
    if known is not None and known.__qualname__ != criterion.__qualname__:
        raise ValueError(f"two criteria are called {criterion.name!r}")
    _CRITERIA[criterion.name] = criterion
    return criterion


def criteria() -> dict[str, type[Criterion]]:
    """All criteria by name."""
    for module in pkgutil.iter_modules(sosp_hub.criteria.__path__):
        importlib.import_module(f"sosp_hub.criteria.{module.name}")
    return dict(sorted(_CRITERIA.items()))


def make_criterion(name: str, **options: Any) -> Criterion:
    """The criterion with these options.

    Raises:
        CriterionError: An unknown name or option; names the nearest known one.
    """
    known = criteria()
    if name not in known:
        raise CriterionError(
            f"unknown criterion {name!r}{_nearest(name, known)}; there are {', '.join(known)}"
        )
    kinds = {field.name: field.type for field in fields(known[name])}  # pyright: ignore[reportArgumentType]
    for option, value in options.items():
        if option not in kinds:
            shown = sorted(kinds.keys() - _COMMON) or ["none"]
            raise CriterionError(
                f"criterion {name!r} has no option {option!r}{_nearest(option, shown)}; "
                f"its options are {', '.join(shown)}"
            )
        _check_option(name, option, value, kinds[option])
    return known[name](**options)


_COMMON = {"loss_fn", "seed", "process_sum", "process_rows", "curvature", "units"}


def _check_option(name: str, option: str, value: Any, kind: Any) -> None:
    choices = get_args(kind) if get_origin(kind) is Literal else None
    if choices is not None and value not in choices:
        expected = "one of " + ", ".join(map(str, choices))
    elif kind in (int, int | None) and type(value) is int and value < 1 and option != "seed":
        expected = "at least 1"
    else:
        return
    raise CriterionError(f"criterion {name!r}: {option}={value!r}, expected {expected}")


def scorable_kinds(criterion: str) -> tuple[Kind, ...]:
    """The kinds of structures that a criterion can score."""
    return getattr(criteria()[criterion], "kinds", WIDTH_KINDS)


def score(
    model: nn.Module,
    graph: HasGroups,
    batches: "Batches",
    criterion: str = "sosp_h",
    *,
    loss_fn: "LossFn | None" = None,
    kinds: tuple[str, ...] | list[str] | None = None,
    seed: int = 0,
    process_sum: Callable[[Tensor], Tensor] | None = None,
    per: Quantity | None = None,
    **options: Any,
) -> "Saliency":
    """How much each structure matters.

    Args:
        model: The model; it comes back exactly as it was.
        graph: What ``trace`` found in it.
        batches: Calibration data, ``(inputs, labels)`` or dicts; ``[]`` where none is needed.
        criterion: Name of the criterion.
        loss_fn: Loss of (outputs, targets); None = the model's own, or cross-entropy.
        kinds: Kinds of structures to score; None = channels, heads, KV groups and neurons, or
            layers where the criterion scores those alone.
        seed: Of everything random.
        process_sum: Sum of a tensor over all processes, where each has its own batches.
        per: What matters is then divided by what a structure costs, in units of the mean structure
            (`sosp_hub.cost.unit_costs`), so that a budget of this quantity is met at the least
            loss. An order of removal takes the least loss per unit first.
        **options: Options of the criterion.

    Returns:
        One CPU tensor per group that the criterion can score; higher = keep.

    Raises:
        CriterionError: An unknown criterion or option, data that cannot be scored with, or a group
            that the criterion cannot score.
    """
    if not isinstance(model, nn.Module) or not hasattr(graph, "groups"):
        raise CriterionError(
            f"score got a {type(model).__name__} and a {type(graph).__name__}; expected "
            "score(model, graph, batches), with what trace(model, ...) returns as the graph"
        )
    known = criteria().get(criterion)
    common = {"loss_fn": loss_fn, "seed": seed, "process_sum": process_sum}
    has = {field.name for field in fields(known)} if known else set()  # pyright: ignore[reportArgumentType]
    wanted = {name: value for name, value in common.items() if name in has}
    method = make_criterion(criterion, **wanted, **options)
    check_per(criterion, per, options)
    if getattr(loss_fn, "at_minimum", False) and getattr(method, "first_order", False):
        raise CriterionError(
            f"criterion {criterion!r} ranks by the gradient, which is zero where a model is "
            "compared with its own outputs; use sosp_h, sosp_i or hap, or a loss with labels"
        )
    groups = scorable_groups(graph, criterion, kinds)
    if gate := getattr(method, "gate", None):
        groups = _with_gates(model, groups, criterion, gate)
    units = _units(graph, groups, per)
    if "units" in has:
        method = make_criterion(criterion, **wanted, **options, units=units)
    with isolated(model):
        found = method.saliency(model, _Groups(groups), _copies(batches))
    saliency = _checked(found, groups, criterion)
    if units is None or "units" in has:
        return saliency
    return {name: scores / units[name].to(scores.dtype) for name, scores in saliency.items()}


def _copies(batches: "Batches") -> "Batches":
    """Batches that a model may write to; an iterator still goes through them once."""
    if isinstance(batches, Iterator):
        return map(copy_inputs, batches)
    return _Copies(batches)


@dataclass(frozen=True)
class _Copies:
    batches: "Batches"

    def __iter__(self) -> Iterator[Any]:
        return map(copy_inputs, self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def check_per(criterion: str, per: str | None, options: Mapping[str, Any]) -> None:
    """Refuses to divide scores that are no amounts, or by what is no cost.

    Raises:
        CriterionError: Says what to write instead.
    """
    if per is None:
        return
    if per not in get_args(Quantity):
        raise CriterionError(f"per={per!r}, expected one of {', '.join(get_args(Quantity))}")
    method = make_criterion(criterion, **options)
    divides = f"criterion {criterion!r}: per={per} divides scores by what a structure costs, and"
    if getattr(method, "standardize", False):
        raise CriterionError(
            f"{divides} standardised ones count from their mean; write standardize: false, or "
            "leave out per"
        )
    if getattr(method, "signed", False):
        raise CriterionError(
            f"{divides} these have a sign; leave out per, or use a criterion of amounts, such as "
            "taylor, fisher, sosp_h or sosp_i"
        )


def _units(graph: HasGroups, groups: Groups, per: Quantity | None) -> "Saliency | None":
    if per is None:
        return None
    if not isinstance(graph, Graph):
        raise CriterionError(f"per={per}: costs need what trace(...) returns as the graph")
    costs = unit_costs(replace(graph, groups=dict(groups)), per)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in costs.items()}


def scorable_groups(
    graph: HasGroups, criterion: str, kinds: tuple[str, ...] | list[str] | None = None
) -> Groups:
    """The groups that ``score`` gives a score with these kinds.

    Raises:
        CriterionError: An unknown kind, none of the kinds, or one that the criterion cannot score.
    """
    scorable = scorable_kinds(criterion)
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
        there = sorted({group.kind for group in graph.groups.values()})
        raise CriterionError(
            f"nothing to score: the graph has no group of the kinds {', '.join(kinds)}; "
            f"it has {', '.join(there) or 'no groups'}"
        )
    if wrong := {group.kind for group in chosen.values()} - set(scorable):
        raise CriterionError(
            f"criterion {criterion!r} cannot score the kinds {', '.join(sorted(wrong))}; it scores "
            f"{', '.join(scorable)}. Name other kinds, or use {_others(wrong)}"
        )
    return _able(criteria()[criterion], chosen)


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


def _able(criterion: Any, groups: Groups) -> Groups:
    if not hasattr(criterion, "able"):
        return groups
    able = {name: group for name, group in groups.items() if criterion.able(group)}
    rest = [name for name in groups if name not in able]
    told = f"criterion {criterion.name!r} scores only groups that are {criterion.scores_only}"
    if not able:
        kinds = {group.kind for group in groups.values()}
        raise CriterionError(
            f"{told}, and none of the {len(groups)} of this model ({', '.join(sorted(kinds))}) is; "
            f"use {_others(kinds)}"
        )
    if rest:
        shown = ", ".join(rest[:4]) + ", ..." * (len(rest) > 4)
        logger.info("%s; %d of %d stay whole: %s", told, len(rest), len(groups), shown)
    return able


def _others(kinds: Iterable[str]) -> str:
    """Criteria that score every group of these kinds."""
    return " or ".join(
        name
        for name, known in criteria().items()
        if set(kinds) <= set(scorable_kinds(name)) and not hasattr(known, "able")
    )


@dataclass(frozen=True)
class _Groups:
    groups: Groups


def _checked(saliency: "Saliency", groups: Groups, criterion: str) -> "Saliency":
    result = {name: saliency[name].detach().cpu() for name in groups}
    for name, group in groups.items():
        assert result[name].shape == (group.size,), f"{criterion}: {name} {result[name].shape}"
        if not result[name].isfinite().all():
            raise CriterionError(
                f"criterion {criterion!r}: the scores of group {name!r} are not finite; look at "
                "the weights and the data, or score in float32"
            )
    seen_data = criteria()[criterion].needs != "nothing"
    if seen_data and not any(scores.any() for scores in result.values()):
        raise CriterionError(
            f"criterion {criterion!r}: all scores are 0, which ranks nothing: the activations are "
            "0, or the loss does not change with them. Look at the data, the weights and the loss"
        )
    return result


def _nearest(given: str, known: Any) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
