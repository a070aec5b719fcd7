"""Criteria that watch activations, against the tensors that the toys compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from tests.compare import assert_close
from tests.criteria.processes import in_processes
from tests.gates.toys import Toy, attention, group, perceptron, residual, stand_in

WATCHING = ["activation", "eap", "flap", "wanda_sp"]


def inner(toy):
    """What the residual toy's inner channels hand on: (samples, channels, height, width)."""
    model = toy.model
    x = F.silu(model.stem_bn(model.stem(toy.batch[0])))
    return F.softplus(model.depthwise(F.silu(model.one_bn(model.one(x)))))


def heads(toy):
    """What the attention toy's heads hand on: (samples, tokens, heads, 3)."""
    model = toy.model
    qkv = model.qkv(model.norm(toy.batch[0])).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*qkv.unbind(), is_causal=True).transpose(1, 2)


def neurons(toy):
    """What the perceptron's last neurons hand on: (samples, neurons)."""
    return torch.tanh(toy.model.b(F.gelu(toy.model.a(toy.batch[0]))))


def scores(toy, name, kinds=None, **options):
    return score(toy.model, toy.graph, [toy.batch], name, kinds=kinds, **options)


def test_activation():
    toy = residual()
    places = inner(toy).abs().mean((2, 3))
    found = scores(toy, "activation", standardize=False)["inner"]
    assert_close(found, places.square().mean(0).sqrt(), relative=1e-9)
    toy = attention()
    found = scores(toy, "activation", ["head"], standardize=False)["heads"]
    sizes = heads(toy).norm(dim=-1).mean(1)
    assert_close(found, sizes.square().mean(0).sqrt(), relative=1e-9)
    toy = perceptron()
    found = scores(toy, "activation", standardize=False)["b"]
    assert_close(found, neurons(toy).square().mean(0).sqrt(), relative=1e-9)


def test_a_group_that_is_read_twice_gets_the_mean():
    toy = residual()
    whole = toy.groups["stream"]
    parts = [
        group("stream", "channel", 4, [place]) for place in (("one", 1, None), ("head", -1, None))
    ]
    ones = [
        score(toy.model, stand_in(part), [toy.batch], "activation", standardize=False)["stream"]
        for part in parts
    ]
    found = score(toy.model, stand_in(whole), [toy.batch], "activation", standardize=False)
    assert_close(found["stream"], (ones[0] + ones[1]) / 2, relative=1e-12)


def test_eap_of_sets():
    toy = residual()
    maps = inner(toy).flatten(2)
    root = maps.shape[-1] ** 0.5
    expected = [torch.linalg.matrix_norm(maps[:, j], "nuc") / 5 / root for j in range(6)]
    found = scores(toy, "eap", standardize=False)["inner"]
    assert_close(found, torch.stack(expected), relative=1e-7)
    expected = [
        sum(torch.linalg.matrix_norm(part[:, j], "nuc") for part in maps.split(2)) / 5 / root
        for j in range(6)
    ]
    found = scores(toy, "eap", standardize=False, set_size=2)["inner"]
    assert_close(found, torch.stack(expected), relative=1e-7)
    toy = attention()
    rows = heads(toy).movedim(2, 1).flatten(2)  # tokens and channels of a head in one row
    root = rows.shape[-1] ** 0.5
    expected = [torch.linalg.matrix_norm(rows[:, j], "nuc") / 4 / root for j in range(2)]
    found = scores(toy, "eap", ["head"], standardize=False)["heads"]
    assert_close(found, torch.stack(expected), relative=1e-7)


def test_eap_of_one_set_of_all_samples_does_not_depend_on_batches():
    toy = residual()
    maps = inner(toy).flatten(2)
    expected = [torch.linalg.matrix_norm(maps[:, j], "nuc") for j in range(6)]
    expected = torch.stack(expected) / 5 / maps.shape[-1] ** 0.5
    for num in (5, 2):
        batches = [tuple(part[i : i + num] for part in toy.batch) for i in range(0, 5, num)]
        found = score(toy.model, toy.graph, batches, "eap", standardize=False, set_size=None)[
            "inner"
        ]
        assert_close(found, expected, relative=1e-6)


