"""``rebuild`` against least squares written out, on what the layers before now give."""

import copy
import logging
import operator
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sosp_hub
from sosp_hub.errors import DataError, PlanError, VerificationError
from sosp_hub.plan import PruningPlan
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from sosp_hub.reconstruction.ridge import Layer
from sosp_hub.structure.trace import call, trace
from tests.cases import CASES, with_trait
from tests.compare import assert_close
from tests.structure.oracles import fill
from tests.structure.test_experts import build as build_experts
from tests.structure.test_trace import Standardised
from tests.surgery.test_apply import WritesToItself

pytestmark = pytest.mark.slow

DAMPING = 0.1


def half_of(graph, kinds=("channel", "head", "kv_group", "neuron"), seed=0):
    """A plan that keeps half of every group of these kinds, at random."""
    groups = {name: group for name, group in graph.groups.items() if group.kind in kinds}
    saliency = {
        name: torch.rand(group.size, generator=torch.Generator().manual_seed(seed + i))
        for i, (name, group) in enumerate(groups.items())
    }
    return sosp_hub.allocate(graph, saliency, structures=0.5, kinds=kinds)


# The oracle: rows of inputs, columns of outputs, one ``lstsq`` ---------------------------------


def least_squares(x, start, dense, bias, kept, target=None):
    """Weights ``(outputs, inputs)`` and bias: the damping is rows of data, the bias a column."""
    target = (x if target is None else target) @ dense.T + (0 if bias is None else bias)
    centred = x if bias is None else x - x.mean(0)
    level = DAMPING * centred[:, kept].square().sum(0).mean()
    rows, wanted = x[:, kept], target
    ridge = level.sqrt() * torch.eye(len(kept), dtype=x.dtype)
    pull = level.sqrt() * start[:, kept].T
    if bias is not None:
        rows = torch.cat([rows, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        ridge = torch.cat([ridge, torch.zeros(len(kept), 1, dtype=x.dtype)], 1)
    found = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([wanted, pull])).solution
    new = torch.zeros_like(dense)
    new[:, kept] = found[: len(kept)].T
    return new, None if bias is None else found[-1]


class Perceptron(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 7, bias=bias)
        self.c = nn.Linear(7, 3, bias=bias)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


@pytest.fixture
def batches():
    return [(torch.randn(n, 6, dtype=torch.float64), torch.zeros(n)) for n in (9, 17, 4)]


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(9, 17, 4), (2, 1)], ids=["many rows", "few rows"])
def test_two_layers_equal_lstsq_on_what_is_pruned_so_far(rows, bias, share):
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.zeros(n)) for n in rows]
    model = Perceptron(bias).double()
    graph = trace(model, (batches[0][0],))
    plan = PruningPlan(
        {"a:neuron": (0, 2, 3, 6), "b:neuron": (1, 4, 5)}, {"a:neuron": 8, "b:neuron": 7}
    )
    found = sosp_hub.rebuild(model, graph, plan, batches, damping=DAMPING, dense_share=share)

    def solved(layer, x, kept, target):
        w, b = layer.weight.detach(), layer.bias.detach() if bias else None
        start = torch.zeros_like(w)
        start[:, kept] = w[:, kept]
        return least_squares(x, start, w, b, kept, (1 - share) * x + share * target)

    x = torch.cat([inputs for inputs, _ in batches])
    kept_a, kept_b = list(plan.kept["a:neuron"]), list(plan.kept["b:neuron"])
    hidden = torch.relu(model.a(x)).detach()
    new, constant = solved(model.b, hidden, kept_a, hidden)
    assert_close(found.b.weight, new[kept_b][:, kept_a], relative=1e-9)
    if bias:
        assert_close(found.b.bias, constant[kept_b], relative=1e-9)
    dense = torch.tanh(model.b(hidden)).detach()
    hidden = torch.tanh(hidden @ new.T + (constant if bias else 0))
    new, constant = solved(model.c, hidden, kept_b, dense)
    assert_close(found.c.weight, new[:, kept_b], relative=1e-9)
    if bias:
        assert_close(found.c.bias, constant, relative=1e-9)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_errors_are_shares_of_what_a_layer_computes_of_its_own_inputs(share):
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.zeros(n)) for n in (9, 17, 4)]
    model = Perceptron(bias=False).double()
    graph = trace(model, (batches[0][0],))
    plan = PruningPlan({"a:neuron": (0, 2), "b:neuron": (1, 4, 5)}, {"a:neuron": 8, "b:neuron": 7})
    found = rebuilt_weights(model, graph, plan, batches, damping=DAMPING, dense_share=share)
    told = found.layers[1]
    assert told.tensor == "c.weight"
    with torch.no_grad():
        x = torch.cat([inputs for inputs, _ in batches])
        dense = torch.tanh(model.b(torch.relu(model.a(x))))
        own = torch.tanh(found.model.b(torch.relu(model.a(x))))
        target = model.c((1 - share) * own + share * dense)
        gone = [i for i in range(7) if i not in plan.kept["b:neuron"]]
        kept = own.index_fill(1, torch.tensor(gone), 0)
        for error, reader in ((told.error_cut, model.c), (told.error, found.model.c)):
            off = (reader(kept) - target).square().sum() / model.c(own).square().sum()
            assert error == pytest.approx(float(off), rel=1e-9)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(6, 4, 3), F.unfold, {"kernel_size": 3}),
    "strided": (nn.Conv2d(6, 4, 3, 2, 1), F.unfold, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "dilated": (
        nn.Conv2d(6, 4, (3, 2), dilation=(2, 1), padding=(1, 0), bias=False),
        F.unfold,
        {"kernel_size": (3, 2), "dilation": (2, 1), "padding": (1, 0)},
    ),
    "one": (nn.Conv2d(6, 4, 1), F.unfold, {"kernel_size": 1}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_lstsq_on_unfolded_patches(name):
    reader, unfold, window = CONVOLUTIONS[name]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), copy.deepcopy(reader)).double()
    images = torch.randn(40, 3, 7, 7, dtype=torch.float64)
    graph = trace(model, (images[:2],))
    plan = PruningPlan({"0:channel": (1, 2, 5)}, {"0:channel": 6})
    found = sosp_hub.rebuild(model, graph, plan, [(images, torch.zeros(40))], damping=DAMPING)
    x = unfold(model[1](model[0](images)).detach(), **window).transpose(1, 2).flatten(0, 1)
    taps = model[2].weight[0, 0].numel()
    kept = [channel * taps + tap for channel in (1, 2, 5) for tap in range(taps)]
    w = model[2].weight.detach().flatten(1)
    start = torch.zeros_like(w)
    start[:, kept] = w[:, kept]
    b = None if model[2].bias is None else model[2].bias.detach()
    new, constant = least_squares(x, start, w, b, kept)
    assert_close(found[2].weight.flatten(1), new[:, kept], relative=1e-9)
    if b is not None:
        assert_close(found[2].bias, constant, relative=1e-9)


