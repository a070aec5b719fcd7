"""``refine_steps``: blocks that are trained after their readers are solved."""

import copy
import logging

import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import PlanError
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from sosp_hub.structure.trace import trace
from tests.cases import CASES
from tests.compare import assert_close
from tests.reconstruction.test_rebuild import half_of, in_processes
from tests.structure.oracles import fill

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(6, 3)
        with torch.no_grad():
            self.first.down.weight *= 5
            self.second.down.weight *= 5

    def forward(self, x):
        return self.head(self.second(self.first(x), scale=0.5))


def net(num=9, size=24):
    torch.manual_seed(0)
    model = Net().double()
    batches = [(torch.randn(size, 6).double(), torch.zeros(size)) for _ in range(num)]
    graph = trace(model, (batches[0][0],))
    return model, graph, half_of(graph, ("neuron",)), batches


def trained_by_hand(block, start, uncut, inputs, kept, steps):
    """The really cut block, by Adam written out, on three batches of four; best of the fourth."""
    named = dict(block.named_parameters())
    sizes = {}
    for name, parameter in start.named_parameters():  # of what is kept, or makes what is not
        whole = parameter[:, kept] if name == "down.weight" else parameter
        sizes[name] = 0.01 * float(whole.detach().square().mean().sqrt())
    with torch.no_grad():
        targets = [uncut(*args) for args in inputs]
    fit = [i for i in range(len(inputs)) if i % 4 != 3]
    generator = torch.Generator().manual_seed(0)
    order = []
    while len(order) < steps:
        order += [fit[i] for i in torch.randperm(len(fit), generator=generator).tolist()]

    @torch.no_grad()
    def error():
        held_out = range(3, len(inputs), 4)
        off = sum((block(*inputs[i]) - targets[i]).square().sum() for i in held_out)
        return off / sum(targets[i].square().sum() for i in held_out)

    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in named.items()}
    errors = [error()]
    best = {name: p.detach().clone() for name, p in named.items()}
    scale = sum(targets[i].square().sum() for i in fit) / len(fit)
    for step in range(steps):
        loss = (block(*inputs[order[step]]) - targets[order[step]]).square().sum() / scale
        grads = torch.autograd.grad(loss, list(named.values()))
        for (name, p), grad in zip(named.items(), grads, strict=True):
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * grad)
            second.mul_(0.95).add_(0.05 * grad**2)
            first, second = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            rate = sizes[name] * min(1, (step + 1) / 5) * (1 - step / steps)
            with torch.no_grad():
                p -= rate * first / (second.sqrt() + 1e-8)
        if (step + 1) % (steps // 4) == 0:
            errors.append(error())
            if errors[-1] == min(errors):
                best = {name: p.detach().clone() for name, p in named.items()}
    return best, float(errors[0]), float(min(errors))


def test_a_block_equals_the_cut_block_trained_by_hand():
    model, graph, plan, batches = net()
    solved = rebuilt_weights(model, graph, plan, batches)
    found = rebuilt_weights(model, graph, plan, batches, refine_steps=40)
    assert [block.name for block in found.blocks] == ["first", "second"]
    start = sosp_hub.apply(solved.model, graph, solved.plan)
    inputs = [(x,) for x, _ in batches]
    kept = list(plan.kept["first.up:neuron"])
    best, before, after = trained_by_hand(
        start.first, solved.model.first, model.first, inputs, kept, 40
    )
    small = sosp_hub.apply(found.model, graph, found.plan)
    assert_close(dict(small.first.named_parameters()), best, relative=1e-7)
    assert found.blocks[0].error_before == pytest.approx(before, rel=1e-7)
    assert found.blocks[0].error == pytest.approx(after, rel=1e-7)
    assert after < 0.9 * before
    # the second one reads what the trained first one gives, and its named argument
    with torch.no_grad():
        read = [small.first(x) for x, _ in batches]
        off = [small.second(x, 0.5) - model.second(x, 0.5) for x in read[3::4]]
        size = sum(model.second(x, 0.5).square().sum() for x in read[3::4])
    error = float(sum(each.square().sum() for each in off) / size)
    assert found.blocks[1].error == pytest.approx(error, rel=1e-7)
    assert found.blocks[1].error < 0.9 * found.blocks[1].error_before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_block_gets_worse_and_every_cut_is_verified(case):
    model = fill(case.model())
    graph = trace(model, case.inputs(), outputs=None if case.library == "timm" else "logits")
    plan = half_of(graph)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batches = [case.batch(3) for _ in range(5)]
    rebuilt = rebuilt_weights(model, graph, plan, batches, refine_steps=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(model.state_dict(), before, relative=0)
    assert not any(parameter.requires_grad is False for parameter in rebuilt.model.parameters())
    for block in rebuilt.blocks:
        assert block.error <= block.error_before, block
    sosp_hub.apply(rebuilt.model, graph, rebuilt.plan, strict=True)


def test_a_language_model_comes_nearer_to_its_dense_outputs():
    (case,) = [case for case in CASES if case.name == "llama"]
    model = fill(case.model())
    graph = trace(model, case.inputs(), outputs="logits")
    plan = half_of(graph, ("neuron", "kv_group"))
    batches = [case.batch(6) for _ in range(12)]
    off = {}
    for steps in (0, 60):
        small = sosp_hub.rebuild(model, graph, plan, batches, refine_steps=steps)
        with torch.no_grad():
            off[steps] = sum(
                float((small(**b).logits - model(**b).logits).square().sum()) for b in batches
            )
    assert off[60] < 0.9 * off[0]


def test_padding_takes_no_part():
    (case,) = [case for case in CASES if case.name == "bert"]
    model = fill(case.model())
    graph = trace(model, case.inputs())
    plan = half_of(graph, ("neuron",))
    plain, padded = [], []
    for _ in range(5):
        tokens = case.batch(4)["input_ids"]
        more = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.long)], 1)
        mask = (torch.arange(more.shape[1]) < tokens.shape[1]).long().expand(4, -1)
        plain.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        padded.append({"input_ids": more, "attention_mask": mask})
    one, two = (
        rebuilt_weights(model, graph, plan, batches, damping=0.1, refine_steps=8)
        for batches in (plain, padded)
    )
    assert len(one.blocks) == len(two.blocks) == 2
    for first, second in zip(one.blocks, two.blocks, strict=True):
        assert second.error_before == pytest.approx(first.error_before, rel=1e-3)
        assert second.error == pytest.approx(first.error, rel=1e-2)


