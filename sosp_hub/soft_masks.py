"""BatchNorm and ReLU as a pair: how probable it is that a channel is off, and masks made of that.

The masks of SCP (Kang and Han, ICML 2020, arXiv 2007.03938): they need no parameters of their own,
since how probably a channel is masked follows from the BatchNorm in front of its ReLU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import BatchNorm
from sosp_hub.cost import CostModel
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group, Groups


def off_probability(beta: Tensor, gamma: Tensor, t: float) -> Tensor:
    """``Phi((t - beta) / (abs(gamma) + 1e-8))``: a normal channel is below ``t``."""
    return torch.special.ndtr((t - beta) / (gamma.abs() + 1e-8))


def off_probabilities(model: nn.Module, group: Group, t: float) -> Tensor:
    """Of each structure, where it is most probably on. Float64, ``(structures,)``, on the CPU."""
    lowest = torch.ones(group.size, dtype=torch.float64)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in group.rectified:
        gamma, beta = (model.get_parameter(f"{name}.{part}") for part in ("weight", "bias"))
        off = off_probability(beta.detach().cpu().double(), gamma.detach().cpu().double(), t)
        for member in group.members:
            if parameters.get(member.tensor) is gamma:
                index = torch.from_numpy(member.index)
                lowest.scatter_reduce_(0, index[index >= 0], off[index >= 0], "amin")
    return lowest


def layer_channels(groups: Groups) -> dict[str, tuple[str, ...]]:
    """For each layer that may go the groups behind pairs that are inside it, where it has some."""
    inner = {
        layer: tuple(
            name
            for name, group in groups.items()
            if group.rectified
            and all(member.tensor.startswith(f"{layer}.") for member in group.members)
        )
        for group in groups.values()
        for layer in group.layers
    }
    return {layer: names for layer, names in inner.items() if names}


def margins(model: nn.Module, groups: Groups, t: float, c0: float) -> dict[str, Tensor]:
    """``c0 - CDF`` of each structure: below 0 where it is off.

    Of a layer it is that of the channel inside it which is most probably on; a layer without
    channels behind pairs is never off (1).
    """
    result = {
        name: c0 - off_probabilities(model, group, t)
        for name, group in groups.items()
        if group.rectified
    }
    inner = layer_channels(groups)
    for name, group in groups.items():
        if group.layers:
            best = [
                max((float(result[channels].max()) for channels in inner.get(layer, ())), default=1)
                for layer in group.layers
            ]
            result[name] = torch.tensor(best, dtype=torch.float64)
    return {name: result[name] for name in groups if name in result}


@dataclass(frozen=True)
class SoftMasks:
    """Masks on the channels of a model that are read behind BatchNorm and ReLU pairs alone.

    A channel is cut with probability ``p = sigmoid(k (CDF - c0))``, where ``CDF`` is the
    probability that it is off. While training a mask is the keep component of a relaxed one-hot
    sample (Gumbel-softmax) over ``[p, 1 - p]``; in eval mode it is 1 where ``CDF <= c0``, else 0.
    A layer of a stack, where ``groups`` has such, hands on its input while all channels inside it
    are cut.

    Differs from the paper: the mask multiplies the BatchNorm's output, which behind a ReLU is the
    same; behind a ReLU6 it is so for masks of 0 and 1.

    Attributes:
        model: The model.
        groups: Its groups; those without pairs have no masks.
        t: Below this a channel counts as off.
        c0: Probability of being off above which a channel goes.
        k: Steepness of the probability of being cut.
        tau: Temperature of the relaxed sample.
    """

    model: nn.Module
    groups: Groups
    t: float = 0.05
    c0: float = 0.95
    k: float = 20.0
    tau: float = 0.5

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs with masks; running statistics move for sampled channels alone."""
        with ExitStack() as stack:
            on: dict[str, Tensor] = {}
            for name, masked in self._positions.items():
                before, after = self._hooks(name, masked, on)
                norm = self.model.get_submodule(name)
                stack.callback(norm.register_forward_pre_hook(before).remove)
                stack.callback(norm.register_forward_hook(after, prepend=True).remove)
            for layer, norms in self._norms_of_layers.items():
                hook, module = self._layer_hook(norms, on), self.model.get_submodule(layer)
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
            yield

    def penalty(self, sparsity: float, weight_decay: float) -> Tensor:
        """What the loss gets in addition.

        ``sparsity * sum(beta + 2 abs(gamma))`` over the channels with masks, and the L2 penalty
        ``weight_decay / 2 * sum(gamma^2)`` of all BatchNorms, whose ``beta`` has none.
        """
        scales = [m.weight for m in self.model.modules() if isinstance(m, BatchNorm) and m.affine]
        total = 0.5 * weight_decay * torch.stack([gamma.square().sum() for gamma in scales]).sum()
        for name, masked in self._positions.items():
            gamma, beta = self._parameters(name)
            mask = masked.to(beta.device)
            total = total + sparsity * (beta + 2 * gamma.abs())[mask].sum()
        return total

    @torch.no_grad()
    def harden_(self) -> int:
        """Silences what the masks cut, in place: the model without masks equals the masked one.

        A layer all of whose channels are silent still adds a constant; what scores below 0 in
        `margins` names it, and a plan without it equals the masked model.

        Returns:
            Number of channels of BatchNorms that are off now.
        """
        number = 0
        for name, masked in self._positions.items():
            gamma, beta = self._parameters(name)
            off = masked.to(beta.device) & ~self._stays(beta, gamma)
            gamma[off] = 0
            beta[off] = 0
            number += int(off.sum())
        return number

    def _stays(self, beta: Tensor, gamma: Tensor) -> Tensor:
        return off_probability(beta.detach().double(), gamma.detach().double(), self.t) <= self.c0

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        weight, bias = (self.model.get_parameter(f"{name}.{part}") for part in ("weight", "bias"))
        return weight, bias

    @cached_property
    def _positions(self) -> dict[str, Tensor]:
        """For each BatchNorm of a pair which of its channels have masks."""
        positions: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for group in self.groups.values():
            for name in group.rectified:
                gamma, _ = self._parameters(name)
                masked = positions.setdefault(name, torch.zeros(len(gamma), dtype=torch.bool))
                for member in group.members:
                    if parameters.get(member.tensor) is gamma:
                        masked |= torch.from_numpy(member.index >= 0)
        return positions

    @cached_property
    def _norms_of_layers(self) -> dict[str, tuple[str, ...]]:
        """For each layer that may go the BatchNorms of the channels inside it."""
        return {
            layer: tuple(
                dict.fromkeys(norm for name in names for norm in self.groups[name].rectified)
            )
            for layer, names in layer_channels(self.groups).items()
        }

    def _layer_hook(self, norms: tuple[str, ...], on: Mapping[str, Tensor]) -> Callable[..., Any]:
        def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if any(bool(on[norm].any()) for norm in norms):
                return result
            # `0 * result`: wrappers that reduce gradients miss parameters that no loss depends on
            skipped = args[0] + 0 * (result if isinstance(result, Tensor) else result[0])
            if isinstance(result, Tensor):
                return skipped
            return type(result)((skipped, *result[1:]))

        return after

    def _hooks(
        self, name: str, masked: Tensor, on: dict[str, Tensor]
    ) -> tuple[Callable[..., None], Callable[..., Tensor]]:
        kept: dict[str, Tensor] = {}

        def before(norm: nn.Module, _: object) -> None:
            if norm.training:
                buffers = ("running_mean", "running_var") if norm.track_running_stats else ()
                kept.update({buffer: norm.get_buffer(buffer).clone() for buffer in buffers})

        def after(norm: nn.Module, _: object, result: Tensor) -> Tensor:
            beta, gamma, where = norm.bias, norm.weight, masked.to(result.device)
            if norm.training:
                off = off_probability(beta.float(), gamma.float(), self.t)  # pyright: ignore
                noise = torch.rand_like(off).clamp(1e-6, 1 - 1e-6).logit()  # of two Gumbels
                keep = torch.sigmoid((self.k * (self.c0 - off) + noise) / self.tau)
                idle = where & (keep < 0.5)
                for buffer, old in kept.items():  # `data`: the backward pass has saved it
                    norm.get_buffer(buffer).data[idle] = old[idle]
            else:
                keep = self._stays(beta, gamma).float()  # pyright: ignore
            on[name] = where & (keep >= 0.5)
            keep = torch.where(where, keep, 1.0).to(result.dtype)
            return result * keep.view(-1, *[1] * (result.ndim - 2))

        return before, after