def test_a_convolution_looks_at_some_positions_of_large_images():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    images = torch.randn(16, 3, 20, 20, dtype=torch.float64)
    graph = trace(model, (images[:2],))
    plan = PruningPlan({"0:channel": (1, 2, 5)}, {"0:channel": 6})
    first, again = (
        rebuilt_weights(model, graph, plan, [(images, torch.zeros(16))]) for _ in range(2)
    )
    assert first.layers[0].rows == 16 * 64
    assert_close(again.model.state_dict(), first.model.state_dict(), relative=0)


def test_batches_make_no_difference_to_what_is_drawn_and_held_out():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    images = torch.randn(16, 3, 20, 20, dtype=torch.float64)
    graph = trace(model, (images[:2],))
    plan = PruningPlan({"0:channel": (1, 2, 5)}, {"0:channel": 6})
    one, two = (
        rebuilt_weights(model, graph, plan, [(part, torch.zeros(len(part))) for part in parts])
        for parts in (images.split(16), images.flip(0).split(5))
    )
    assert_close(two.model.state_dict(), one.model.state_dict(), relative=1e-9)
    assert two.layers[0].damping == one.layers[0].damping


def test_a_constant_of_a_convolution_goes_into_the_mean_of_the_norm_behind_it():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)
    )
    model = model.double().eval()
    images = torch.randn(40, 3, 7, 7, dtype=torch.float64)
    graph = trace(model, (images[:2],))
    plan = PruningPlan({"0:channel": (1, 2, 5)}, {"0:channel": 6})
    found = sosp_hub.rebuild(
        model, graph, plan, [(images, torch.zeros(40))], damping=DAMPING, norms=False
    )
    x = F.unfold(model[1](model[0](images)).detach(), 3).transpose(1, 2).flatten(0, 1)
    kept = [channel * 9 + tap for channel in (1, 2, 5) for tap in range(9)]
    w = model[2].weight.detach().flatten(1)
    start = torch.zeros_like(w)
    start[:, kept] = w[:, kept]
    new, constant = least_squares(x, start, w, torch.zeros(4, dtype=torch.float64), kept)
    assert_close(found[2].weight.flatten(1), new[:, kept], relative=1e-9)
    assert_close(found[3].running_mean, -constant, relative=1e-9)
    assert_close(found[3].running_var, model[3].running_var, relative=0)


