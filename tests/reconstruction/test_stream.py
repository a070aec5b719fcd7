"""Passes that go on from where a model is final: how often what runs, and what is held."""

import torch
from torch import nn

from sosp_hub.reconstruction.products import Watched
from sosp_hub.reconstruction.stream import Stream


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def stream_of(model, batches, ends="down.weight"):
    watched = {
        name: Watched(parameter, 1, parameter.shape[1])
        for name, parameter in model.named_parameters()
        if name.endswith(ends)
    }
    chain = [f"{i}" for i in range(len(model))]
    return Stream(model, watched, batches, [chain], (batches[0][0],), 5)


def test_every_block_runs_once_more_than_it_has_readers_and_one_output_is_held():
    model = nn.Sequential(*(Block() for _ in range(5))).eval()
    batches = [(torch.randn(n, 4), torch.zeros(n)) for n in (3, 2)]
    stream = stream_of(model, batches)
    calls = [0] * 5
    for i, block in enumerate(model):
        block.up.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    assert stream.order == [f"{i}.down.weight" for i in range(5)]
    for number, tensor in enumerate(stream.order):
        found = [rows.shape for products in stream.run(tensor) for _, _, rows, *_ in products]
        assert found == [(1, 3, 8), (1, 2, 8)]
        held = [name for name, values in stream._kept.items() if 0 not in values[0].stride()]
        assert held == ([f"{number - 1}"] if number else [])
    assert calls == [2 * len(batches)] * 4 + [len(batches)]


def test_what_is_handed_out_is_what_a_changed_weight_gives():
    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    batches = [(torch.randn(3, 4), torch.zeros(3))]
    stream = stream_of(model, batches)
    for number, tensor in enumerate(stream.order):
        rows = [products[0].rows for products in stream.run(tensor)]
        with torch.no_grad():
            x = batches[0][0]
            for block in model[:number]:
                x = block(x)
            torch.testing.assert_close(rows[0][0], torch.relu(model[number].up(x)))
            model.get_parameter(tensor).mul_(-3.0)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        return self.second(self.first(x))


def test_parts_of_a_block_that_is_trained_hand_out_nothing_from_before():
    model = nn.Sequential(Pair(), Block()).eval()
    x = torch.randn(3, 4)
    stream = stream_of(model, [(x, torch.zeros(3))])
    *before, last = stream.order
    for tensor in before:
        list(stream.run(tensor))
    with torch.no_grad():
        (given,) = stream.calls("0")
        torch.testing.assert_close(given.result, model[0](x))
        for parameter in model[0].parameters():
            parameter.mul_(-3.0)
        expected = torch.relu(model[1].up(model[0](x)))
        (products,) = stream.run(last)
        torch.testing.assert_close(products[0].rows[0], expected)


def test_a_changed_result_in_place_does_not_reach_what_is_held():
    class Double(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    model = nn.Sequential(Block(), Double(), Block(), Block()).eval()
    batches = [(torch.randn(3, 4), torch.zeros(3))]
    stream = stream_of(model, batches)
    with torch.no_grad():
        for position, tensor in zip((0, 2, 3), stream.order, strict=True):
            for products in stream.run(tensor):
                x = batches[0][0].clone()
                for block in model[:position]:
                    x = block(x)
                torch.testing.assert_close(products[0].rows[0], torch.relu(model[position].up(x)))


def test_a_block_that_changes_its_input_in_place_gets_it_whole_each_time():
    """As many residual networks do, whose block begins with an activation in place."""

    class Doubling(Block):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(4, 4)

        def forward(self, x):
            x = x.mul_(2)
            return super().forward(x) + self.side(x)

    model = nn.Sequential(Block(), Doubling(), Doubling()).eval()
    batches = [(torch.randn(3, 4), torch.zeros(3))]
    stream = stream_of(model, batches, (".up.weight", ".side.weight"))
    assert len(stream.order) == 5
    with torch.no_grad():
        for name in stream.order:
            number = int(name.partition(".")[0])
            x = model[:number](batches[0][0].clone())
            for products in stream.run(name):
                torch.testing.assert_close(products[0].rows[0], 2 * x if number else x)


def test_hooks_and_forwards_are_as_before():
    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    batches = [(torch.randn(3, 4), torch.zeros(3))]
    stream = stream_of(model, batches)
    for tensor in stream.order:
        list(stream.run(tensor))
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
