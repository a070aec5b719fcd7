"""SGLP: partitions by brute force, CKA and gradient norms written out, layers of real models."""

import copy
import dataclasses
import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import sosp_hub.zoo.timm
from sosp_hub.allocation import allocate
from sosp_hub.criteria.compute.context import Context
from sosp_hub.criteria.compute.gradient_norms import FreshNet, GradientNorms
from sosp_hub.criteria.compute.layer_segments import _best, _in_proportion
from sosp_hub.criteria.compute.similarity import cka_matrix, segments
from sosp_hub.criteria.sglp import Sglp
from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from sosp_hub.structure.groups import Group
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.compare import assert_close
from tests.criteria.processes import in_processes
from tests.gates.toys import stand_in

assert sosp_hub.zoo.timm  # registers the CIFAR ResNets


# ------------------------------------------------------------------------------- segmentation
def loss_of(row, firsts):
    parts = np.split(np.asarray(row), firsts[1:])
    return sum(((part - part.mean()) ** 2).sum() for part in parts)


def all_partitions(n, count):
    return ([0, *rest] for rest in itertools.combinations(range(1, n), count - 1))


@pytest.mark.parametrize("seed", range(20))
def test_the_partition_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 10))
    row = rng.normal(size=n).cumsum()
    least = []
    for count in range(1, n + 1):
        best = min(all_partitions(n, count), key=lambda firsts: loss_of(row, firsts))
        assert segments(row, count, 8) == best
        least.append(loss_of(row, best))
    for most in (1, 3, 8):
        drops = -np.diff(least[: min(most, n)]) / least[0]
        worth = [i + 2 for i, drop in enumerate(drops) if drop > 0.05]
        assert len(segments(row, None, most)) == (worth[-1] if worth else 1)


def test_a_row_without_variation_is_one_segment():
    assert segments([2.0] * 5, None, 8) == [0]
    assert segments([1.0], None, 8) == [0]
    assert segments([1.0, 5.0], 9, 8) == [0, 1]  # no more segments than values


# ----------------------------------------------------------------------------------------- CKA
def hsic(x, y):
    n = len(x)
    centre = np.eye(n) - 1 / n
    return np.trace(x @ x.T @ centre @ y @ y.T @ centre) / (n - 1) ** 2


def cka(x, y):
    x, y = (a.reshape(len(a), -1).detach().numpy() for a in (x, y))
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


class Bend(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x, mask=None):
        return x + torch.tanh(self.norm(self.linear(x)))


def bends(num=4):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(*(Bend() for _ in range(num))))
    return model.append(nn.Linear(4, 3)).double().eval()


def graph_of(name, layers):
    return stand_in(Group(f"{name}:layer", "layer", len(layers), (), (), (), tuple(layers)))


def bend_graph(num=4):
    return graph_of("1", [f"1.{i}" for i in range(num)])


def data(num=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 3, generator=generator).double()
    return x, torch.arange(num) % 3


def test_cka_is_that_of_what_goes_in_and_of_every_block():
    model, (x, y) = bends(), data()
    names = [f"1.{i}" for i in range(4)]
    expected = np.zeros((5, 5))
    for rows in (x[:5], x[5:]):
        stream = [model[0](rows)]
        for block in model[1]:
            stream.append(block(stream[-1]))
        expected += len(rows) * np.array([[cka(a, b) for b in stream] for a in stream]) / 12
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = cka_matrix(model, names, batches, 500, None)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    sent = []
    cka_matrix(model, names, batches[:1], 500, lambda flat: sent.append(flat) or flat)
    found = cka_matrix(model, names, batches[1:], 500, lambda flat: flat + sent[0])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": x.mean(1)}