class ReadBesideItsNorm(nn.Module):
    """What the second convolution makes is also read without the norm behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.b(self.a(x).relu())
        return self.norm(x) + x


def test_a_norm_takes_no_constant_of_what_is_read_beside_it():
    model = ReadBesideItsNorm().double().eval()
    images = torch.randn(40, 3, 3, 3, dtype=torch.float64)
    graph = trace(model, (images[:2],))
    plan = PruningPlan({"a:channel": (1, 2, 5)}, {"a:channel": 6})
    found = sosp_hub.rebuild(
        model, graph, plan, [(images, torch.zeros(40))], damping=DAMPING, norms=False
    )
    assert_close(found.norm.running_mean, model.norm.running_mean, relative=0)
    x, w = model.a(images).relu().detach().movedim(1, -1).flatten(0, 2), model.b.weight.detach()
    start = w.flatten(1) * torch.tensor([0, 1, 1, 0, 0, 1.0])
    new, _ = least_squares(x, start, w.flatten(1), None, [1, 2, 5])
    assert_close(found.b.weight.flatten(1), new[:, [1, 2, 5]], relative=1e-9)


class SharesABias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 7)
        self.c.bias = self.b.bias

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


def test_a_bias_of_two_layers_takes_no_constant_of_one(batches):
    model = SharesABias().double().eval()
    graph = trace(model, (batches[0][0],))
    kept = [0, 2, 3, 7]
    plan = PruningPlan({"a:neuron": tuple(kept)}, {"a:neuron": 8})
    found = sosp_hub.rebuild(model, graph, plan, batches, damping=DAMPING)
    assert_close(found.b.bias, model.b.bias, relative=0)
    x = torch.cat([model.a(x).relu() for x, _ in batches]).detach()
    w = model.b.weight.detach()
    start = torch.zeros_like(w)
    start[:, kept] = w[:, kept]
    new, _ = least_squares(x, start, w, None, kept)
    assert_close(found.b.weight, new[:, kept], relative=1e-9)


def test_groups_of_a_convolution_are_solved_one_by_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)).double()
    images = torch.randn(40, 3, 7, 7, dtype=torch.float64)
    graph = trace(model, (images[:2],))
    name = next(name for name, group in graph.groups.items() if group.size == 4)
    plan = PruningPlan({name: (0, 3)}, {name: 4})
    found = sosp_hub.rebuild(model, graph, plan, [(images, torch.zeros(40))], damping=DAMPING)
    hidden = model[1](model[0](images)).detach()
    kept = [channel * 9 + tap for channel in (0, 3) for tap in range(9)]
    for part in range(2):
        x = F.unfold(hidden[:, 4 * part : 4 * part + 4], 3).transpose(1, 2).flatten(0, 1)
        outputs = slice(3 * part, 3 * part + 3)
        w, b = model[2].weight.detach()[outputs].flatten(1), model[2].bias.detach()[outputs]
        start = torch.zeros_like(w)
        start[:, kept] = w[:, kept]
        new, constant = least_squares(x, start, w, b, kept)
        assert_close(found[2].weight[outputs].flatten(1), new[:, kept], relative=1e-9)
        assert_close(found[2].bias[outputs], constant, relative=1e-9)


TRANSPOSED = {
    "strided": nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1),
    "window longer than stride": nn.ConvTranspose2d(6, 4, (3, 2), (1, 2), bias=False),
    "dilated, in groups": nn.ConvTranspose2d(6, 4, 2, 2, dilation=(1, 2), groups=2, padding=1),
    "one dimension": nn.ConvTranspose1d(6, 4, 4, 2, 1),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_equal_lstsq_on_their_own_linear_map(name):
    """The oracle finds what an output place is made of by differentiating it by the weights."""
    reader = TRANSPOSED[name]
    num = reader.weight.dim() - 2
    first = (nn.Conv1d, nn.Conv2d)[num - 1](3, 6, 1)
    model = nn.Sequential(first, nn.Tanh(), copy.deepcopy(reader)).double()
    images = torch.randn(12, 3, *(3, 4)[:num], dtype=torch.float64)
    graph = trace(model, (images[:2],))
    group = next(n for n, g in graph.groups.items() if g.size == 6 // reader.groups)
    keep = (0, 2) if reader.groups == 2 else (1, 2, 5)
    plan = PruningPlan({group: keep}, {group: 6 // reader.groups})
    found = sosp_hub.rebuild(model, graph, plan, [(images, torch.zeros(12))], damping=DAMPING)
    hidden = model[1](model[0](images)).detach()
    weight, outputs = model[2].weight.detach(), 4 // reader.groups
    each = 6 // reader.groups
    for part in range(reader.groups):
        lone = copy.deepcopy(model[2])
        lone.groups, lone.bias = 1, None
        mine = weight[part * each : part * each + each, :1]

        def made(w, lone=lone, part=part):
            lone.weight = nn.Parameter(w, requires_grad=False)
            return lone(hidden[:, part * each : part * each + each])

        units = torch.eye(mine.numel(), dtype=torch.float64).view(-1, *mine.shape)
        x = torch.stack([made(unit).flatten() for unit in units], 1)
        taps = mine[0, 0].numel()
        kept = [channel * taps + tap for channel in keep for tap in range(taps)]
        of_part = weight[part * each : part * each + each]
        w = of_part.transpose(0, 1).flatten(1)
        start = torch.zeros_like(w)
        start[:, kept] = w[:, kept]
        ends = slice(part * outputs, part * outputs + outputs)
        bias = None if reader.bias is None else model[2].bias.detach()[ends]
        new, constant = least_squares(x, start, w, bias, kept)
        now = found[2].weight[part * len(keep) : (part + 1) * len(keep)]
        assert_close(now.transpose(0, 1).flatten(1), new[:, kept], relative=1e-9)
        if bias is not None:
            assert_close(found[2].bias[ends], constant, relative=1e-9)


def test_an_expert_is_fitted_to_its_own_tokens():
    model, graph = build_experts("mixtral", "eager")
    model.double()
    plan = half_of(graph, ("neuron",))
    tokens = torch.randint(3, 90, (24, 16))
    batches = [{"input_ids": tokens, "labels": tokens}]
    rebuilt = rebuilt_weights(model, graph, plan, batches, damping=DAMPING)
    assert [layer.tensor for layer in rebuilt.layers] == list(
        dict.fromkeys(m.tensor for name in plan.kept for m in graph.readers(name))
    )
    name = rebuilt.layers[0].tensor  # of the first layer: nothing before it was cut
    owner = model.get_submodule(name.rpartition(".")[0])
    seen = {}

    def note(module, args):
        hidden, chosen, _ = args
        for expert in range(module.num_experts):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = F.linear(x, module.gate_up_proj[expert]).chunk(2, -1)
            seen[expert] = (module.act_fn(gate) * up).detach()

    handle = owner.register_forward_pre_hook(note)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    kept = list(next(iter(plan.kept.values())))
    assert len({len(x) for x in seen.values()}) > 1
    for expert, x in seen.items():
        w = owner.down_proj[expert].detach()
        start = torch.zeros_like(w)
        start[:, kept] = w[:, kept]
        new, _ = least_squares(x, start, w, None, kept)
        assert_close(rebuilt.model.get_parameter(name)[expert], new, relative=1e-8)


def test_of_experts_each_that_came_out_worse_stays_as_the_cut_left_it(monkeypatch):
    model, graph = build_experts("mixtral", "eager")
    plan = half_of(graph, ("neuron",))
    tokens = torch.randint(3, 90, (24, 16))
    solved = Layer.solved

    def ruined(self, gram, dampings):
        for new in solved(self, gram, dampings):
            new.start[1] += 100 * (new.start[1] != 0)
            yield new

    monkeypatch.setattr(Layer, "solved", ruined)
    batches = [{"input_ids": tokens, "labels": tokens}]
    rebuilt = rebuilt_weights(model, graph, plan, batches, damping=DAMPING)
    name = rebuilt.layers[0].tensor
    kept = list(next(iter(plan.kept.values())))
    before, after = (m.get_parameter(name).detach()[:, :, kept] for m in (model, rebuilt.model))
    assert_close(after[1], before[1], relative=0)
    assert (after[0] - before[0]).abs().max() > 1e-4
    assert all(layer.error <= layer.error_cut for layer in rebuilt.layers)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_grouped_and_batched_products_are_those_of_the_experts(family):
    found = {}
    for kernel in ("eager", "grouped_mm", "batched_mm"):
        model, graph = build_experts(family, kernel)
        tokens = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0))
        plan = half_of(graph, ("neuron",))
        rebuilt = rebuilt_weights(model, graph, plan, [{"input_ids": tokens}], damping=DAMPING)
        name = rebuilt.layers[0].tensor
        assert not rebuilt.left
        found[kernel] = rebuilt.model.get_parameter(name)
    for kernel in ("grouped_mm", "batched_mm"):
        assert_close(found[kernel], found["eager"], relative=1e-4)


def test_experts_that_get_other_tokens_than_before_the_cut_are_left_and_told():
    model, graph = build_experts("mixtral", "eager")
    tokens = torch.randint(3, 90, (24, 16))
    rebuilt = rebuilt_weights(
        model, graph, half_of(graph, ("residual",)), [{"input_ids": tokens}] * 2, damping=DAMPING
    )
    stacks = [name for name in dict(model.named_parameters()) if name.endswith("gate_up_proj")]
    other = dict.fromkeys(stacks, "it reads other rows in the dense model than after the cut")
    assert rebuilt.left.items() >= other.items()
    assert {layer.tensor for layer in rebuilt.layers}.isdisjoint(stacks)


# The stream: what is kept between passes changes nothing ----------------------------------------


def slowly(model, graph, plan, batches):
    """Every reader in the order they run, each by whole passes of the masked model."""
    work = copy.deepcopy(model)
    modules = {m: n for n, m in work.named_modules()}
    readers = {m.tensor: m for name in plan.kept for m in graph.readers(name)}
    order = []
    for module, name in modules.items():
        if f"{name}.weight" in readers:
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        call(work, graph.example_inputs)
    columns = {}
    for tensor, member in readers.items():
        kept = graph.kept_positions(tensor, plan)[member.dim].tolist()
        columns[tensor] = kept
        weight = work.get_parameter(tensor)
        gone = [i for i in range(weight.shape[member.dim]) if i not in kept]
        with torch.no_grad():
            weight.index_fill_(member.dim, torch.tensor(gone), 0)
    for name in tuple(order):
        tensor, rows = f"{name}.weight", []
        handle = work.get_submodule(name).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            for batch in batches:
                call(work, batch)
        handle.remove()
        flip = readers[tensor].dim == 0  # transformers' Conv1D
        plain = [m.get_parameter(tensor).detach() for m in (work, model)]
        start, dense = (w.T if flip else w for w in plain)
        bias = dict(model.named_parameters()).get(f"{name}.bias")
        bias = None if bias is None else bias.detach()
        new, constant = least_squares(torch.cat(rows), start, dense, bias, columns[tensor])
        with torch.no_grad():
            work.get_parameter(tensor).copy_(new.T if flip else new)
            if bias is not None:
                work.get_parameter(f"{name}.bias").copy_(constant)
    return work


SLOW = [case for case in CASES if case.name in ("test_vit", "llama", "gpt2", "bert")]


@pytest.mark.parametrize("case", SLOW, ids=str)
def test_weights_equal_those_of_whole_passes(case):
    model = fill(case.model()).double()
    batches = given = [case.inputs(n) for n in (2, 5, 3)]
    if case.library == "timm":
        batches = [(batch[0].double(),) for batch in batches]
        given = [(*batch, torch.zeros(len(batch[0]))) for batch in batches]
    graph = trace(model, batches[0], outputs=None if case.library == "timm" else "logits")
    plan = half_of(graph, ("head", "kv_group", "neuron"))
    found = rebuilt_weights(model, graph, plan, given, damping=DAMPING)
    expected = slowly(model, graph, plan, batches)
    assert len(found.layers) >= 4
    assert_close(
        {k: v for k, v in found.model.state_dict().items() if k in expected.state_dict()},
        expected.state_dict(),
        relative=1e-7,
    )


# What always holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_layer_gets_worse_and_every_cut_is_verified(case):
    model = fill(case.model())
    graph = trace(model, case.inputs(), outputs=None if case.library == "timm" else "logits")
    plan = half_of(graph)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    batches = [case.batch(6), case.batch(5)]
    rebuilt = rebuilt_weights(model, graph, plan, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(model.state_dict(), before, relative=0)
    assert rebuilt.layers
    for layer in rebuilt.layers:
        assert layer.error <= layer.error_cut, layer
    assert any(layer.error < 0.9 * layer.error_cut for layer in rebuilt.layers)
    assert not sosp_hub.apply(rebuilt.model, graph, rebuilt.plan).training


@pytest.mark.parametrize("whole", [True, False])
def test_where_nothing_is_cut_the_weights_stay_bit_for_bit(whole):
    case = with_trait("fused_qkv", "tied")[0]
    model = case.model().train()
    graph = trace(model, case.inputs())
    sizes = {n: g.size for n, g in graph.groups.items() if g.kind == "neuron"} if whole else {}
    plan = PruningPlan({name: tuple(range(size)) for name, size in sizes.items()}, sizes)
    found = sosp_hub.rebuild(model, graph, plan, [case.batch(4)])
    assert_close(found.state_dict(), model.state_dict(), relative=0)
    assert found.training
    assert found is not model


def test_gates_and_shifts_are_where_the_fit_starts(batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    plan = PruningPlan(
        {"a:neuron": (0, 2, 3, 6)}, {"a:neuron": 8}, gates={"a:neuron": (1.5, 0.5, 2.0, 1.0)},
        shifts={"b.bias": (0.25,) * 7},
    )  # fmt: skip
    held = sosp_hub.rebuild(model, graph, plan, batches, damping=1e12)
    gated = sosp_hub.apply(model, graph, plan)
    assert_close(held.b.weight, gated.b.weight, relative=1e-9)
    free = sosp_hub.rebuild(model, graph, plan, batches, damping=1e-12)
    plain = sosp_hub.rebuild(
        model, graph, replace(plan, gates={}, shifts={}), batches, damping=1e-12
    )
    assert_close(free.state_dict(), plain.state_dict(), relative=1e-6)


class UnderNorms(nn.Module):
    """What is cut is read behind a norm that runs over it, so that no mask stands for the cut."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution
        self.a = nn.Conv2d(3, 8, 1) if convolution else nn.Linear(6, 8)
        self.norm = nn.GroupNorm(1, 8) if convolution else nn.LayerNorm(8)
        self.b = nn.Conv2d(8, 4, 3, padding=1) if convolution else nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("convolution", [False, True])
