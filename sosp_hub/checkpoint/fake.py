"""Models that hold no data and still run, to learn shapes and costs."""

from typing import Any

import torch
from torch import nn


def to_fake(model: nn.Module) -> nn.Module:
    """Gives a model empty tensors, in place; inside a ``FakeTensorMode`` they take no memory."""
    done: dict[int, Any] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_buffer = table is module._buffers
                    done[id(tensor)] = fake if is_buffer else nn.Parameter(fake, False)
                table[name] = done[id(tensor)]
    return model
