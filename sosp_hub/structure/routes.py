"""Other ways to run a model, which its code takes other routes for.

A trace follows one pass. Attention that is not fused, a padded batch, another number of samples or
tokens, a step that continues from a cache, and training read attributes that this pass did not read
and that a cut may have to change. Where a model can be run in these ways they are traced as well,
together in as few passes as can be.
"""

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.transformers import attention_of, set_attention
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.graph import Graph, Route
from sosp_hub.structure.inputs import first_tensor, map_named, other_batch
from sosp_hub.structure.shadow import is_config
from sosp_hub.structure.trace import Program, call, trace

_LOG = logging.getLogger("sosp_hub")


def find_routes(model: nn.Module, graph: Graph) -> None:
    """Traces a model in the other ways that it can be run in; notes them in ``graph.routes``.

    What the model itself does not do is left out, with the reason.

    Args:
        model: The model that ``graph`` was traced from.
        graph: Is told. A second call does nothing.
    """
    cache = graph.routes
    if cache.known is not None:
        return
    ways = [way for way in _WAYS if way.exists(model, graph)]
    routes = []
    if ways:
        reason = _try(model, graph, ways, routes)
        if reason and len(ways) > 1:
            works = []
            for way in ways:
                if reason := _try(model, graph, [way], []):
                    cache.unchecked[way.name] = reason
                else:
                    works.append(way)
            if works and _try(model, graph, works, routes):
                for way in works:
                    _try(model, graph, [way], routes)
        elif reason:
            cache.unchecked[ways[0].name] = reason
    for name, reason in cache.unchecked.items():
        _LOG.info("%s is not checked: %s", name, reason)
    cache.known = tuple(routes)


def all_ways(model: nn.Module, graph: Graph) -> tuple[Any, Program] | None:
    """Inputs for all other ways together, and how a model is run on them; not tried yet."""
    ways = [way for way in _WAYS if way.exists(model, graph)]
    state = _changed(model, graph, ways)
    return (state.inputs, state.run) if ways else None


def _changed(model: nn.Module, graph: Graph, ways: Sequence["_Way"]) -> "_Run":
    state = _Run(model, copy_inputs(graph.example_inputs))
    for way in ways:
        way.change(state)
    return state


def _try(model: nn.Module, graph: Graph, ways: Sequence["_Way"], routes: list[Route]) -> str | None:
    """Adds the route that all these ways make together; says why there is none."""
    state = _changed(model, graph, ways)
    try:
        traced = trace(model, state.inputs, graph.outputs, program=state.run)
    except Exception as error:  # noqa: BLE001 - whatever code raises on a way it does not know
        return _first_line(error)
    routes.append(Route(" and ".join(way.name for way in ways), traced, state.run))
    return None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