def test_readers_behind_a_norm_of_what_is_cut_equal_lstsq_toward_the_dense_model(convolution):
    model = UnderNorms(convolution).double()
    x = torch.randn(9, *((3, 11, 11) if convolution else (6,)), dtype=torch.float64)
    graph = trace(model, (x[:2],))
    (name,) = graph.groups
    assert not graph.groups[name].exact
    kept = (0, 2, 5, 6)
    plan = PruningPlan({name: kept}, {name: 8})
    batches = [(part, torch.zeros(len(part))) for part in x.split([4, 5])]
    found = rebuilt_weights(model, graph, plan, batches, damping=DAMPING)
    cut = sosp_hub.apply(model, graph, plan)

    def rows(net):
        with torch.no_grad():
            read = net.norm(net.a(x))
        return F.unfold(read, 3, padding=1).transpose(1, 2).flatten(0, 1) if convolution else read

    given, start, dense = rows(cut), cut.b.weight.detach(), model.b.weight.detach()
    columns = list(range(given.shape[1]))
    new, bias = least_squares(
        given, start.flatten(1), dense.flatten(1), model.b.bias.detach(), columns, rows(model)
    )
    small = sosp_hub.apply(found.model, graph, found.plan)
    assert_close(small.b.weight.flatten(1), new[:, columns], relative=1e-8)
    assert_close(small.b.bias, bias, relative=1e-8)
    (told,) = found.layers
    wanted = rows(model) @ dense.flatten(1).T + model.b.bias.detach()
    for error, net in ((told.error_cut, cut), (told.error, small)):
        off = rows(net) @ net.b.weight.detach().flatten(1).T + net.b.bias.detach() - wanted
        size = (rows(model) @ dense.flatten(1).T).square().sum()
        assert error == pytest.approx(float(off.square().sum() / size), rel=1e-8)


