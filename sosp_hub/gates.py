"""Gates: one number per structure that multiplies the activation which disappears with it.

All gates are 1 in the dense model and a gate of 0 is the pruned model, so that what a criterion
needs to know about the loss are derivatives by a few thousand numbers. Weights take no gradient.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from sosp_hub.compat.accelerate import running_device
from sosp_hub.compat.torch import parameter_table
from sosp_hub.double_backward.pieces import pieces
from sosp_hub.errors import CriterionError
from sosp_hub.modes import evaluating
from sosp_hub.structure.groups import Group, Groups, Site
from sosp_hub.types import GateKind

logger = logging.getLogger(__name__)


class Gates:
    """The gates of a model while they are installed.

    Attributes:
        values: One leaf tensor per group that takes a gradient: ``(structures,)``, or
            ``(samples, structures)`` where every sample has its own gates, or
            ``(samples, tokens, structures)`` where every token has.
        heights: How long the first dimension of what is gated was with one sample, by its place:
            one that is as long with more of them has nothing of its own for each.
    """

    def __init__(self, groups: Groups, dtype: torch.dtype, device: torch.device) -> None:
        self._sizes = {name: group.size for name, group in groups.items()}
        self._options = {"dtype": dtype, "device": device}
        self.heights: dict[str, int] = {}
        self.set_(1.0)

    def set_(self, value: float | Mapping[str, Tensor] = 1.0, *, own: Sequence[int] = ()) -> None:
        """Gives every gate a value and forgets what the last forward pass recorded.

        Args:
            value: One value for all gates, or a tensor per group (1 for a group not listed).
            own: ``(samples,)`` or ``(samples, tokens)`` of the next batch, each of which has gates
                of its own; empty = all share them.
        """
        self.are_one = not isinstance(value, Mapping) and value == 1.0
        self.values: dict[str, Tensor] = {}
        for name, size in self._sizes.items():
            start = value.get(name, 1.0) if isinstance(value, Mapping) else value
            gate = torch.as_tensor(start, **self._options).detach().expand(*own, size).clone()
            self.values[name] = gate.requires_grad_()


@contextmanager
def gated(model: nn.Module, groups: Groups, gate: GateKind = "activation") -> Iterator[Gates]:
    """Installs the gates of ``groups``; the model runs in eval mode and its weights are constants.

    The gates are float32 (float64 where the model is), whatever the activations are. Hooks, modes
    and ``requires_grad`` are as before when the context is left, also after an exception.

    Raises:
        CriterionError: A group that has no place for a gate, or a place that the model has not.
    """
    parameters = list(model.parameters())
    floating = [p for p in parameters if p.is_floating_point()] or [torch.zeros(())]
    finest = max((p.dtype for p in floating), key=_precision)
    if finest.itemsize < 2:
        raise CriterionError(
            f"the weights are {finest}, which torch does not compute with; score a copy in "
            "bfloat16 or float32"
        )
    dtype = torch.promote_types(finest, torch.float32)
    device = _device(model, floating)
    gates = Gates(groups, dtype, device)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        weights: dict[str, list[_GateVector]] = {}
        for place, sites in _places(model, groups, gate).items():
            vectors = _gate_vectors(sites, device)
            if isinstance(place, str):
                weights[place] = vectors
            else:
                hook = _gate_first_input(gates, vectors)
                handle = place.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        if weights:
            stack.enter_context(_scaled_weights(model, gates, weights))
        yield gates


def _device(model: nn.Module, parameters: list[Any]) -> torch.device:
    """Where the gates are: with the first weight, or where it comes when it is offloaded."""
    if not parameters[0].is_meta:
        return parameters[0].device
    return torch.device(running_device(model) or "cpu")


def _precision(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(module.training for module in model.modules()):
        logger.info("the model is in train mode; it is scored in eval mode and then set back")
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


# Where the gates sit ------------------------------------------------------------------------------


def _places(
    model: nn.Module, groups: Groups, gate: GateKind
) -> dict[nn.Module | str, list[tuple[Group, Site]]]:
    """The sites at each module, whose input is gated, and at each parameter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = _parameters(model)
    places: dict[nn.Module | str, list[tuple[Group, Site]]] = {}
    for group in groups.values():
        sites = group.sites if gate == "activation" else _filters(group, parameters)
        seen = set()
        for site in sites:
            place = site.weight if site.module is None else modules.get(site.module)
            if place is None or (isinstance(place, str) and place not in parameters):
                raise CriterionError(
                    f"group {group.name!r}: the model has no {site.module or site.weight!r}; "
                    "give the model that the graph was traced from"
                )
            key = (place, site.dim, site.index.tobytes())
            if key not in seen:  # else one module under two names
                seen.add(key)
                places.setdefault(place, []).append((group, site))
        if not sites:
            lack = "place for a gate" if gate == "activation" else "filter that makes its slices"
            raise CriterionError(
                f"group {group.name!r} ({group.kind}) has no {lack}: score other kinds (`kinds=`), "
                "or use a criterion without gradients, such as `magnitude`"
            )
    return places


