"""How long a plan's model takes and how much it holds while it serves, told without cutting.

Layers with weights are timed once, each at a few widths and with weights that are as far from the
processor as in the whole model, and the times are kept in a file: what a plan leaves takes what its
layers take at their new widths (between those that were measured, a straight line), what products
of activations with each other take (attention; timed in the dense model, and less by the
multiply-accumulates that are cut of them), and what the dense model spends on all else, of which
the part that goes over the numbers that layers give is less by those that are cut. The idea of a
table of layers is that of ZipLM (arXiv 2302.04089).
"""

import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sosp_hub.atomic import write_text
from sosp_hub.compat.transformers import cache_in, cached_tokens
from sosp_hub.cost import CostModel
from sosp_hub.errors import BudgetError
from sosp_hub.evaluate import measure_latency
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.axes import Axis, atoms, size_of
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import output_tensors
from sosp_hub.untrusted import UnreadableError, read_json

_SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)  # of a width, at which a layer is timed
_SECONDS = 0.02  # of timing one layer at one width, about
_PASSES = 3  # over what a layer gives (norm, activation, sum), our choice
_ELEMENTS = 2**20  # numbers of the product that is timed for them
_LARGEST_SPAN = 2**28  # bytes that hold the weights which a layer is timed with, in turns
_MOST_COPIES = 256


