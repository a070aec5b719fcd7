"""Models that hold no data and still run, to learn shapes and costs."""

from typing import Any

import torch
from torch import nn

from sosp_hub.compat.torch import buffer_table, parameter_table


def to_fake(model: nn.Module) -> nn.Module:
    """Gives a model empty tensors, in place; inside a ``FakeTensorMode`` they take no memory."""
    done: dict[int, Any] = {}
    for module in model.modules():
        for table in (parameter_table(module), buffer_table(module)):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_buffer = table is buffer_table(module)
                    done[id(tensor)] = fake if is_buffer else nn.Parameter(fake, False)
                table[name] = done[id(tensor)]
    return model