def test_eap_of_one_set_says_where_maps_are_too_large_or_differ(monkeypatch):
    toy = residual()
    narrower = (toy.batch[0][..., :-1], toy.batch[1])
    with pytest.raises(CriterionError, match="are no rows of one matrix"):
        score(toy.model, toy.graph, [toy.batch, narrower], "eap", set_size=None)
    monkeypatch.setattr("sosp_hub.criteria.compute.activations._MOST_GRAM_BYTES", 100)
    with pytest.raises(CriterionError, match="write set_size: 32"):
        scores(toy, "eap", set_size=None)


def test_eap_of_maps():
    toy = residual()
    maps = inner(toy)
    root = (maps.shape[-1] * maps.shape[-2]) ** 0.5
    expected = torch.linalg.matrix_norm(maps, "nuc").mean(0) / root
    found = scores(toy, "eap", standardize=False, reading="map")["inner"]
    assert_close(found, expected, relative=1e-7)
    toy = attention()
    maps = heads(toy).movedim(2, 1)
    root = (maps.shape[-1] * maps.shape[-2]) ** 0.5
    expected = torch.linalg.matrix_norm(maps, "nuc").mean(0) / root
    found = scores(toy, "eap", ["head"], standardize=False, reading="map")["heads"]
    assert_close(found, expected, relative=1e-7)


def test_eap_is_standardized_and_chunked(monkeypatch):
    toy = residual()
    raw = scores(toy, "eap", standardize=False)["inner"]
    expected = (raw - raw.mean()) / raw.std(correction=0)
    assert_close(scores(toy, "eap")["inner"], expected, relative=1e-9)
    monkeypatch.setattr("sosp_hub.criteria.eap._STRUCTURES", 4)
    assert_close(scores(toy, "eap")["inner"], expected, relative=1e-9)


def test_eap_of_what_is_not_finite():
    toy = residual()
    toy.model.depthwise.weight.data[2] = torch.nan
    with pytest.raises(CriterionError, match="the scores of group 'stream' are not finite"):
        scores(toy, "eap", standardize=False)


def test_wanda_sp():
    toy = residual()
    size = inner(toy).square().mean((0, 2, 3)).sqrt()
    expected = toy.model.two.weight.abs().mean((0, 2, 3)) * size
    assert_close(scores(toy, "wanda_sp", standardize=False)["inner"], expected, relative=1e-9)
    toy = attention()
    size = heads(toy).flatten(2).square().mean((0, 1)).sqrt()
    expected = (toy.model.out.weight.abs().mean(0) * size).view(2, 3).sum(1)
    found = scores(toy, "wanda_sp", ["head"], standardize=False)["heads"]
    assert_close(found, expected, relative=1e-9)


def test_flap():
    toy = residual()
    variance = inner(toy).var((0, 2, 3), correction=0)
    expected = toy.model.two.weight.square().sum((0, 2, 3)) * variance
    assert_close(scores(toy, "flap", standardize=False)["inner"], expected, relative=1e-9)
    toy = attention()
    variance = heads(toy).flatten(2).var((0, 1), correction=0)
    expected = (toy.model.out.weight.square().sum(0) * variance).view(2, 3).sum(1)
    found = scores(toy, "flap", ["head"], standardize=False)["heads"]
    assert_close(found, expected, relative=1e-9)


def test_flap_finds_what_is_large_but_constant_worth_nothing():
    toy = perceptron()
    toy.model.b.weight.data[1], toy.model.b.bias.data[1] = 0.0, 5.0  # tanh of it is always 1
    least = scores(toy, "flap", standardize=False)["b"]
    assert least[1] < 1e-12 < least[0]
    assert scores(toy, "activation", standardize=False)["b"].argmax() == 1