def _filters(group: Group, parameters: Mapping[str, nn.Parameter]) -> tuple[Site, ...]:
    """The weights that make the slices: neither biases nor what a normalisation multiplies by."""
    return tuple(
        Site(module=None, weight=member.tensor, dim=member.dim, index=member.index)
        for member in group.members
        if not member.reads and member.tensor in parameters and parameters[member.tensor].ndim > 1
    )


def has_gate(model: nn.Module, group: Group, gate: GateKind) -> bool:
    """Whether there is a place for the group's gates."""
    return bool(group.sites if gate == "activation" else _filters(group, _parameters(model)))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


class SharedBySamplesError(CriterionError):
    """What is gated has no place for each sample, such as a table of relative positions."""


@dataclass(frozen=True)
class _GateVector:
    """The gates along one dimension of a tensor, gathered from those of some groups.

    Attributes:
        names: The groups.
        index: For each position where its gate is in the gates of these groups, one behind the
            other and then a 1; None = as they are.
        dim: The dimension.
        where: The module or parameter, for messages.
    """

    names: tuple[str, ...]
    index: Tensor | None
    dim: int
    where: str

    def read(self, gates: Gates, tensor: Tensor) -> Tensor:
        """The gates in a shape that broadcasts with ``tensor``, on its device."""
        parts = [gates.values[name] for name in self.names]
        vector = parts[0]
        if self.index is not None:
            one = vector.new_ones(*vector.shape[:-1], 1)
            vector = torch.cat([*parts, one], -1).index_select(-1, self.index)
        dim, length = self.dim % tensor.ndim, vector.shape[-1]
        if tensor.shape[dim] != length:
            raise CriterionError(
                f"{self.where}: dimension {dim} of what is gated has {tensor.shape[dim]} "
                f"positions, in the graph {length}; trace the model that is scored"
            )
        shape = [1] * tensor.ndim
        shape[dim] = length
        if vector.ndim == 3:
            if dim > 1 and tensor.shape[:2] == vector.shape[:2]:
                shape[:2] = vector.shape[:2]
            elif dim and len(tensor) == vector.shape[:2].numel():  # rows of all samples' tokens
                shape[0] = len(tensor)
            else:
                raise CriterionError(
                    f"{self.where}: {vector.shape[0]} samples of {vector.shape[1]} tokens with own "
                    f"gates are not found in shape {tuple(tensor.shape)}; leave out per_token"
                )
        elif vector.ndim == 2:
            repeats, rest = divmod(tensor.shape[0], len(vector))
            alone = gates.heights.setdefault(self.where, tensor.shape[0] if len(vector) == 1 else 0)
            shared = len(vector) > 1 and alone == tensor.shape[0]
            if dim == 0 or rest or shared:
                raise SharedBySamplesError(
                    f"{self.where}: {len(vector)} samples with own gates are not found along "
                    f"dimension 0 of shape {tuple(tensor.shape)}; choose a criterion without "
                    "per-sample derivatives"
                )
            shape[0] = len(tensor)
            vector = vector.repeat_interleave(repeats, 0)
        return vector.view(shape).to(tensor.device)