def test_processes_train_together():
    model, graph, plan, batches = net(12)
    shares = [batches[:4], batches[4:], []]
    found = in_processes(
        3,
        lambda rank, process_sum: rebuilt_weights(
            copy.deepcopy(model), graph, plan, shares[rank], refine_steps=40,
            process_sum=process_sum,
        ),
    )  # fmt: skip
    for one in found:
        assert_close(one.model.state_dict(), found[0].model.state_dict(), relative=0)
        assert one.blocks == found[0].blocks
    assert all(block.error < block.error_before for block in found[0].blocks)


def test_16_bits_are_trained_in_32():
    model, graph, plan, batches = net()
    half = model.bfloat16()
    batches = [(x.bfloat16(), y) for x, y in batches]
    graph = trace(half, (batches[0][0],))
    found = rebuilt_weights(half, graph, plan, batches, refine_steps=40)
    assert all(block.error < block.error_before for block in found.blocks)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.second.norm = self.first.norm


def test_a_weight_that_two_blocks_share_is_not_trained():
    _, _, _, batches = net()
    model = Tied().double()
    graph = trace(model, (batches[0][0],))
    plan = half_of(graph, ("neuron",))
    found = rebuilt_weights(model, graph, plan, batches, refine_steps=8)
    assert [len(block.parameters) for block in found.blocks] == [4, 4]
    assert torch.equal(found.model.first.norm.weight, model.first.norm.weight)


def test_few_batches_are_told_and_leave_what_was_solved(caplog):
    model, graph, plan, batches = net(3)
    with caplog.at_level(logging.INFO, logger="sosp_hub"):
        found = rebuilt_weights(model, graph, plan, batches, refine_steps=8)
    assert not found.blocks
    assert "'first' is not trained" in caplog.text
    assert "4 at the least" in caplog.text
    plain = rebuilt_weights(model, graph, plan, batches)
    assert_close(found.model.state_dict(), plain.model.state_dict(), relative=0)


class Drawn(Block):
    def forward(self, x, scale=1.0):
        return super().forward(nn.functional.dropout(x, 0.5, training=True), scale)


def test_a_block_that_draws_numbers_is_told_and_left(caplog):
    _, _, plan, batches = net()
    model = Net()
    model.first = Drawn()
    model = model.double()
    graph = trace(model, (batches[0][0],))
    with caplog.at_level(logging.INFO, logger="sosp_hub"):
        found = rebuilt_weights(model, graph, plan, batches, refine_steps=8)
    assert "'first' is not trained: it gives something else" in caplog.text
    assert [block.name for block in found.blocks] == ["second"]


@pytest.mark.parametrize("steps", [-1, 1.5, True, "many"])
def test_steps_that_are_none_are_refused(steps):
    model, graph, plan, batches = net()
    with pytest.raises(PlanError, match="refine_steps: got"):
        sosp_hub.rebuild(model, graph, plan, batches, refine_steps=steps)
