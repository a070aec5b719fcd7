"""Modules without weights that sit where an attention, an MLP or a whole block was taken out."""

from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format.record import Replacement
from sosp_hub.compat.transformers import find_cache


class StandIn(nn.Module):
    """Takes the place of a removed module.

    Args:
        tombstone: Name of a weight of the removed module. An empty tensor of that name makes a
            loader that does not know the delta stop at its shape instead of filling in random
            numbers.
    """

    def __init__(self, tombstone: str | None = None) -> None:
        super().__init__()
        self.tombstone = tombstone
        if tombstone is not None:
            *path, name = tombstone.split(".")
            holder: nn.Module = self
            for part in path:
                holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(name, nn.Parameter(torch.empty(0), requires_grad=False))


class RemovedBlock(StandIn):
    """Hands its first input on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - any block's arguments
        return args[0] if args else next(iter(kwargs.values()))


class RemovedMlp(StandIn):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: D102
        return torch.zeros_like(hidden_states)


class RemovedAttention(StandIn):
    """Adds nothing to the residual stream; writes one empty entry a token to the cache.

    The cache of layer 0 tells a model how many tokens it has seen, so an attention that leaves the
    cache alone gives wrong positions.

    Args:
        tombstone: See `StandIn`.
        layer_idx: Layer of the cache.
    """

    def __init__(self, tombstone: str | None = None, layer_idx: int | None = None) -> None:
        super().__init__(tombstone)
        self.layer_idx = layer_idx

    def forward(  # noqa: D102
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        cache = find_cache((*args, *kwargs.values()))
        if cache is not None and self.layer_idx is not None:
            batch, tokens = hidden_states.shape[:2]
            empty = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(empty, empty.clone(), self.layer_idx)
        return torch.zeros_like(hidden_states), None


def has_standins(model: nn.Module) -> bool:
    """Whether modules of a model were taken out."""
    return any(isinstance(module, StandIn) for module in model.modules())


def build_standin(one: Replacement) -> StandIn:
    """The stand-in that a delta asks for."""
    if one.kind == "attention":
        return RemovedAttention(one.tombstone, one.layer_idx)
    return {"identity": RemovedBlock, "mlp": RemovedMlp}[one.kind](one.tombstone)


def describe_standin(module: nn.Module, original: nn.Module) -> Replacement | None:
    """The delta's entry for a module that replaces ``original``; None if it is no stand-in."""
    tombstone = next((name for name, _ in original.named_parameters()), None)
    if isinstance(module, RemovedAttention):
        return Replacement("attention", tombstone, module.layer_idx)
    if isinstance(module, RemovedMlp):
        return Replacement("mlp", tombstone)
    if isinstance(module, RemovedBlock | nn.Identity) and not isinstance(original, nn.Identity):
        return Replacement("identity", tombstone)
    return None
