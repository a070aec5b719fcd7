"""Other ways to run a model, which its code takes other routes for.

A trace follows one pass. Attention that is not fused, a padded batch, another number of samples or
tokens, a step that continues from a cache, and training read attributes that this pass did not read
and that a cut may have to change. Where a model can be run in these ways they are traced as well,
together in as few passes as can be.
"""

import functools
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.transformers import attention_of, set_attention, takes_sdpa
from sosp_hub.errors import SospHubError, TraceError
from sosp_hub.plan import Plan
from sosp_hub.structure.axes import size_of
from sosp_hub.structure.copies import copy_inputs
from sosp_hub.structure.graph import Graph, Route
from sosp_hub.structure.inputs import (
    first_tensor,
    map_named,
    num_samples,
    num_tokens,
    with_samples,
)
from sosp_hub.structure.shadow import is_config
from sosp_hub.structure.trace import call, trace

_LOG = logging.getLogger("sosp_hub")
_FEW_MACS = 2_000_000
"""Multiply-accumulates that take less time than what torch does for one operation without data."""


def find_routes(model: nn.Module, graph: Graph, *, one_call: bool = False) -> None:
    """Traces a model in the other ways that it can be run in; notes them in ``graph.routes``.

    What the model itself does not do is left out, with the reason.

    Args:
        model: The model that ``graph`` was traced from.
        graph: Is told. A second call does nothing.
        one_call: Only what a cut has to know: leave ways that call the model several times to
            another call of this.
    """
    found = graph.routes
    fake = faster_without_data(model, graph)
    ways = _left(model, graph)
    some = [way for way in ways if not way.several_calls] if one_call else ways
    if found.complete or (one_call and found.known):
        return
    routes = []
    if some:
        reason = _try(model, graph, some, routes, fake)
        if reason and len(some) > 1:
            works = []
            for way in some:
                if reason := _try(model, graph, [way], [], fake):
                    tell_unchecked(graph, way.name, reason)
                else:
                    works.append(way)
            if works and _try(model, graph, works, routes, fake):
                for way in works:
                    _try(model, graph, [way], routes, fake)
        elif reason:
            tell_unchecked(graph, some[0].name, reason)
    found.known = tuple(routes)
    found.complete = len(some) == len(ways)


def faster_without_data(model: nn.Module, graph: Graph) -> bool:
    """Whether a model runs in less time without its data; so does one that has none."""
    macs = sum(math.prod(map(size_of, axes)) for _, axes in graph.macs)
    return macs > _FEW_MACS * len(graph.steps) or any(w.is_meta for w in model.parameters())


