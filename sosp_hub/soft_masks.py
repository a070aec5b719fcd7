"""BatchNorm and ReLU as a pair: how probable it is that a channel is off, and masks made of that.

The masks of SCP (Kang and Han, ICML 2020, arXiv 2007.03938): they need no parameters of their own,
since how probably a channel is masked follows from the BatchNorm in front of its ReLU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sosp_hub.compat.torch import BatchNorm
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


@dataclass(frozen=True)
class SoftMasks:
    """Masks on the channels of a model that are read behind BatchNorm and ReLU pairs alone.

    A channel is cut with probability ``p = sigmoid(k (CDF - c0))``, where ``CDF`` is the
    probability that it is off. While training a mask is the keep component of a relaxed one-hot
    sample (Gumbel-softmax) over ``[p, 1 - p]``; in eval mode it is 1 where ``CDF <= c0``, else 0.

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
            for name, masked in self._positions.items():
                before, after = self._hooks(masked)
                norm = self.model.get_submodule(name)
                stack.callback(norm.register_forward_pre_hook(before).remove)
                stack.callback(norm.register_forward_hook(after).remove)
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

    def _hooks(self, masked: Tensor) -> tuple[Callable[..., None], Callable[..., Tensor]]:
        kept: dict[str, Tensor] = {}

        def before(norm: nn.Module, _: object) -> None:
            if norm.training:
                names = ("running_mean", "running_var") if norm.track_running_stats else ()
                kept.update({name: norm.get_buffer(name).clone() for name in names})

        def after(norm: nn.Module, _: object, result: Tensor) -> Tensor:
            beta, gamma, where = norm.bias, norm.weight, masked.to(result.device)
            if norm.training:
                off = off_probability(beta.float(), gamma.float(), self.t)  # pyright: ignore
                noise = torch.rand_like(off).clamp(1e-6, 1 - 1e-6).logit()  # of two Gumbels
                keep = torch.sigmoid((self.k * (self.c0 - off) + noise) / self.tau)
                idle = where & (keep < 0.5)
                for name, old in kept.items():  # `data`: the backward pass has saved the statistic
                    norm.get_buffer(name).data[idle] = old[idle]
            else:
                keep = self._stays(beta, gamma).float()  # pyright: ignore
            keep = torch.where(where, keep, 1.0).to(result.dtype)
            return result * keep.view(-1, *[1] * (result.ndim - 2))

        return before, after
