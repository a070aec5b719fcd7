"""A reader's own module is compared with the one that was saved, by what it computes."""

import json

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn import functional

import sosp_hub
from sosp_hub.errors import CheckpointError

EXAMPLE = (torch.arange(12).view(2, 6) % 9, {"scale": torch.ones(2, 1), "twice": True})


def relu(x):
    return functional.relu(x)


class Net(nn.Module):
    """Whole numbers, a nested dict with a constant, a tuple of outputs."""

    act = staticmethod(relu)

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.wide, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, tokens, more):
        hidden = self.act(self.wide(self.table(tokens).mean(1))) * more["scale"]
        result = self.last(hidden)
        return (result * 2, {"hidden": hidden.sum(1)}) if more["twice"] else result


class Mixin(Net, PyTorchModelHubMixin):
    """Saved and loaded by its own means."""


class Sampling(Net):
    """Draws in evaluation too; it could not be saved, as two passes differ."""

    def forward(self, tokens, more):
        result, rest = super().forward(tokens, more)
        return result + torch.randn_like(result), rest


class Chooses(Net):
    """What it gives jumps: a difference as small as another device's can exchange it."""

    def forward(self, tokens, more):
        result, _ = super().forward(tokens, more)
        return (result * 1e7).round() % 2


def saved(build, folder, *, train=False):
    torch.manual_seed(0)
    model = build().eval()
    graph = sosp_hub.trace(model, EXAMPLE)
    scores = sosp_hub.score(model, graph, [], "magnitude")
    small = sosp_hub.apply(model, graph, sosp_hub.allocate(graph, scores, params=0.6))
    small.train(train)
    return sosp_hub.save_pretrained(small, folder), small


def record_of(folder):
    return json.loads((folder / "config.json").read_text()).get("sosp_hub_check")


@pytest.mark.parametrize("build", [Net, Mixin])
@pytest.mark.parametrize("act", [functional.gelu, functional.relu6, lambda x: x, None])
def test_another_function_in_forward_is_found(build, act, tmp_path, monkeypatch):
    """Such a module has the same names, classes and shapes; it loaded without a word."""
    folder, small = saved(build, tmp_path / "small")
    if build is Mixin:
        small.save_pretrained(tmp_path / "own")
    loads = [lambda: sosp_hub.from_pretrained(folder, model=build())]
    loads += [lambda: Mixin.from_pretrained(tmp_path / "own")] if build is Mixin else []
    for load in loads:
        torch.testing.assert_close(load()(*EXAMPLE), small.eval()(*EXAMPLE), rtol=0, atol=0)
    if act is functional.relu6:  # the same below 6
        with torch.no_grad():
            small.wide.bias += 6
        sosp_hub.save_pretrained(small, folder)
        loads = loads[:1]
    monkeypatch.setattr(Net, "act", staticmethod(act))  # None: it fails
    words = "fails" if act is None else r"output 0 is off by .*remove 'sosp_hub_check'"
    for load in loads:
        with pytest.raises(CheckpointError, match=words):
            load()


def test_what_is_stored_says_nothing_of_the_example_inputs(tmp_path):
    state = torch.random.get_rng_state()
    folder, small = saved(Net, tmp_path / "small", train=True)
    torch.random.set_rng_state(state)
    sosp_hub.save_pretrained(small, tmp_path / "twice")
    assert small.training
    assert torch.equal(torch.random.get_rng_state(), state)
    record = record_of(folder)
    assert record == record_of(tmp_path / "twice")
    tokens, more = record["inputs"]["tuple"]
    assert tokens == {"dtype": "int64", "shape": [2, 6], "least": 0, "most": 8}
    assert more["named"]["twice"] == {"value": True}
    loaded = sosp_hub.from_pretrained(folder, model=Net())
    assert record_of(sosp_hub.save_pretrained(loaded, tmp_path / "again")) == record


@pytest.mark.parametrize("build", [Sampling, Chooses])
def test_what_would_be_no_proof_is_not_compared(build, tmp_path):
    folder, _ = saved(build, tmp_path / "small")
    assert record_of(folder) is None
    assert sosp_hub.from_pretrained(folder, model=build())


def test_other_weights_are_compared_with_their_own_outputs(tmp_path):
    folder, small = saved(Net, tmp_path / "small")
    before = record_of(folder)
    with torch.no_grad():
        small.last.weight.mul_(3)
    sosp_hub.save_pretrained(small, folder)
    assert record_of(folder) != before
    sosp_hub.from_pretrained(folder, model=Net(), dtype=torch.bfloat16)
    sosp_hub.save_pretrained(small.to(torch.bfloat16), folder)
    assert sosp_hub.from_pretrained(folder, model=Net().to(torch.bfloat16))


HOSTILE = {
    "no object": 5,
    "no outputs": {"inputs": {"value": 1}},
    "no number": {"inputs": {"tuple": []}, "outputs": [["a"]]},
    "not finite": {"inputs": {"tuple": []}, "outputs": [[float("inf")]]},
    "huge": {"inputs": {"tuple": [{"dtype": "float32", "shape": [2**21, 3]}]}, "outputs": []},
    "a size of text": {"inputs": {"tuple": [{"dtype": "float32", "shape": ["3"]}]}, "outputs": []},
    "no type": {"inputs": {"tuple": [{"dtype": "load", "shape": [3]}]}, "outputs": []},
    "bounds": {
        "inputs": {"tuple": [{"dtype": "int64", "shape": [3], "least": 3, "most": 1}]},
        "outputs": [],
    },
    "deep": {"inputs": {"tuple": [{"tuple": [{"tuple": [{"tuple": [{"tuple": [{"tuple": [
        {"tuple": [{"value": 1}]}]}]}]}]}]}]}, "outputs": []},
    "nothing": {"inputs": {}, "outputs": []},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_record_that_is_none_is_refused(case, tmp_path):
    folder, _ = saved(Net, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sosp_hub_check": HOSTILE[case]}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        sosp_hub.from_pretrained(folder, model=Net())