def test_a_block_that_is_cut_for_real_is_not_trained_toward_the_cut():
    model = nn.Sequential(UnderNorms(False), nn.Linear(4, 2))
    x = torch.randn(32, 6)
    graph = trace(model, (x[:2],))
    plan = half_of(graph, ("neuron",))
    assert len(plan.kept["0.a:neuron"]) < 8
    batches = [(part, torch.zeros(len(part))) for part in x.split(8)]
    rebuilt = rebuilt_weights(model, graph, plan, batches, refine_steps=4)
    assert "0.b.weight" in {layer.tensor for layer in rebuilt.layers}
    assert "0" not in {block.name for block in rebuilt.blocks}


def test_channels_of_the_stream_are_made_up_for_too():
    """Under a norm, and beside a layer that is dropped and groups that a mask stands for."""
    case = next(case for case in CASES if case.name == "llama")
    model = fill(case.model())
    graph = trace(model, case.inputs(), outputs="logits")
    plan = half_of(graph, ("residual", "neuron", "kv_group"))
    layers = next(name for name, group in graph.groups.items() if group.kind == "layer")
    plan = replace(plan, kept={**plan.kept, layers: (1,)}, sizes={**plan.sizes, layers: 2})
    rebuilt = rebuilt_weights(model, graph, plan, [case.batch(64) for _ in range(4)])
    first = "model.layers.1"
    assert [layer.tensor for layer in rebuilt.layers] == [
        *(f"{first}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{first}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "lm_head.weight",
    ]
    small, cut = (
        sosp_hub.apply(rebuilt.model, graph, rebuilt.plan),
        sosp_hub.apply(model, graph, plan),
    )
    seen = case.batch(8)["input_ids"]
    with torch.no_grad():
        wanted, far, near = (net.eval()(seen).logits for net in (model, cut, small))
    assert (near - wanted).square().sum() < 0.8 * (far - wanted).square().sum()


def test_padding_takes_no_part():
    case = next(case for case in CASES if case.name == "bert")
    model = fill(case.model())
    graph = trace(model, case.inputs())
    plan = half_of(graph)
    tokens = case.inputs(10)["input_ids"]
    padded = torch.cat([tokens, torch.zeros(10, 5, dtype=torch.long)], 1)
    mask = (torch.arange(17) < 12).long().expand(10, -1)
    plain = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    one = rebuilt_weights(model, graph, plan, [plain], damping=DAMPING)
    two = rebuilt_weights(
        model, graph, plan, [{"input_ids": padded, "attention_mask": mask}], damping=DAMPING
    )
    names = [layer.tensor for layer in one.layers if layer.tensor.startswith("bert.encoder")]
    assert len(names) == 4
    for name in names:
        assert_close(two.model.get_parameter(name), one.model.get_parameter(name), relative=1e-4)


def in_processes(num, work):
    """What ``work(rank, process_sum)`` gives in each of several, which are threads here."""
    barrier, sent = threading.Barrier(num, timeout=60), {}

    def process(rank):
        def process_sum(tensor):
            sent[rank] = tensor
            barrier.wait()
            total = torch.stack([sent[other] for other in range(num)]).sum(0)
            barrier.wait()
            return total

        return work(rank, process_sum)

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(process, range(num)))