@dataclass
class _Run:
    """How a model is run: inputs, what is set in a copy of it before, and the calls."""

    model: nn.Module
    inputs: Any
    settings: list[Callable[[nn.Module], None]] = field(default_factory=list)
    calls: Callable[[nn.Module, Any], Any] = call

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Runs a copy of the model."""
        for setting in self.settings:
            setting(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody has asked for this way
            return self.calls(model, inputs)


@dataclass(frozen=True)
class _Way:
    name: str
    exists: Callable[[nn.Module, Graph], bool]
    change: Callable[[_Run], None]


# Attention that is not fused ----------------------------------------------------------------------


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for value in vars(module).values():
            if is_config(value):
                yield value


def _is_fused(model: nn.Module, _: Graph) -> bool:
    kinds = {attention_of(config) for config in _configs(model)}
    return bool(kinds - {None, "eager"}) or any(
        vars(module).get("fused_attn") is True for module in model.modules()
    )


def _eager(run: _Run) -> None:
    run.settings.append(_set_eager)


def _set_eager(model: nn.Module) -> None:
    for config in _configs(model):
        if attention_of(config) is not None:
            set_attention(config, "eager")
    for module in model.modules():
        if vars(module).get("fused_attn") is True:
            module.fused_attn = False  # type: ignore[assignment]


# Other inputs -------------------------------------------------------------------------------------


def _has_samples(_: nn.Module, graph: Graph) -> bool:
    return isinstance(graph.example_inputs, Mapping | tuple | list | Tensor) and bool(
        first_tensor(graph.example_inputs).dim()
    )


def _other_batch(run: _Run) -> None:
    run.inputs = other_batch(run.inputs)


def _length(inputs: Any) -> int:
    """Number of tokens, where the first input holds token numbers."""
    first = first_tensor(inputs)
    whole = not first.is_floating_point() and first.dtype != torch.bool
    return first.shape[1] if first.dim() == 2 and whole else 0


def _is_text(_: nn.Module, graph: Graph) -> bool:
    return _has_samples(_, graph) and _length(graph.example_inputs) > 3


def _cut_tokens(inputs: Any, part: slice, but: Iterable[str] = ()) -> Any:
    length = _length(inputs)

    def change(name: str, value: Tensor) -> Tensor:
        fits = value.dim() > 1 and value.shape[1] == length and name not in but
        return value[:, part] if fits else value

    return map_named(inputs, change)


def _other_length(run: _Run) -> None:
    run.inputs = _cut_tokens(run.inputs, slice(-1))


_MASK = "attention_mask"


def _can_be_padded(model: nn.Module, graph: Graph) -> bool:
    return isinstance(graph.example_inputs, Mapping) and (
        _is_text(model, graph) and (_MASK in graph.example_inputs or _takes(model, _MASK))
    )


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _padded(run: _Run) -> None:
    """The first sample lacks a token that the others have."""
    ids = first_tensor(run.inputs)
    mask = run.inputs.get(_MASK)
    mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.clone()
    mask[0, 1] = 0
    run.inputs = {**run.inputs, _MASK: mask}


# A step that continues from a cache ---------------------------------------------------------------

_CACHES = ("past_key_values", "cache")
"""What models call it: the argument and the output have one name."""


def _has_cache(model: nn.Module, graph: Graph) -> bool:
    config = vars(model).get("config")
    return (
        isinstance(graph.example_inputs, Mapping)
        and _is_text(model, graph)
        and any(_takes(model, name) for name in _CACHES)
        and not any(name in graph.example_inputs for name in _CACHES)
        and bool(getattr(config, "use_cache", False))
        and not getattr(config, "is_encoder_decoder", False)
    )


def _step_by_step(run: _Run) -> None:
    run.inputs = {name: value for name, value in run.inputs.items() if name != "labels"}
    kept = next(name for name in _CACHES if _takes(run.model, name))
    run.calls = functools.partial(_two_calls, kept)


def _two_calls(kept: str, model: nn.Module, inputs: Any) -> Any:
    """All tokens but one, then the last one with what the first call kept."""
    first = call(model, {**_cut_tokens(inputs, slice(-1)), "use_cache": True})
    rest = _cut_tokens(inputs, slice(-1, None), but=(_MASK,))
    last = call(model, {**rest, kept: first[kept], "use_cache": True})
    return {name: (first[name], last[name]) for name in first if name in last and name != kept}


# Training -----------------------------------------------------------------------------------------


def _has_training(_: nn.Module, graph: Graph) -> bool:
    return bool(graph.only_in_training)


_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def _training(run: _Run) -> None:
    run.settings.append(_set_training)


def _set_training(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0  # nothing random to compare


_WAYS = (
    _Way("eager attention", _is_fused, _eager),
    _Way("another batch size", _has_samples, _other_batch),
    _Way("another length", _is_text, _other_length),
    _Way("a padded batch", _can_be_padded, _padded),
    _Way("a cached step", _has_cache, _step_by_step),
    _Way("training", _has_training, _training),
)