def _gate_vectors(sites: list[tuple[Group, Site]], device: torch.device) -> list[_GateVector]:
    """Sites of one tensor that do not overlap share a vector; each vector gates the tensor."""
    vectors: list[_GateVector] = []
    while sites:
        (first, site), where = sites[0], sites[0][1].module or sites[0][1].weight or ""
        taken, index, start, rest = [], np.full(len(site.index), -1), 0, []
        for group, other in sites:
            free = other.dim == site.dim and len(other.index) == len(index)
            if free and group.name not in taken and not ((index >= 0) & (other.index >= 0)).any():
                index = np.where(other.index >= 0, other.index + start, index)
                taken.append(group.name)
                start += group.size
            else:
                rest.append((group, other))
        plain = len(taken) == 1 and np.array_equal(index, np.arange(first.size))
        gather = None if plain else torch.from_numpy(np.where(index < 0, start, index)).to(device)
        vectors.append(_GateVector(tuple(taken), gather, site.dim, where))
        sites = rest
    return vectors


# What a gate does ---------------------------------------------------------------------------------


def _gate_first_input(gates: Gates, vectors: list[_GateVector]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        name = None if args else next(iter(kwargs))
        x = args[0] if name is None else kwargs[name]
        for vector in vectors:
            gate = vector.read(gates, x)
            x = _UnitGate.apply(x, gate) if gates.are_one else (x * gate).to(x.dtype)
        return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

    return hook


@contextmanager
def _scaled_weights(
    model: nn.Module, gates: Gates, weights: dict[str, list[_GateVector]]
) -> Iterator[None]:
    """Before each forward pass the parameters are swapped for scaled ones."""
    plain = {name: model.get_parameter(name) for name in weights}
    for name, parameter in plain.items():
        if parameter.is_meta or hasattr(parameter, "device_mesh"):
            raise CriterionError(
                f"{name}: its gates {', '.join(weights[name][0].names)} scale the weight itself, "
                "which is offloaded or sharded; keep it whole in memory, or score other kinds"
            )
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    homes = {name: parameter_table(owner) for name, owner in owners.items()}

    def scale(*_: Any) -> None:
        for name, vectors in weights.items():
            if any(gates.values[group].ndim > 1 for vector in vectors for group in vector.names):
                raise CriterionError(
                    f"{name}: the gates of {', '.join(vectors[0].names)} scale a weight, which all "
                    "samples share; leave these groups out, or choose a criterion without "
                    "derivatives per sample or token"
                )
            weight: Tensor = plain[name]
            for vector in vectors:
                weight = (weight * vector.read(gates, weight)).to(weight.dtype)
            homes[name][name.rpartition(".")[2]] = weight

    handle = model.register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()
        for name, parameter in plain.items():
            homes[name][name.rpartition(".")[2]] = parameter


class _UnitGate(Function):
    """``x * gate`` where the gate is 1: nothing to compute but the derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:  # what reads it has no derivative
            return None, None
        return _UnitGateBackward.apply(*ctx.saved_tensors, grad)


class _UnitGateBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, grad)
        ctx.gate = gate.shape, gate.dtype
        ctx.set_materialize_grads(False)
        return grad.view_as(grad), _sum_product(x, grad, *ctx.gate)

    @staticmethod
    def backward(
        ctx: Any, dot: Tensor | None, gate_dot: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, grad = ctx.saved_tensors
        grad_x = grad_gate = grad_grad = None
        if gate_dot is not None:
            gate_dot = None if _all_one(gate_dot) else gate_dot
            grad_x, grad_grad = _scale(grad, gate_dot), _scale(x, gate_dot)
        if dot is not None:
            grad_gate = _sum_product(grad, dot, *ctx.gate)
            grad_grad = dot if grad_grad is None else grad_grad + dot
        return grad_x, grad_gate, grad_grad


def _sum_product(a: Tensor, b: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    parts = pieces(a, b) if shape[0] == 1 else [(a, b)]
    return _sum([(x.to(dtype) * y.to(dtype)).sum_to_size(shape) for x, y in parts])


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _all_one(factor: Tensor) -> bool:
    """Whether all are 1, where a look at them is free."""
    return factor.device.type == "cpu" and bool((factor == 1).all())


def _scale(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x * factor``; None = the factors are all 1."""
    return x if factor is None else (x * factor).to(x.dtype)