def find_scales(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Traces the fused kernel that a model may run, where it scales attention by a width of a plan.

    Args:
        model: As for `find_routes`; before the cut.
        graph: Is told what that kernel scales by.
        plan: The cut.
    """
    widths = {name for name, group in graph.groups.items() if group.kind == "head_dim"}
    if widths & plan.num_kept().keys() and _could_be_fused(model, graph):
        find_routes(model, graph, one_call=True)


def all_ways(model: nn.Module, graph: Graph) -> "Run | None":
    """How a model is run in all other ways together; not tried yet. None = there is no other."""
    ways = _left(model, graph)
    return _changed(model, graph, ways) if ways else None


def ways_apart(model: nn.Module, graph: Graph) -> "Iterator[tuple[Run, ...]]":
    """What is to be run together to see whether outputs depend on how a model is run.

    First each way alone, then those of `ways_together`.
    """
    ways = _left(model, graph)
    for way in ways:
        yield (_changed(model, graph, [way]),)
    if len(ways) > 1:
        yield from ways_together(model, graph)


def ways_together(model: nn.Module, graph: Graph) -> "Iterator[tuple[Run, ...]]":
    """All ways, in as few runs as show whether outputs depend on how a model is run.

    In one where a cache promises that no token sees a later one; then shorter inputs apart.
    """
    ways = _left(model, graph)
    length = [way for way in ways if way.change is _other_length]
    rest = [way for way in ways if way not in length]
    if length and any(way.change is _step_by_step for way in rest):
        yield (_changed(model, graph, ways),)
    yield tuple(_changed(model, graph, part) for part in (rest, length) if part)


def alike(runs: "Sequence[Run]", found: Sequence[Any], plain: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of outputs that are equal where outputs do not depend on how a model is run.

    Attention is the same in any kernel and with a cache, and a sample whatever others are there. A
    padded sample is what it is without the padding; where that is not run, no token sees a later
    one.

    Args:
        runs: Ways to run the model together, of ``ways_apart`` or ``ways_together``.
        found: What it returned.
        plain: What it returned for the traced inputs.
    """
    pairs = []
    padded = next((out for run, out in zip(runs, found, strict=True) if run.padded), None)
    for run, out in zip(runs, found, strict=True):
        if run.shorter and not run.padded and padded is not None:
            pairs += _pairs(padded, out, lambda t, run=run: run.shortened(t[:1]), lambda t: t[:1])
            continue
        pairs += _pairs(out, plain, run.whole, lambda t, run=run: run.whole(run.chosen(t)))
        if run.shorter and run.padded:
            pairs += _pairs(out, plain, run.unpadded, run.unpadded)
    return pairs


_Part = Callable[[Tensor], Tensor]


def _pairs(one: Any, two: Any, of_one: _Part, of_two: _Part) -> list[tuple[Tensor, Tensor]]:
    """Parts of tensors in the same place of two nested outputs."""
    if isinstance(one, Calls):
        one = torch.cat([*one], 1)
    if isinstance(two, Calls):
        two = torch.cat([*two], 1)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return [(of_one(one), of_two(two))] if one.dim() and two.dim() else []
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        both = [(one[name], two[name]) for name in one if name in two]
    elif isinstance(one, tuple | list) and isinstance(two, tuple | list):
        both = list(zip(one, two, strict=True))
    else:
        both = []
    return [pair for x, y in both for pair in _pairs(x, y, of_one, of_two)]


def _left(model: nn.Module, graph: Graph) -> "list[_Way]":
    """The ways that nothing is known to speak against."""
    ways = [way for way in _WAYS if way.exists(model, graph)]
    for way in [way for way in ways if way.takes_tokens]:
        if (length := num_tokens(graph.example_inputs)) <= 2 * _FEWER:
            reason = f"inputs of {length} tokens; {2 * _FEWER + 1} are needed"
            tell_unchecked(graph, way.name, reason)
    return [way for way in ways if way.name not in graph.routes.unchecked]


def tell_unchecked(graph: Graph, way: str, reason: str) -> None:
    """Notes, and logs once, that a way to run the model is not checked, and why."""
    if way not in graph.routes.unchecked:
        graph.routes.unchecked[way] = reason
        _LOG.info("%s is not checked: %s", way, reason)


def _changed(model: nn.Module, graph: Graph, ways: Sequence["_Way"]) -> "Run":
    state = Run(" and ".join(way.name for way in ways), model, copy_inputs(graph.example_inputs))
    for way in ways:
        way.change(state)
    return state


def _try(
    model: nn.Module, graph: Graph, ways: Sequence["_Way"], routes: list[Route], fake: bool
) -> str | None:
    """Adds the route that all these ways make together; says why there is none."""
    state = _changed(model, graph, ways)
    try:
        traced = trace(model, state.inputs, graph.outputs, fake=fake, program=state.run)
    except Exception as error:  # noqa: BLE001 - whatever code raises on a way it does not know
        return _first_line(error)
    routes.append(Route(state.name, traced, state.run))
    return None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    said = str(cause).strip().partition("\n")[0]
    return said if isinstance(cause, SospHubError) else f"{type(cause).__name__}: {said}"


@dataclass
class Run:
    """How a model is run.

    Attributes:
        name: What differs from the traced inputs.
        model: The model whose ways these are.
        inputs: What it is given.
        settings: What is set before in a copy of it.
        calls: Runs the copy.
        samples: Which sample of the traced inputs each sample is; None = the same ones.
        padded: Whether the first sample lacks its last tokens.
        shorter: Whether all samples do.
    """

    name: str
    model: nn.Module
    inputs: Any
    settings: list[Callable[[nn.Module], None]] = field(default_factory=list)
    calls: Callable[[nn.Module, Any], Any] = call
    samples: list[int] | None = None
    padded: bool = False
    shorter: bool = False

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Runs a copy of the model."""
        for setting in self.settings:
            setting(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody has asked for this way
            return self.calls(model, inputs)

    def chosen(self, plain: Tensor) -> Tensor:
        """Those samples and tokens of an output for the traced inputs that are run here."""
        some = plain if self.samples is None else plain[self.samples]
        return self.shortened(some) if self.shorter else some

    def whole(self, output: Tensor) -> Tensor:
        """The samples of an output that are not padded here."""
        return output[self.padded :]

    def unpadded(self, output: Tensor) -> Tensor:
        """What an output has for the tokens of the first sample that are not padding here."""
        return self.shortened(output[:1], _FEWER)

    def shortened(self, output: Tensor, fewer: int = 0) -> Tensor:
        """The part of an output for the tokens that shorter inputs have, or for ``fewer``."""
        length = num_tokens(self.inputs)
        for_tokens = output.dim() > 1 and output.shape[1] in {length, length + _FEWER}
        return output[:, : length - fewer] if for_tokens else output


class Calls(tuple[Tensor, ...]):
    """What an output is after each of several calls, which go on where the one before ended."""


@dataclass(frozen=True)
class _Way:
    name: str
    exists: Callable[[nn.Module, Graph], bool]
    change: Callable[[Run], None]
    takes_tokens: bool = False
    several_calls: bool = False


# Attention that is fused, and that is not ---------------------------------------------------------


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


def _could_be_fused(model: nn.Module, graph: Graph) -> bool:
    takes = takes_sdpa(model)
    return not _is_fused(model, graph) and (
        any(vars(module).get("fused_attn") is False for module in model.modules())
        or any(takes and attention_of(config) == "eager" for config in _configs(model))
    )


def _eager(run: Run) -> None:
    run.settings.append(functools.partial(_set_fused, False))


def _fused(run: Run) -> None:
    run.settings.append(functools.partial(_set_fused, True))


def _set_fused(fused: bool, model: nn.Module) -> None:
    for config in _configs(model):
        if attention_of(config) is not None:
            set_attention(config, "sdpa" if fused else "eager")
    for module in model.modules():
        if "fused_attn" in vars(module):
            module.fused_attn = fused  # type: ignore[assignment]


# Other inputs -------------------------------------------------------------------------------------


def _has_samples(_: nn.Module, graph: Graph) -> bool:
    return isinstance(graph.example_inputs, Mapping | tuple | list | Tensor) and bool(
        first_tensor(graph.example_inputs).dim()
    )


def _other_batch(run: Run) -> None:
    """One sample less, or one more: of texts, where the first will be padded, and of one sample."""
    size = num_samples(run.inputs)
    more = size == 1 or bool(num_tokens(run.inputs))
    run.samples = [*range(size), 0] if more else [*range(size - 1)]
    run.inputs = with_samples(run.inputs, run.samples)


_FEWER = 2
"""Tokens that shorter inputs and padded samples lack: a cached step then finds padding in both."""


def _is_text(_: nn.Module, graph: Graph) -> bool:
    return _has_samples(_, graph) and num_tokens(graph.example_inputs) > 1


def _cut_tokens(inputs: Any, part: slice, but: Iterable[str] = ()) -> Any:
    length = num_tokens(inputs)

    def change(name: str, value: Tensor) -> Tensor:
        fits = value.dim() > 1 and value.shape[1] == length and name not in but
        return value[:, part] if fits else value

    return map_named(inputs, change)


def _other_length(run: Run) -> None:
    run.inputs = _cut_tokens(run.inputs, slice(-_FEWER))
    run.shorter = True


_MASK = "attention_mask"


def _can_be_padded(model: nn.Module, graph: Graph) -> bool:
    return isinstance(graph.example_inputs, Mapping) and (
        _is_text(model, graph) and (_MASK in graph.example_inputs or _takes(model, _MASK))
    )


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _padded(run: Run) -> None:
    """The first sample lacks the last tokens."""
    ids = first_tensor(run.inputs)
    mask = run.inputs.get(_MASK)
    mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.clone()
    mask[0, -_FEWER:] = 0
    run.padded = True
    run.inputs = {**run.inputs, _MASK: mask}


# A step that continues from a cache ---------------------------------------------------------------

_CACHES = ("past_key_values", "cache")
"""What models call it: the argument and the output have one name."""


def _has_cache(model: nn.Module, graph: Graph) -> bool:
    return _keeps_cache(model, graph) and not _decodes(graph) and _is_text(model, graph)


def _has_decoder_cache(model: nn.Module, graph: Graph) -> bool:
    return _keeps_cache(model, graph) and _decodes(graph)


def _keeps_cache(model: nn.Module, graph: Graph) -> bool:
    config: Any = vars(model).get("config")
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (
        isinstance(graph.example_inputs, Mapping)
        and any(_takes(model, name) for name in _CACHES)
        and not any(name in graph.example_inputs for name in _CACHES)
        and any(getattr(each, "use_cache", False) for each in (config, texts))
        and (_decodes(graph) or not getattr(config, "is_encoder_decoder", False))
    )


def _decodes(graph: Graph) -> bool:
    """Whether tokens for a decoder are given beside what an encoder reads."""
    ids = graph.example_inputs.get(_DECODED) if isinstance(graph.example_inputs, Mapping) else None
    return isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1


_DECODED = "decoder_input_ids"


def _step_by_step(run: Run) -> None:
    run.inputs = {name: value for name, value in run.inputs.items() if name != "labels"}
    kept = next(name for name in _CACHES if _takes(run.model, name))
    run.calls = functools.partial(_two_calls, kept)


def _two_calls(kept: str, model: nn.Module, inputs: Any) -> Any:
    """All tokens but one, then the last one with what the first call kept."""
    first = call(model, {**_some_tokens(inputs, slice(-1)), "use_cache": True})
    if not isinstance(first, Mapping) or first.get(kept) is None:
        raise TraceError(f"the model returns no {kept!r} for use_cache=True")
    rest = _some_tokens(inputs, slice(-1, None), but=(_MASK,))
    last = call(model, {**rest, kept: first[kept], "use_cache": True})
    ahead = (kept, "encoder") if _DECODED in inputs else (kept,)  # what encoders give is whole
    return {
        name: _each(first[name], last[name])
        for name in first
        if name in last and not name.startswith(ahead)
    }


def _some_tokens(inputs: Any, part: slice, but: Iterable[str] = ()) -> Any:
    if _DECODED in inputs:
        return {**inputs, _DECODED: inputs[_DECODED][:, part]}
    return _cut_tokens(inputs, part, but)


def _each(first: Any, last: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(last, Tensor):
        return Calls((first, last))
    if isinstance(first, tuple | list) and isinstance(last, tuple | list):
        return tuple(map(_each, first, last))
    return first, last


# Training -----------------------------------------------------------------------------------------


def _has_training(_: nn.Module, graph: Graph) -> bool:
    return bool(graph.only_in_training)


_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def _training(run: Run) -> None:
    run.settings.append(_set_training)


def _set_training(model: nn.Module) -> None:
    """Without what is drawn at random: a model of fewer layers draws less."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
    for holder in (*model.modules(), *_configs(model)):
        shares = [key for key, value in vars(holder).items() if isinstance(value, float)]
        vars(holder).update({key: 0.0 for key in shares if "drop" in key})


_WAYS = (
    _Way("eager attention", _is_fused, _eager),
    _Way("fused attention", _could_be_fused, _fused),
    _Way("another batch size", _has_samples, _other_batch),
    _Way("another length", _is_text, _other_length, takes_tokens=True),
    _Way("a padded batch", _can_be_padded, _padded, takes_tokens=True),
    _Way("a cached step", _has_cache, _step_by_step, takes_tokens=True, several_calls=True),
    _Way("a cached step of the decoder", _has_decoder_cache, _step_by_step, several_calls=True),
    _Way("training", _has_training, _training),
)