def images_of_several_processes():
    """Of which as many positions are drawn as all samples, not those of one process, ask for."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    images = torch.randn(6, 3, 20, 20, dtype=torch.float64)
    return model, [(part, torch.zeros(len(part))) for part in images.split(2)]


@pytest.mark.parametrize("images", [False, True])
def test_processes_add_up_their_sums(batches, images):
    model = Perceptron(bias=True).double()
    if images:
        model, batches = images_of_several_processes()
    graph = trace(model, (batches[0][0],))
    plan = half_of(graph)
    expected = rebuilt_weights(model, graph, plan, batches)
    shares = [batches[:1], batches[1:], []]
    found = in_processes(
        3,
        lambda rank, process_sum: rebuilt_weights(
            copy.deepcopy(model), graph, plan, shares[rank], process_sum=process_sum
        ),
    )
    for one in found:
        assert_close(one.model.state_dict(), expected.model.state_dict(), relative=1e-9)
        rows = [layer.rows for layer in expected.layers]
        assert [layer.rows for layer in one.layers] == rows
        assert images or rows == [30, 30]
        assert_close(one.model.state_dict(), found[0].model.state_dict(), relative=0)


def test_damping_is_chosen_on_samples_that_the_fit_does_not_see():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.ReLU(), nn.Linear(60, 5)).double()
    graph = trace(model, (torch.randn(2, 4, dtype=torch.float64),))
    plan = half_of(graph)
    chosen = {}
    for num in (24, 2000):
        batch = (torch.randn(num, 4, dtype=torch.float64), torch.zeros(num))
        chosen[num] = rebuilt_weights(model, graph, plan, [batch]).layers[0].damping
    assert chosen[2000] == 0.001 < chosen[24]


# Bad input ----------------------------------------------------------------------------------------


def test_too_few_rows_are_told_with_their_ratio(caplog, batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    with caplog.at_level(logging.WARNING):
        sosp_hub.rebuild(model, graph, half_of(graph), batches[2:])
    assert "2 of 2 weights" in caplog.text
    assert "'b.weight' with 4 rows for 8 inputs (ratio 0.5)" in caplog.text


def test_constant_activations_leave_the_weights_and_move_the_bias():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.normal_(model[0].bias)
    x = torch.randn(20, 4, dtype=torch.float64)
    graph = trace(model, (x[:2],))
    plan = PruningPlan({"0:neuron": (1, 4)}, {"0:neuron": 6})
    found = sosp_hub.rebuild(model, graph, plan, [(x, torch.zeros(20))], damping=DAMPING)
    assert_close(found[2].weight, model[2].weight[:, [1, 4]], relative=0)
    assert_close(found(x), model(x), relative=1e-12)


def test_numbers_that_are_not_finite_are_refused(batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    batches[1][0][3, 2] = torch.nan
    with pytest.raises(DataError, match=r"'b\.weight'.*not finite"):
        sosp_hub.rebuild(model, graph, half_of(graph), batches)


def test_a_model_whose_pass_writes_to_its_weights_stays():
    """It clamps and renormalises them in each of the passes that a rebuild takes."""
    torch.manual_seed(0)
    model, tokens = WritesToItself().eval(), torch.arange(64).reshape(8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, (tokens[:1],))
    plan = PruningPlan({"first:neuron": tuple(range(9))}, {"first:neuron": 16})
    rebuilt = rebuilt_weights(model, graph, plan, [(tokens, tokens)], dense_share=0.5)
    assert [layer.tensor for layer in rebuilt.layers] == ["last.weight"]
    assert_close(dict(model.state_dict()), before, relative=0)


def test_no_data_is_refused(batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    with pytest.raises(DataError, match=r"'b\.weight'.*at least one batch"):
        sosp_hub.rebuild(model, graph, half_of(graph), [])


def test_a_model_without_weights_is_refused(batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    with pytest.raises(PlanError, match="no weights"):
        sosp_hub.rebuild(model.to("meta"), graph, half_of(graph), batches)


@pytest.mark.parametrize("damping", [0, -1.0, "none", None, True])
def test_a_damping_that_is_none_is_refused(damping, batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    with pytest.raises(PlanError, match="damping: got"):
        sosp_hub.rebuild(model, graph, half_of(graph), batches, damping=damping)


@pytest.mark.parametrize("share", [-0.1, 1.5, True, torch.nan])
def test_a_share_that_is_none_is_refused(share, batches):
    model = Perceptron(bias=True).double()
    graph = trace(model, (batches[0][0],))
    with pytest.raises(PlanError, match="dense_share: got"):
        sosp_hub.rebuild(model, graph, half_of(graph), batches, dense_share=share)


def test_a_layer_under_a_weight_norm_is_refused_by_name_and_the_rest_goes_on(caplog, batches):
    model = Perceptron(bias=True)
    model.b = nn.utils.parametrizations.weight_norm(model.b)
    model = model.double()
    graph = trace(model, (batches[0][0],))
    plan = half_of(graph)
    assert len(plan.kept) == 2
    with caplog.at_level(logging.INFO):
        rebuilt = rebuilt_weights(model, graph, plan, batches)
    assert [layer.tensor for layer in rebuilt.layers] == ["c.weight"]
    assert "'b.parametrizations.weight.original1'" in caplog.text
    sosp_hub.apply(rebuilt.model, graph, rebuilt.plan)


class Columns(nn.Linear):
    """Each column is divided by its length and has another one instead."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.lengths = nn.Parameter(0.5 + torch.rand(1, inputs))

    def forward(self, x):
        return F.linear(x, torch._weight_norm(self.weight, self.lengths, 1), self.bias)