def table_path(hardware: str) -> Path:
    """Where the times of a device are kept, for all models and runs of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = "".join(c if c.isalnum() else "-" for c in hardware).strip("-") or "unknown"
    return Path(base) / "sosp_hub" / "latency" / f"{name}.json"


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer with a weight, as one forward pass runs it.

    Attributes:
        name: Of the module.
        kind: ``linear``, ``transposed`` (transformers' Conv1D) or ``conv``.
        shape: Of its input, the features or channels in it as in the dense model.
        options: Stride, padding, dilation and groups of a convolution.
        axes: Of its weight.
        grid: Sizes of each dimension of the weight at which it is timed, ascending.
        elements: Numbers that it gives in the dense model.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    options: tuple[Any, ...]
    axes: tuple[Axis, ...]
    grid: tuple[tuple[int, ...], ...]
    elements: int

    @property
    def given(self) -> Axis:
        """The features or channels that it gives."""
        return self.axes[1 if self.kind == "transposed" else 0]

    def key(self, weight: Sequence[int], span: int) -> str:
        """What is timed, as text: layers that are alike share it."""
        return f"{self.kind} of {span} {list(self.shape)} {list(self.options)} {list(weight)}"

    def run(self, weight: Sequence[int], like: Tensor, span: int) -> Callable[[], Tensor]:
        """The layer with a weight of another shape.

        As many weights as take ``span`` bytes take turns, so that caches hold of one what they
        would hold of it in a model of that size.
        """
        copies = min(_MOST_COPIES, math.ceil(span / (math.prod(weight) * like.element_size())))
        turns = cycle(like.new_full((copies, *weight), 0.01).unbind())
        if self.kind == "conv":
            stride, padding, dilation, groups = self.options
            channels = weight[1] * groups
            if groups > 1 and weight[1] == 1:  # one filter a channel
                channels = groups = weight[0]
            shape = (self.shape[0], channels, *self.shape[2:])
            convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
            given = like.new_full(shape, 0.5)
            return lambda: convolve(given, next(turns), None, stride, padding, dilation, groups)
        features = weight[0] if self.kind == "transposed" else weight[1]
        given = like.new_full((*self.shape[:-1], features), 0.5)
        if self.kind == "transposed":
            return lambda: given @ next(turns)
        return lambda: F.linear(given, next(turns))


class LatencyTable:
    """Seconds of a forward pass of what a plan leaves.

    Args:
        model: The dense model, on its device, in the mode to be measured; or its `Decoder`.
        graph: What ``trace`` found.
        inputs: Of the forward pass: a tuple of positional tensors or a dict of keyword ones. Their
            batch and length are those that are timed.
        path: Where times are kept and found again; None = only here.
        conditions: What else times depend on, such as hardware and threads.

    Attributes:
        dense_s: Measured seconds of the dense model.
        layers_s: What its layers take of that by the table.
        products_s: What products of activations take of it.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        inputs: Any,
        *,
        path: Path | None = None,
        conditions: str = "",
    ) -> None:
        self._graph = graph
        self._layers = _layers_of(model, graph, inputs)
        like = next(p for p in model.parameters() if p.is_floating_point())
        about = f"{conditions}; {like.device.type}; {like.dtype}; torch {torch.__version__}"
        known = _read(path)
        times = known.setdefault(about, {})
        numbers = sum(math.prod(map(size_of, layer.axes)) for layer in self._layers)
        self._span = _rounded(numbers * like.element_size())
        missing: dict[str, Callable[[], Callable[[], Tensor]]] = {
            layer.key(weight, self._span): partial(layer.run, weight, like, self._span)
            for layer in self._layers
            for weight in product(*layer.grid)
            if layer.key(weight, self._span) not in times
        }
        if "elements" not in times:
            ones = like.new_ones(_ELEMENTS)
            missing["elements"] = lambda: lambda: ones * ones
        times |= _timed(missing)
        if path is not None and missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known, indent=1))
        self._times = times
        self.dense_s = measure_latency([model], inputs, 0.5)[0]
        self.layers_s = self._of_layers(PruningPlan({}, {}))
        self.products_s = _products_s(model, inputs)
        self._products = CostModel(graph, without={layer.name for layer in self._layers})
        self._elements = self._given(PruningPlan({}, {}))
        told = self.layers_s + self.products_s
        self._scale = min(1.0, self.dense_s / told) if told else 1.0
        rest = max(0.0, self.dense_s - told)
        self._by_elements = min(rest, _PASSES * times["elements"] / _ELEMENTS * self._elements)
        self._fixed = rest - self._by_elements

    def __call__(self, plan: PruningPlan) -> float:
        """Seconds by the table."""
        whole = self._products().macs  # none where the graph counts none of them
        products = self._products(plan.num_kept(), plan.kept).macs / whole if whole else 1.0
        given = self._given(plan) / max(self._elements, 1)
        timed = self._of_layers(plan) + products * self.products_s
        return self._fixed + given * self._by_elements + self._scale * timed

    def _given(self, plan: PruningPlan) -> float:
        """Numbers that all layers give."""
        count = self._graph.count(plan.num_kept())
        return sum(
            layer.elements * size_of(layer.given, count) / size_of(layer.given)
            for layer in self._left(plan)
        )

    def _of_layers(self, plan: PruningPlan) -> float:
        count = self._graph.count(plan.num_kept())
        return sum(
            self._seconds(layer, [size_of(axis, count) for axis in layer.axes])
            for layer in self._left(plan)
        )

    def _left(self, plan: PruningPlan) -> list[_Layer]:
        """Those that are not in a block that goes."""
        gone = tuple(
            f"{layer}."
            for name, kept in plan.kept.items()
            for number, layer in enumerate(self._graph.groups[name].layers)
            if number not in kept
        )
        return [layer for layer in self._layers if not layer.name.startswith(gone)]

    def _seconds(self, layer: _Layer, weight: Sequence[int]) -> float:
        """Between the widths that were timed, a straight line in each direction."""
        corners: list[list[tuple[int, float]]] = []
        for size, sizes in zip(weight, layer.grid, strict=True):
            above = int(np.searchsorted(sizes, size))
            above = min(max(above, 1), len(sizes) - 1) if len(sizes) > 1 else 0
            low, high = sizes[max(above - 1, 0)], sizes[above]
            share = (size - low) / (high - low) if high > low else 1.0
            share = max(share, 0.0)
            corners.append([(low, 1 - share), (high, share)] if high > low else [(high, 1.0)])
        return sum(
            math.prod(share for _, share in corner)
            * self._times[layer.key([size for size, _ in corner], self._span)]
            for corner in product(*corners)
        )