def test_tokens_that_are_no_padding_are_the_rows():
    model = Tokens().double()
    ids = torch.randint(8, (3, 4))
    stream = [model.embed(ids).flatten(0, 1)]
    for layer in model.layers:
        stream.append(layer(stream[-1]))
    expected = np.array([[cka(a, b) for b in stream] for a in stream])
    batch = {
        "input_ids": torch.cat([torch.full((3, 2), 8), ids], 1),
        "attention_mask": (torch.arange(6) >= 2).long().expand(3, 6),
    }
    found = cka_matrix(model, ["layers.0", "layers.1"], [batch], 500, None)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    few = cka_matrix(model, ["layers.0", "layers.1"], [batch], 3, None)
    chosen = [stream[i][[0, 6, 11]] for i in range(3)]  # evenly spaced, rounded to even
    np.testing.assert_allclose(few, [[cka(a, b) for b in chosen] for a in chosen], rtol=1e-9)


# -------------------------------------------------------------------------------- gradient norms
def norm_of(model, batches, own=None):
    """By ``backward`` and a loop."""
    total = 0.0
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        own = model if own is None else own
        total += len(x) * sum(p.grad.square().sum() for p in own.parameters()).sqrt().item()
    return total / sum(len(x) for x, _ in batches)


def test_norms_in_a_fresh_net():
    model, (x, y) = bends(), data()
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    net = FreshNet(model, [f"1.{i}" for i in range(4)], seed=3)
    gradients = GradientNorms(batches, F.cross_entropy, None)
    found = {s: gradients.of_fresh(net, [f"1.{i}" for i in s]) for s in ((), (1,), (0, 2), (1,))}
    for subset, norm in found.items():
        fresh = copy.deepcopy(model)
        torch.manual_seed(3)
        for module in fresh.modules():
            if isinstance(module, nn.Linear | nn.BatchNorm1d):
                module.reset_parameters()
                module.train()
        for i in subset:
            fresh[1][i].load_state_dict(model[1][i].state_dict())
        assert norm == pytest.approx(norm_of(fresh, batches), rel=1e-9), subset
    assert len(set(found.values())) == 3
    assert not any(module.training for module in model.modules())


def test_norms_of_layers_as_they_are():
    model, (x, y) = bends(), data()
    model[1][1].requires_grad_(False)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = GradientNorms(batches, F.cross_entropy, None).of_layers(model, ["1.1", "1.3"])
    assert [p.requires_grad for p in model[1][1].parameters()] == [False] * 4
    assert not any(p.grad is not None for p in model.parameters())
    model.requires_grad_(True)
    for name, norm in found.items():
        own = model.get_submodule(name)
        assert norm == pytest.approx(norm_of(model, batches, own), rel=1e-9)


def test_the_best_subset_is_tried_out_where_there_are_few():
    norms, pairs = (
        {"a": 3.0, "b": 2.0, "c": 1.0},
        {("a", "b"): 1.0, ("a", "c"): 5.0, ("b", "c"): 4.0},
    )
    assert _best(list("abc"), 2, norms, pairs.__getitem__, 3) == (("a", "c"), 3)
    assert _best(list("abc"), 1, norms, pairs.__getitem__, 9) == (("a",), 0)
    assert _best(list("abc"), 0, norms, pairs.__getitem__, 9) == ((), 0)
    assert _best(list("abc"), 2, norms, None, 9) == (("a", "b"), 0)


def test_of_more_subsets_one_layer_goes_at_a_time():
    worth = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.5, "e": 0.5}

    def norm_of(subset):  # b is worth much beside e alone
        return sum(worth[name] for name in subset) + 5 * ("b" in subset and "e" in subset)

    assert _best(list("abcde"), 2, worth, norm_of, 10) == (("b", "e"), 10)
    found, tried = _best(list("abcde"), 2, worth, norm_of, 9)
    assert tried == 5 + 4 + 3
    kept = list("abcde")
    while len(kept) > 2:
        kept.remove(max(kept, key=lambda name: norm_of([n for n in kept if n != name])))
    assert list(found) == kept
    assert _best(list("abcde"), 1, worth, norm_of, 2) == (("a",), 0)  # the norms alone are known