def test_columns_of_given_length_are_not_solved(batches):
    model = Perceptron(bias=True)
    model.b = Columns(model.b.in_features, model.b.out_features)
    model = model.double()
    graph = trace(model, (batches[0][0],))
    (name,) = [n for n in graph.groups if any(m.tensor == "b.weight" for m in graph.readers(n))]
    plan = PruningPlan({name: (0, 2, 3)}, {name: graph.groups[name].size})
    rebuilt = rebuilt_weights(model, graph, plan, batches)
    assert rebuilt.left == {"b.weight": f"group {name!r}: 'b.weight' is normalised before it reads"}
    assert not rebuilt.layers
    sosp_hub.apply(rebuilt.model, graph, rebuilt.plan, strict=True)


LEFT = {
    "matmul": torch.matmul,
    "operator": operator.matmul,
    "mm": torch.mm,
    "matmul by keyword": lambda weight, columns: torch.matmul(weight, other=columns),
    "mm by keyword": lambda weight, columns: torch.mm(weight, mat2=columns),
}


@pytest.mark.parametrize("product", LEFT.values(), ids=LEFT)
def test_a_weight_on_the_left_of_its_inputs_is_solved_as_a_linear_layer(product):
    """As in the mixers of Mamba."""

    class Left(Perceptron):
        def forward(self, x):
            return product(self.c.weight, torch.relu(self.a(x)).mT).mT

    model, x = Left(bias=False).double(), torch.randn(40, 6, dtype=torch.float64)
    model.c = nn.Linear(8, 3, bias=False).double()
    graph = trace(model, (x[:2],))
    plan = PruningPlan({"a:neuron": (0, 2, 3, 6)}, {"a:neuron": 8})
    batches = [(part, torch.zeros(len(part))) for part in x.split(20)]
    rebuilt = rebuilt_weights(model, graph, plan, batches, damping=DAMPING)
    with torch.no_grad():
        rows, dense, kept = torch.relu(model.a(x)), model.c.weight.detach(), [0, 2, 3, 6]
    start = torch.zeros_like(dense)
    start[:, kept] = dense[:, kept]
    new, _ = least_squares(rows, start, dense, None, kept)
    assert_close(rebuilt.model.c.weight, new, relative=1e-9)


