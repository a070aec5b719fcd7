"""What a plan costs, without cutting: MACs, parameters, bytes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from sosp_hub.plan import PruningPlan
from sosp_hub.structure.axes import Atom, Axis, Prod, Sum, atoms, resolve
from sosp_hub.structure.graph import Graph


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        macs: Multiply-accumulates of all matrix products, convolutions and attention for one
            sample of ``graph.sized``: of the traced size, or of that of ``cost_inputs``.
        params: Number of parameters; tied ones count once.
        bytes: Size of parameters and stored buffers in their dtypes.
    """

    macs: int
    params: int
    bytes: int


Quantity = Literal["macs", "params", "bytes"]
Symbol = str | tuple["Monomial", ...]
"""A group's name, or a sum of products."""
Monomial = tuple[int, tuple[Symbol, ...]]
Polynomial = dict[tuple[Symbol, ...], int]


class CostModel:
    """The costs of a graph as polynomials in the numbers of kept structures.

    Args:
        graph: What ``trace`` found.
        without: Modules whose own products do not count among the MACs.
    """

    def __init__(self, graph: Graph, without: Collection[str] = ()) -> None:
        sized = graph.sized
        self._names = {
            atoms[name].id: name
            for atoms in (graph.atoms, sized.atoms)
            for name in graph.groups
            if name in atoms
        }
        self._num_samples = sized.num_samples
        self._graph = graph
        self._layers = {
            f"{layer}.": (f"{name}[{i}]",)
            for name, group in graph.groups.items()
            for i, layer in enumerate(group.layers)
        }
        self._macs = _collect(
            (self._product(f"{m}.", axes), 1) for m, axes in sized.macs if m not in without
        )
        tensors = {name: self._product(name, axes) for name, axes in graph.tensors.items()}
        self._params = _collect((tensors[name], 1) for name in graph.parameters)
        stored = graph.parameters | graph.buffers
        self._bytes = _collect((tensors[name], graph.item_bytes[name]) for name in stored)

    def __call__(
        self,
        counts: Mapping[str, int] | None = None,
        layers: Mapping[str, Sequence[int]] | None = None,
    ) -> Cost:
        """Cost with ``counts`` structures of the named groups and these ``layers`` kept."""
        kept = {name: group.size for name, group in self._graph.groups.items()} | dict(counts or {})
        for name, group in self._graph.groups.items():
            stays = (layers or {}).get(name, range(group.size))
            kept |= {f"{name}[{i}]": int(i in stays) for i in range(len(group.layers))}
        return Cost(
            macs=_value(self._macs, kept) // self._num_samples,
            params=_value(self._params, kept),
            bytes=_value(self._bytes, kept),
        )

    def _product(self, place: str, axes: tuple[Axis, ...]) -> Monomial:
        """Sizes multiplied, and for what is inside layers that may go, whether they stay."""
        constant, symbols = self._monomial(axes)
        present = [
            s for layer, mark in self._layers.items() if place.startswith(layer) for s in mark
        ]
        return constant, tuple(sorted([*symbols, *present], key=str))

    def _monomial(self, axes: tuple[Axis, ...]) -> Monomial:
        """A constant and what it is multiplied with: group names, or sums of such products."""
        constant, factors = 1, list[Symbol]()
        for axis in axes:
            number, symbols = self._size(resolve(axis))
            constant *= number
            factors += symbols
        return constant, tuple(sorted(factors, key=str))

    def _size(self, axis: Axis) -> tuple[int, list[Symbol]]:
        if isinstance(axis, Atom):
            name = self._names.get(axis.id)
            return (axis.size, []) if name is None else (1, [name])
        if isinstance(axis, Prod):
            sizes = [self._size(factor) for factor in axis.factors]
            return prod(number for number, _ in sizes), [
                symbol for _, symbols in sizes for symbol in symbols
            ]
        assert isinstance(axis, Sum)
        if not any(atom.id in self._names for atom in atoms(axis)):
            return sum(self._size(part)[0] for part in axis.parts), []
        return 1, [tuple(sorted((self._monomial((part,)) for part in axis.parts), key=str))]


def _collect(terms: Iterable[tuple[Monomial, int]]) -> Polynomial:
    total: Polynomial = {}
    for (constant, symbols), weight in terms:
        total[symbols] = total.get(symbols, 0) + constant * weight
    return total


def _value(polynomial: Polynomial, counts: Mapping[str, int]) -> int:
    return sum(
        constant * prod(_factor(symbol, counts) for symbol in symbols)
        for symbols, constant in polynomial.items()
    )


def _factor(symbol: Symbol, counts: Mapping[str, int]) -> int:
    if isinstance(symbol, str):
        return counts[symbol]
    return sum(
        number * prod(_factor(inner, counts) for inner in symbols) for number, symbols in symbol
    )


def cost(
    graph: Graph, plan: PruningPlan | None = None, counts: Mapping[str, int] | None = None
) -> Cost:
    """Cost under a plan, or with ``counts`` structures kept; of the dense model by default.

    Equal to what is measured on the cut model.
    """
    if plan is None:
        return CostModel(graph)(counts)
    return CostModel(graph)(plan.num_kept(), plan.kept)


def unit_costs(graph: Graph, quantity: Quantity) -> dict[str, tuple[float, ...]]:
    """What the dense model saves without one structure, for each structure of each group.

    In units of the mean over all structures of the graph's groups. One that saves nothing, or
    next to nothing, counts as a thousandth of that mean.

    Args:
        graph: What ``trace`` found.
        quantity: What is saved; all structures of a group save the same, layers each their own.
    """
    model = CostModel(graph)
    dense = getattr(model(), quantity)
    saved: dict[str, list[int]] = {}
    for name, group in graph.groups.items():
        if group.layers:
            rests = [[i for i in range(group.size) if i != gone] for gone in range(group.size)]
            costs = [model({name: len(rest)}, {name: rest}) for rest in rests]
        else:
            costs = [model({name: group.size - 1})] * group.size
        saved[name] = [dense - getattr(cost, quantity) for cost in costs]
    every = [value for values in saved.values() for value in values]
    mean = max(sum(every), 1) / max(len(every), 1)
    return {n: tuple(max(value / mean, 1e-3) for value in values) for n, values in saved.items()}