@pytest.mark.parametrize("name", ["flap", "wanda_sp"])
def test_some_criteria_need_weights_that_read(name):
    toy = residual()
    bare = group("inner", "channel", 6, [("two", 1, None)])
    with pytest.raises(CriterionError, match=rf"'{name}': no linear layer .* 'inner' \(channel\)"):
        score(toy.model, stand_in(bare), [toy.batch], name)


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.parametrize("make", [perceptron, residual], ids=["perceptron", "residual"])
def test_batches_and_processes_make_no_difference(make, name):
    toy = make(num_samples=6)
    options = {"reading": "map"} if name == "eap" else {}
    expected = scores(toy, name, **options)
    assert_close(in_processes(toy, name, **options), expected, relative=1e-9)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask):
        x = self.down(torch.relu(self.up(self.embed(input_ids))))
        return {"logits": (x * attention_mask.unsqueeze(-1)).sum(1)}


@pytest.mark.parametrize("name", WATCHING)
def test_padding_does_not_count(name):
    model = Padded().double()
    graph = stand_in(
        group("n", "neuron", 5, [("down", -1, None)], [("down.weight", 1, None, True)])
    )
    options = {"standardize": False, **({"set_size": 1} if name == "eap" else {})}
    texts = [torch.randint(8, (1, length)) for length in (2, 3, 5)]
    each = [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts]
    padded = {
        "input_ids": torch.cat([F.pad(text, (5 - text.shape[1], 0), value=8) for text in texts]),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    wanted = score(model, graph, each, name, **options)
    assert_close(score(model, graph, [padded], name, **options), wanted, relative=1e-9)
    padded["attention_mask"] = torch.ones(3, 5)
    with pytest.raises(AssertionError):
        assert_close(score(model, graph, [padded], name, **options), wanted, relative=1e-3)


@pytest.mark.parametrize("name", WATCHING)
def test_a_group_that_no_module_reads_is_named_and_stays_whole(name, caplog):
    toy = attention()
    with caplog.at_level("INFO"):
        assert scores(toy, name).keys() == {"heads"}
    assert "neurons" in caplog.text
    toy = Toy(toy.model, stand_in(toy.groups["neurons"]), toy.batch)
    with pytest.raises(CriterionError, match=r"none of the 1 of this model \(neuron\).*; use "):
        scores(toy, name)


def test_a_module_that_does_not_run_is_named():
    toy = perceptron()
    toy.model.spare = nn.Linear(2, 2).double()
    graph = stand_in(*toy.groups.values(), group("s", "neuron", 2, [("spare", -1, None)]))
    with pytest.raises(CriterionError, match=r"no module that ran reads the groups 's' \(neuron\)"):
        score(toy.model, graph, [toy.batch], "activation")


@pytest.mark.parametrize("name", WATCHING)
def test_no_variance_no_ranking(name):
    toy = perceptron()
    toy.model.b.weight.data[:] = toy.model.b.weight.data[0]
    toy.model.b.bias.data[:] = 0
    toy.model.c.weight.data[:] = 1
    with pytest.raises(CriterionError, match=r"group 'b': .* has zero variance over its 3"):
        scores(toy, name)
    assert scores(toy, name, standardize=False)


@pytest.mark.parametrize("name", [*WATCHING, "block_influence"])
def test_complex_numbers_are_refused_by_name(name):
    """Their imaginary part was left out, or torch raised from inside."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8, dtype=torch.complex64)
            self.b = nn.Linear(8, 6, dtype=torch.complex64)

        def forward(self, x):
            return x + self.b(self.a(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = x.to(torch.complex64)
            for layer in self.layers:
                x = layer(x)
            return self.head(x.abs())

    model, x = Net().eval(), torch.randn(5, 6)
    graph = trace(model, (x,))
    kinds = ["layer"] if name == "block_influence" else ["neuron"]
    with pytest.raises(CriterionError, match=r"module 'layers\.\d.* complex numbers"):
        score(model, graph, [(x, torch.zeros(5, dtype=torch.long))], name, kinds=kinds)