def test_norms_are_means_over_fresh_nets():
    torch.manual_seed(0)
    model, batch = bends(4), data(16)
    context = Context(model, bend_graph(4).groups, [batch], seed=5)
    each = [
        Sglp(num_segments=1).partition(dataclasses.replace(context, seed=seed)).norms
        for seed in (5, 6, 7)
    ]
    found = Sglp(num_segments=1, num_fresh=3).partition(context).norms
    for name, norm in found.items():
        assert norm == pytest.approx(sum(norms[name] for norms in each) / 3, rel=1e-9)


@pytest.mark.parametrize(
    ("total", "sizes", "most", "expected"),
    [
        (4, [4, 4], [3, 3], [2, 2]),
        (5, [9, 1], [8, 0], [5, 0]),
        (3, [1, 2, 4], [1, 1, 4], [0, 1, 2]),
        (9, [3, 3], [2, 3], [2, 3]),  # no more than may go
        (0, [3, 0], [2, 0], [0, 0]),
    ],
)
def test_quotas_are_in_proportion(total, sizes, most, expected):
    assert _in_proportion(total, sizes, most) == expected


# ------------------------------------------------------------------------------------ criterion
def test_scores_are_below_zero_for_what_the_best_subsets_lose():
    torch.manual_seed(0)
    model, (x, y) = bends(6), data(24)
    context = Context(model, bend_graph(6).groups, [(x, y)], seed=5)
    found = Sglp(num_segments=2).partition(context)
    removed = []
    for part in np.split(np.arange(6), found.borders[1:]):
        gone = [int(name[2:]) for name in found.removed if int(name[2:]) in part]
        able = [i for i in part if i]  # the first block stays
        net = FreshNet(model, [f"1.{i}" for i in range(6)], seed=5)
        gradients = GradientNorms([(x, y)], None, None)
        best = max(
            itertools.combinations(able, len(able) - len(gone)),
            key=lambda subset: gradients.of_fresh(net, [f"1.{i}" for i in subset]),
        )
        removed += sorted(set(able) - set(best))
    assert removed == [int(name[2:]) for name in found.removed]
    assert len(removed) == 2  # half of the five that may go
    assert 0 not in removed
    (scores,) = score(model, bend_graph(6), [(x, y)], "sglp", num_segments=2, seed=5).values()
    assert [i for i, value in enumerate(scores) if value < 0] == removed
    assert scores.min() >= -1
    assert len(scores.unique()) > 2


def llama(layers=6):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 50, (4, 9))
    return model, {"input_ids": ids}, {"input_ids": ids, "labels": ids}


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=4, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(3, 50, (6, 9))
    return model, {"input_ids": ids}, {"input_ids": ids, "labels": torch.arange(6) % 3}


def resnet():
    x = torch.randn(8, 3, 16, 16)
    return timm.create_model("cifar_resnet32").eval(), (x,), (x, torch.arange(8))


def vit():
    model = timm.create_model("test_vit", depth=5, num_classes=4).eval()
    x = torch.randn(4, 3, 160, 160)
    return model, (x,), (x, torch.arange(4))