class PenaltyControl:
    """The weight of the penalty at a step: as given until the masks meet a budget, then 0.

    Channels that come back are pushed again, so that the budget holds while the rest of the
    training goes on without a penalty. Without a budget the weight is always as given.

    Args:
        masks: The masks.
        graph: Of their model.
        budget: Shares that are to be kept: ``macs``, ``params``, ``memory_bytes``, ``structures``.
        weight: Of the penalty.

    Attributes:
        weight: As given.
        num_steps: How many steps were asked for.
        num_penalized: In how many of them the weight was not 0.
    """

    INTERVAL = 10  # steps between two looks at the masks

    def __init__(
        self, masks: SoftMasks, graph: Graph, budget: Mapping[str, float], weight: float
    ) -> None:
        self.masks, self.budget, self.weight = masks, dict(budget), weight
        self.num_steps = self.num_penalized = 0
        self._cost = CostModel(graph)
        self._dense = self._quantities(
            {name: list(range(group.size)) for name, group in masks.groups.items()}
        )
        self._penalize = True

    def __call__(self) -> float:
        """The weight at the next step."""
        if self.budget and self.num_steps % self.INTERVAL == 0:
            self._penalize = not self.holds()
        self.num_steps += 1
        self.num_penalized += self._penalize
        return self.weight if self._penalize else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on needs, so that it ends as if it had never stopped."""
        return {
            "num_steps": self.num_steps,
            "num_penalized": self.num_penalized,
            "penalizes": self._penalize,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.num_steps, self.num_penalized = state["num_steps"], state["num_penalized"]
        self._penalize = state["penalizes"]

    def shares(self) -> dict[str, float]:
        """What the masks leave of each quantity, as a share of the dense model's."""
        scores = margins(self.masks.model, self.masks.groups, self.masks.t, self.masks.c0)
        kept = {name: (values >= 0).nonzero()[:, 0].tolist() for name, values in scores.items()}
        return {
            name: number / max(1, self._dense[name])
            for name, number in self._quantities(kept).items()
        }

    def holds(self) -> bool:
        """Whether the masks leave no more than the budget allows."""
        shares = self.shares()
        return all(shares[name] <= share for name, share in self.budget.items())

    def _quantities(self, kept: Mapping[str, list[int]]) -> dict[str, int]:
        counts = {name: max(1, len(indices)) for name, indices in kept.items()}
        layers = {name: kept[name] or [0] for name in kept if self.masks.groups[name].layers}
        cost = self._cost(counts, layers)
        return {
            "macs": cost.macs,
            "params": cost.params,
            "memory_bytes": cost.bytes,
            "structures": sum(counts.values()),
        }