def _layers_of(model: nn.Module, graph: Graph, inputs: Any) -> list[_Layer]:
    """The layers that a forward pass runs, as often as it runs them."""
    alias = {other: name for name, others in graph.aliases.items() for other in others}
    found: list[_Layer] = []
    handles = []
    traced = model.model if isinstance(model, Decoder) else model
    for name, module in traced.named_modules():
        kind = _kind(module)
        weight = alias.get(f"{name}.weight", f"{name}.weight")
        if kind is None or weight not in graph.tensors:
            continue
        options = (
            (module.stride, module.padding, module.dilation, module.groups)
            if kind == "conv"
            else ()
        )

        def note(
            _: nn.Module,
            given: tuple[Any, ...],
            named: Mapping[str, Any],
            result: Any,
            name: str = name,
            kind: str = kind,
            options: tuple[Any, ...] = options,
            weight: str = weight,
        ) -> None:
            axes = graph.tensors[weight]
            grid = _grid(kind, options, axes)
            features = next(iter((*given, *named.values())))
            shape = tuple(features.shape)
            elements = sum(each.numel() for each in output_tensors(result)[:1])
            found.append(_Layer(name, kind, shape, options, axes, grid, elements))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    positional, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    try:
        with torch.no_grad():
            model(*positional, **named)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Products(TorchFunctionMode):
    """Adds up the seconds of matrix products between activations."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _PRODUCTS or any(isinstance(given, nn.Parameter) for given in args):
            return func(*args, **(kwargs or {}))
        synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else int
        synchronize()
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronize()
        self.seconds += time.perf_counter() - start
        return result


_PRODUCTS = {
    *(F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm),
}


def _products_s(model: nn.Module, inputs: Any) -> float:
    """Median seconds that a forward pass takes for them."""
    positional, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    seconds = []
    with torch.no_grad():
        for _ in range(7):
            with _Products() as products:
                model(*positional, **named)
            seconds.append(products.seconds)
    return statistics.median(seconds[2:])


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return "transposed" if type(module).__name__ == "Conv1D" else None


def _grid(kind: str, options: tuple[Any, ...], axes: Sequence[Axis]) -> tuple[tuple[int, ...], ...]:
    """Some widths of what may be cut, the dense one of all else."""
    grid = []
    for number, axis in enumerate(axes):
        dense = size_of(axis)
        in_group = kind == "conv" and (number > 1 or (number == 1 and options[3] > 1))
        fixed = in_group or all(atom.pinned for atom in atoms(axis))
        shares = (1.0,) if fixed else _SHARES
        grid.append(tuple(sorted({max(1, round(share * dense)) for share in shares})))
    return tuple(grid)


def _rounded(size: int) -> int:
    """The power of two that is nearest, so that models of about a size share times."""
    return min(2 ** round(math.log2(max(size, 1))), _LARGEST_SPAN)


def _timed(runs: Mapping[str, Callable[[], Callable[[], Tensor]]]) -> dict[str, float]:
    """Median seconds of what each makes; what the machine does else hits neighbours alike."""
    synchronize = torch.accelerator.synchronize if torch.accelerator.is_available() else int
    times = {}
    with torch.no_grad():
        for key, make in runs.items():
            run = make()
            seconds, began = list[float](), time.perf_counter()
            while len(seconds) < 7 or time.perf_counter() - began < _SECONDS:
                start = time.perf_counter()
                run()
                synchronize()
                seconds.append(time.perf_counter() - start)
            times[key] = statistics.median(seconds[2:])
    return times


def _read(path: Path | None) -> dict[str, dict[str, float]]:
    """What is kept; nothing where the file is missing or none of ours."""
    if path is None or not path.is_file():
        return {}
    try:
        known = read_json(path)
    except UnreadableError:
        return {}
    if not isinstance(known, dict):
        return {}
    return {
        about: {key: float(s) for key, s in times.items() if isinstance(s, float) and s >= 0}
        for about, times in known.items()
        if isinstance(times, dict)
    }


class Decoder(nn.Module):
    """One step of a language model after so many tokens; the same step each time it is called.

    Args:
        model: In eval mode.
        prompt: Tokens before the step: ``(samples, length)``.

    Raises:
        BudgetError: The model has no cache, or one that cannot be set back by a token: the state of
            a recurrent layer, or a sliding window that the prompt fills.
    """

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        super().__init__()
        self.model, self.length = model, prompt.shape[1]
        with torch.no_grad():
            self._cache = cache_in(dict(model(prompt, use_cache=True)))
        refusal = BudgetError(
            f"budget.decode_s: a {type(model).__name__} has no cache of keys and values that can "
            f"be set back after {self.length} tokens; write latency_s or prefill_s"
        )
        if not all(hasattr(cache, "crop") for cache in self._cache.values()) or not self._cache:
            raise refusal
        with torch.no_grad():
            model(prompt[:, :1], **self._cache, use_cache=True)
        try:
            self.cache.crop(-1)
        except RuntimeError as error:  # a state without a past, or a window that is full
            raise refusal from error

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of one token more; the cache is as before afterwards."""
        logits = self.model(tokens, **self._cache, use_cache=True).logits
        self.cache.crop(-tokens.shape[1])
        return logits

    @property
    def cache(self) -> Any:
        """Keys and values of the prompt."""
        return next(iter(self._cache.values()))