MODELS = {"llama": llama, "bert": bert, "resnet": resnet, "vit": vit}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_real_models(name, caplog):
    model, inputs, batch = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, inputs)
    options = {"max_subsets": 3, "norm_samples": 4}
    with caplog.at_level(logging.INFO, "sosp_hub"):
        layers = {name: g for name, g in graph.groups.items() if g.kind == "layer"}
        found = Sglp(**options).partition(Context(model, layers, [batch]))
    saliency = score(model, graph, [batch], "sglp", **options)
    assert_close(dict(model.state_dict()), dict(before), relative=0)
    plan = allocate(graph, saliency, threshold=0.0, keep_at_least=0.01, kinds="layer")
    gone = [
        layer
        for group, kept in plan.kept.items()
        for i, layer in enumerate(graph.groups[group].layers)
        if i not in kept
    ]
    assert set(gone) == set(found.removed)
    assert len(gone) == round(0.5 * len(found.norms))
    assert {*found.norms, *found.fixed} == set(found.blocks)
    assert found.borders[0] == 0
    assert list(found.borders) == segments(
        list(np.sum(found.cka, 1)[1:]), None, len(found.blocks) // 3
    )
    apply(model, graph, plan)
    some = allocate(graph, saliency, structures=0.9, keep_at_least=0.01, kinds="layer")
    for group, kept in some.kept.items():  # a lesser budget takes away some of the same
        assert set(plan.kept[group]) <= set(kept)
    if name == "llama":
        assert found.fixed == ("model.layers.0",)
        assert saliency["model.layers:layer"][0] == 1
        assert found.num_subsets == (0,) * len(found.borders)
    if name == "resnet":
        assert found.fixed == ("layer1.0", "layer2.0", "layer3.0")
        assert "layer2.0, layer3.0 cannot be left out" in caplog.text
        assert found.stepwise
        assert "it gave up one layer at a time" in caplog.text


def test_blocks_to_keep_can_be_given():
    model, (x, y) = bends(6), data(24)
    context = Context(model, bend_graph(6).groups, [(x, y)])
    kept = Sglp(kept_per_segment=(2, 1)).partition(context)
    assert len(kept.removed) == 3
    assert sum(int(name[2:]) < kept.borders[1] for name in kept.removed) == kept.borders[1] - 2
    for keep, num_removed in ((0.8, 1), (0.5, 2), (0.2, 4)):  # of five; the first block stays
        assert len(Sglp(keep=keep, num_segments=2).partition(context).removed) == num_removed
    with pytest.raises(CriterionError, match=r"kept_per_segment=\[6, 1\].*can keep"):
        Sglp(kept_per_segment=(6, 1)).partition(context)
    with pytest.raises(CriterionError, match=r"lists 2 segments, num_segments is 3"):
        Sglp(kept_per_segment=(2, 1), num_segments=3).partition(context)
    with pytest.raises(CriterionError, match=r"keep: got 0; expected more than 0"):
        score(model, bend_graph(6), [(x, y)], "sglp", keep=0)


def test_processes_agree():
    model, (x, y) = bends(), data(18)
    parts = [(x[:9], y[:9]), (x[9:], y[9:])]
    whole = Sglp(num_segments=2).partition(Context(model, bend_graph().groups, parts))
    toy = SimpleNamespace(model=model, graph=bend_graph(), batch=(x, y))
    found = in_processes(toy, "sglp", num_segments=2, norms="pretrained")
    assert found["1:layer"][0] == 1
    assert len(whole.removed) == 2


def test_what_cannot_be_scored_is_said():
    model, (x, y) = bends(), data()
    graph = bend_graph()
    with pytest.raises(CriterionError, match="no calibration data"):
        score(model, graph, [], "sglp")
    with pytest.raises(CriterionError, match=r"what goes into the first layer is the same"):
        score(model, graph, [(x[:1].expand(5, 3), y[:5])], "sglp")
    with pytest.raises(CriterionError, match=r"what goes into the first layer is the same"):
        score(model, graph, [(x[:1], y[:1])], "sglp")
    model[0].spare = nn.ModuleList([Bend()]).double()
    with pytest.raises(CriterionError, match=r"layer '0.spare.0' did not run"):
        score(model, graph_of("0.spare", ["0.spare.0"]), [(x, y)], "sglp")
    del model[0].spare
    model[1][2].linear.weight.data[0, 0] = torch.nan
    with pytest.raises(CriterionError, match=r"what comes out of '1.2' is .* not finite"):
        score(model, graph, [(x, y)], "sglp")
