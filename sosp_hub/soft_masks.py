"""BatchNorm and ReLU as a pair: how probable it is that a channel is off."""

import torch
from torch import Tensor, nn

from sosp_hub.structure.groups import Group


def off_probability(beta: Tensor, gamma: Tensor, t: float) -> Tensor:
    """``Phi((t - beta) / (abs(gamma) + 1e-8))``: a normal channel is below ``t``."""
    return torch.special.ndtr((t - beta) / (gamma.abs() + 1e-8))


def off_probabilities(model: nn.Module, group: Group, t: float) -> Tensor:
    """Of each structure, where it is most probably on. Float64, ``(structures,)``, on the CPU."""
    lowest = torch.ones(group.size, dtype=torch.float64)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in group.rectified:
        gamma, beta = (model.get_parameter(f"{name}.{part}") for part in ("weight", "bias"))
        off = off_probability(beta.detach().double(), gamma.detach().double(), t).cpu()
        for member in group.members:
            if parameters.get(member.tensor) is gamma:
                index = torch.from_numpy(member.index)
                lowest.scatter_reduce_(0, index[index >= 0], off[index >= 0], "amin")
    return lowest