class ServingMemory:
    """Bytes that a language model holds while it serves: weights, and the cache of a batch.

    Args:
        model: The dense model.
        graph: What ``trace`` found.
        batch: Samples that are served at once.
        length: Tokens of each, prompt and answer.

    Attributes:
        cache_bytes: Keys and values of the dense model for that batch and length.

    Raises:
        BudgetError: A model without such a cache.
    """

    def __init__(self, model: nn.Module, graph: Graph, batch: int, length: int) -> None:
        device = next(model.parameters()).device
        try:
            cache = Decoder(model, torch.zeros(1, 1, dtype=torch.long, device=device)).cache
        except BudgetError as error:
            raise BudgetError(
                f"budget.serving_bytes: a {type(model).__name__} has no cache of keys and values "
                "that grows with the tokens; write bytes, of the weights alone"
            ) from error
        self._cost, self._fixed = CostModel(graph), 0
        self._by_group: dict[str, tuple[int, int]] = {}
        for number, layer in enumerate(cache.layers):
            heads = layer.keys.shape[1]
            of_token = sum(
                each.numel() * each.element_size() for each in (layer.keys, layer.values)
            )
            num_bytes = of_token * batch * cached_tokens(layer, length)
            group = _cached_group(graph, number, heads)
            if group is None:
                self._fixed += num_bytes
            else:
                self._by_group[group] = (num_bytes, heads)
        self.cache_bytes = self._fixed + sum(each for each, _ in self._by_group.values())

    def __call__(self, plan: PruningPlan) -> float:
        """Bytes of what a plan leaves."""
        kept = plan.num_kept()
        weights = self._cost(kept, plan.kept).bytes
        return (
            weights
            + self._fixed
            + sum(
                num_bytes * kept.get(name, size) / size
                for name, (num_bytes, size) in self._by_group.items()
            )
        )


def _cached_group(graph: Graph, layer: int, heads: int) -> str | None:
    """The group whose structures are the heads of a layer's keys and values."""
    of_layer = re.compile(rf"(^|\.){layer}\.")
    for kind in ("kv_group", "head"):
        for name, group in graph.groups.items():
            if group.kind == kind and group.size == heads and of_layer.search(name):
                return name
    return None
