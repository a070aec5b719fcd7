"""What is told apart by computing it, and what is rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sosp_hub.checkpoint.format.proof import adopt_dtypes, same_function, same_output


class Net(nn.Module):
    """May want to know where a weight lies."""

    def __init__(self, *, asks=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.asks = nn.Linear(64, 2048), nn.Linear(2048, 300), asks

    def forward(self, x):
        assert not self.asks or self.up.weight.data_ptr()
        return self.down(torch.relu(self.up(x)))


class InHalves(Net):
    """The same function; its sums are rounded otherwise."""

    def forward(self, x):
        assert not self.asks or self.up.weight.data_ptr()
        hidden, weight = torch.relu(self.up(x)), self.down.weight
        sums = [
            F.linear(hidden[:, part], weight[:, part]) for part in (slice(1024), slice(1024, None))
        ]
        return sums[0] + sums[1] + self.down.bias


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_no_other_function(dtype, asks):
    model, x = Net(asks=asks).to(dtype), torch.randn(50, 64, dtype=dtype)
    twin = InHalves(asks=asks).to(dtype)
    twin.load_state_dict(model.state_dict())
    assert same_output(twin, model, (x,), 1e-5) is (dtype == torch.float32)
    assert same_function(twin, model, (x,))
    with torch.no_grad():
        twin.down.bias[0] += 0.02
    assert not same_function(twin, model, (x,))


def test_each_tensor_has_the_dtype_that_it_has_in_the_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).bfloat16()
    model[1].float()
    wide = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
    adopt_dtypes(wide, model)
    assert (wide[0].weight.dtype, wide[0].weight.shape) == (torch.bfloat16, (9, 4))
    assert wide[1].weight.dtype == wide[1].running_mean.dtype == torch.float32
    assert wide[1].num_batches_tracked.dtype == torch.int64
    assert wide[2].weight.dtype == torch.bfloat16  # the model has none: as its first
