"""Tensors of a model by their names."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sosp_hub.compat.torch import buffer_table, parameter_table, put_in

Positions = Sequence[NDArray[np.int64] | None]
"""What stays along each dimension of a tensor; None = all."""


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = parameter_table(module).get(leaf)
    tensor = parameter if parameter is not None else buffer_table(module)[leaf]
    assert tensor is not None
    return tensor


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a parameter or buffer in the place of the one of this name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    put_in(module, leaf, tensor)