def test_a_product_that_is_not_followed_is_told_and_the_rest_goes_on(caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

        def forward(self, x):
            hidden = torch.einsum("nk,ok->no", torch.relu(self.a(x)), self.b.weight)
            return self.c(torch.relu(hidden + self.b.bias))

    model, x = Odd().double(), torch.randn(40, 6, dtype=torch.float64)
    graph = trace(model, (x[:2],))
    plan = half_of(graph)
    assert len(plan.kept) == 2
    with caplog.at_level(logging.INFO):
        rebuilt = rebuilt_weights(model, graph, plan, [(x, torch.zeros(40))])
    assert [layer.tensor for layer in rebuilt.layers] == ["c.weight"]
    assert "'b.weight': it is read by an operation that is not followed" in caplog.text
    sosp_hub.apply(rebuilt.model, graph, rebuilt.plan)


def test_complex_weights_stay_as_the_cut_left_them_and_are_told(caplog):
    """Their imaginary part was lost."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(7, 3)
            self.b = nn.Parameter(torch.randn(8, 7, dtype=torch.complex64))

        def forward(self, x):
            return self.c((torch.relu(self.a(x)).to(torch.complex64) @ self.b).abs())

    model = Turned()
    for rows in (4, 40):
        x = torch.randn(rows, 6)
        graph = trace(model, (x[:2],))
        plan = half_of(graph)
        assert len(plan.kept) == 2
        with caplog.at_level(logging.INFO):
            rebuilt = rebuilt_weights(model, graph, plan, [(x, torch.zeros(rows))])
        assert [layer.tensor for layer in rebuilt.layers] == ["c.weight"]
        assert "'b': it holds complex numbers" in caplog.text
        small = sosp_hub.apply(rebuilt.model, graph, rebuilt.plan)
        assert torch.equal(small.b, sosp_hub.apply(model, graph, plan).b)


def test_a_cut_that_does_not_run_is_told_as_apply_tells_it(monkeypatch):
    """One column is left of a weight that is standardised; that it may not be is made unknown."""
    monkeypatch.setattr("sosp_hub.structure.constraint_solver.bar_counts", lambda *_: False)
    layers = nn.Conv2d(2, 6, 1), Standardised(6, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    model, images = nn.Sequential(*layers).eval(), torch.randn(8, 2, 4, 4)
    graph = trace(model, (images[:2],))
    kept, sizes = {"0:channel": (3,), "2:channel": (0, 1)}, {"0:channel": 6, "2:channel": 4}
    with pytest.raises(VerificationError, match=r"more than 1 value.*0:channel"):
        sosp_hub.rebuild(model, graph, PruningPlan(kept, sizes), [(images, None)])
