"""What a module of no library was before it was cut: the same modules, without data.

No config builds it again, so a cut model carries it.
"""

import hashlib
from typing import Any

import torch
from torch import nn

from sosp_hub.compat.torch import child_table
from sosp_hub.structure.copies import copy_model

SKELETON = "_sosp_hub_skeleton"
"""Set on a cut model: its modules before the first cut."""


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy whose parameters and saved buffers are on the meta device, before any cut.

    Buffers that no state holds keep their values, as whoever builds the model again has them.
    """
    if (known := vars(model).get(SKELETON)) is not None:
        return copy_model(known)
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in saved or isinstance(tensor, nn.Parameter):
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    skeleton = copy_model(model, memo)
    for name, module in list(skeleton.named_modules(remove_duplicate=False)):
        if (known := vars(module).get(SKELETON)) is not None:  # a cut model inside another
            owner, _, child = name.rpartition(".")
            child_table(skeleton.get_submodule(owner))[child] = known
    return skeleton


def outline_of(skeleton: nn.Module) -> str:
    """A hash of the names of all modules and of their classes."""
    lines = (
        f"{name} {type(module).__name__}\n"
        for name, module in skeleton.named_modules(remove_duplicate=False)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def torch_version() -> str:
    """Torch's version, without its build tag."""
    return torch.__version__.partition("+")[0]
