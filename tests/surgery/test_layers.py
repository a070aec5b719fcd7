"""Stacks whose layers can be left out, nested ones, and stacks that must stay whole."""

import copy
from typing import ClassVar

import pytest
import torch
import transformers
from torch import nn

import sosp_hub
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.cases import CASES
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, plan_of, run


class Config:
    """What the engine takes for a transformers config."""

    def __init__(self, model_type, num_hidden_layers, **more):
        self.model_type, self.num_hidden_layers = model_type, num_hidden_layers
        vars(self).update(more)

    def to_diff_dict(self):
        return vars(self)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Outer(nn.Module):
    """A layer that is a stack itself."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Inner() for _ in range(3)))

    def forward(self, x):
        return x + self.blocks(x).tanh()


class Pair(Inner):
    """A layer that makes two results, and hands on what it was given for the others."""

    def forward(self, x, second):
        x = super().forward(x)
        return x, x.tanh() * second, second


class PairTower(nn.Module):
    """``used``: which of the further results of its layers counts."""

    def __init__(self, used):
        super().__init__()
        self.config = Config("a", 3)
        self.layers = nn.ModuleList(Pair() for _ in range(3))
        self.used = used

    def forward(self, x):
        second = x.sigmoid()
        for layer in self.layers:
            x, *more = layer(x, second)
            second = more[self.used]
        return x * second


class Tower(nn.Module):
    """``taken``: the layer whose result counts; ``between``: the parent works between layers."""

    def __init__(self, config, layer=Inner, taken=-1, between=False):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(layer() for _ in range(config.num_hidden_layers))
        self.taken, self.between = taken, between

    def forward(self, x):
        seen = [x]
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x * 2 if self.between else x)
            seen.append(x)
        return seen[self.taken]


class Model(nn.Module):
    def __init__(self, *towers):
        super().__init__()
        configs = {f"{tower.config.model_type}_config": tower.config for tower in towers}
        self.config = Config("both", 3, **configs)
        self.towers = nn.ModuleList(towers)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.stack([tower(x) for tower in self.towers]).sum(0))


def traced(*towers):
    torch.manual_seed(0)
    model = fill(Model(*towers).eval())
    return model, trace(model, (torch.randn(2, 4, 5),))


def layers_of(graph):
    return {name: group.layers for name, group in graph.groups.items() if group.kind == "layer"}


def test_layers_of_nested_stacks_are_dropped_together():
    """An inner stack of an outer layer that goes, of one that moves up, and of one that stays."""
    model, graph = traced(Tower(Config("a", 3), Outer))
    assert len(layers_of(graph)) == 4
    outer, *inner = layers_of(graph)
    plan = plan_of(graph, {outer: (0, 2), inner[0]: (1,), inner[1]: (0,), inner[2]: (0, 2)})
    pruned = apply(model, graph, plan)
    assert [len(layer.blocks) for layer in pruned.towers[0].layers] == [1, 2]
    assert_close(run(pruned, graph), gated(model, graph, plan))
    assert [len(layer.blocks) for layer in model.towers[0].layers] == [3, 3, 3]


def test_only_the_config_of_the_stack_gets_shorter():
    """Two towers of as many layers: the other one's config, wherever it is, stays as it is."""
    model, graph = traced(Tower(Config("a", 3)), Tower(Config("b", 3)))
    plan = plan_of(graph, {"towers.1.layers:layer": (0, 2)})
    pruned = apply(model, graph, plan)
    found = [pruned.towers[0].config, pruned.towers[1].config, pruned.config]
    assert [config.num_hidden_layers for config in found] == [3, 2, 3]
    assert pruned.config.a_config.num_hidden_layers == 3
    assert pruned.config.b_config is pruned.towers[1].config
    assert model.config.b_config.num_hidden_layers == 3
    assert_close(run(pruned, graph), gated(model, graph, plan))


class Serving(Inner):
    """As T5's first layer, it has a table of its own that serves the others."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return super().forward(x) + self.table


def test_a_layer_that_has_more_than_the_others_stays():
    tower = Tower(Config("a", 4))
    tower.layers[0] = Serving()
    _, graph = traced(tower)
    assert layers_of(graph) == {
        "towers.0.layers:layer": tuple(f"towers.0.layers.{i}" for i in (1, 2, 3))
    }


@pytest.mark.parametrize("tower", [{"taken": -2}, {"taken": 1}, {"between": True}])
def test_a_stack_stays_whole_where_more_than_its_last_result_counts(tower):
    _, graph = traced(Tower(Config("a", 3), **tower))
    assert not layers_of(graph)
    (reason,) = graph.undroppable.values()
    assert "not of the last one alone" in reason
    assert "undroppable: layers of towers.0.layers: the code around it" in graph.describe()


class Refined(Tower):
    """``heads`` run after each layer in training, and after the last one alone in evaluation."""

    def __init__(self, config):
        super().__init__(config)
        self.heads = nn.ModuleList(Inner() for _ in self.layers)

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.training or number == len(self.layers) - 1:
                seen = self.heads[number](x)
        return seen


def test_a_stack_of_which_evaluation_runs_one_layer_stays_whole():
    """D-FINE's quality heads: without one of them training found none at the last position."""
    _, graph = traced(Refined(Config("a", 3)))
    assert set(layers_of(graph)) <= {"towers.0.layers:layer"}
    assert graph.undroppable["towers.0.heads"] == "evaluation does not run all of its layers"


class Fed(Inner):
    """A layer with an input of its own."""

    def forward(self, x, own):
        return super().forward(x) + own


class PerLayerInputs(Tower):
    """Each layer gets an input of its own, as Gemma 3n's and 4's do."""

    def __init__(self, config):
        super().__init__(config, Fed)
        self.own = nn.Linear(6, 6 * config.num_hidden_layers)

    def forward(self, x):
        own = self.own(x).reshape(*x.shape[:-1], self.config.num_hidden_layers, 6)
        for number, layer in enumerate(self.layers):
            x = layer(x, own[:, :, number])
        return x


def test_a_stack_stays_whole_where_a_tensor_has_a_part_for_each_layer():
    """Of two towers with as many layers, the one whose number it is."""
    model, graph = traced(PerLayerInputs(Config("a", 3)), Tower(Config("b", 3)))
    assert set(layers_of(graph)) == {"towers.1.layers:layer"}
    assert "a part for each of its layers" in graph.undroppable["towers.0.layers"]
    plan = plan_of(graph, {"towers.1.layers:layer": (0, 2)})
    assert_close(run(apply(model, graph, plan), graph), gated(model, graph, plan))


def test_a_layer_whose_further_results_count_stays():
    """The next layer uses what it makes (as do CoaT's, EfficientViM's and TNT's), or not."""
    _, graph = traced(PairTower(used=0))
    assert not layers_of(graph)
    assert "more than the first result" in graph.describe()
    model, graph = traced(PairTower(used=1))
    plan = plan_of(graph, {"towers.0.layers:layer": (1,)})
    assert_close(run(apply(model, graph, plan), graph), gated(model, graph, plan))


def test_a_stack_whose_results_are_collected_but_not_used_can_lose_layers():
    model, graph = traced(Tower(Config("a", 3)))
    before = copy.deepcopy(model.state_dict())
    plan = plan_of(graph, {"towers.0.layers:layer": (1,)})
    assert_close(run(apply(model, graph, plan), graph), gated(model, graph, plan))
    assert_close(model.state_dict(), before, relative=0)


class Recorded(Tower):
    """It reads the result of its last layer from a hook, as transformers models do."""

    results: ClassVar[list[torch.Tensor]] = []

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, out: Recorded.results.append(out))

    def forward(self, x):
        Recorded.results.clear()
        super().forward(x)
        return Recorded.results[-1]


@pytest.mark.parametrize("kept", [(0, 1), (0, 2), (1, 2)])
def test_a_stack_whose_last_result_is_recorded_by_a_hook_can_lose_layers(kept):
    """Also the last one, as of LLaVA-OneVision's vision tower."""
    model, graph = traced(Recorded(Config("a", 3)))
    plan = plan_of(graph, {"towers.0.layers:layer": kept})
    found = run(apply(model, graph, plan, strict=True), graph)
    assert_close(found, gated(model, graph, plan))


def test_settings_of_each_layer_go_with_the_layer():
    """Lists with one entry per layer, such as which of them have a sliding window."""
    settings = ["first", "second", "third"]
    model, graph = traced(Tower(Config("a", 3, layer_types=settings)))
    plan = plan_of(graph, {"towers.0.layers:layer": (0, 2)})
    pruned = apply(model, graph, plan)
    assert pruned.towers[0].config.layer_types == ["first", "third"]
    assert model.towers[0].config.layer_types == settings


class Seeing(Inner):
    """A layer that is told whether it sees all places."""

    def forward(self, x, everywhere):
        seen = x.mean(1, keepdim=True) if everywhere else x
        return x + self.down(self.up(seen).relu())


class Windowed(nn.Module):
    """Tells by the positions of its layers which of them see all places, as Qwen2.5-VL does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Seeing() for _ in range(3)])
        self.fullatt_block_indexes = [1]
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x, number in self.fullatt_block_indexes)
        return self.head(x)


@pytest.mark.parametrize(("kept", "left"), [((1, 2), [0]), ((0, 2), [])])
def test_positions_of_layers_move_up_with_them(kept, left):
    model = fill(Windowed().eval())
    graph = trace(model, (torch.randn(2, 4, 6),))
    pruned = apply(model, graph, plan_of(graph, {"blocks:layer": kept}), strict=True)
    assert pruned.fullatt_block_indexes == left


def test_a_sliding_window_stays_with_its_layer(tmp_path):
    """Sliding, full, full attention: without the first layer no attention slides."""
    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=3, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    graph = trace(model, inputs, outputs="logits")
    pruned = apply(model, graph, plan_of(graph, {"model.layers:layer": (1, 2)}))
    sosp_hub.save_pretrained(pruned, tmp_path)
    loaded = sosp_hub.from_pretrained(tmp_path)
    first, second = (run(each, graph)[0] for each in (loaded, pruned))
    assert_close(first, second, what="what was loaded")
    changed = inputs["input_ids"].clone()
    changed[0, 0] = 20  # out of every window, and seen by full attention
    with torch.no_grad():
        moved = loaded(input_ids=changed).logits[0, -1] - first[0, -1]
    assert moved.abs().max() > 1e-4 * first.abs().max()


def test_layers_that_are_left_find_their_place_in_the_cache():
    (case,) = [case for case in CASES if case.name == "llama"]
    model = case.model()
    graph = trace(model, case.inputs(), outputs="logits")
    (name,) = layers_of(graph)
    number = graph.groups[name].size
    pruned = apply(model, graph, plan_of(graph, {name: tuple(range(1, number))}))
    layers = pruned.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(number - 1))
    options = {"max_new_tokens": 6, "do_sample": False}
    texts = [pruned.generate(torch.arange(5)[None], use_cache=c, **options) for c in (True, False)]
    assert texts[0].tolist() == texts[1].tolist()


class Normed(Inner):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(6, 4)

    def forward(self, x):
        x = nn.functional.layer_norm(super().forward(x), (6,))
        return x + self.down(self.more(x).relu())


class TimeFirst(nn.Module):
    """Its first layer reads a transposed tensor, where a linear layer takes other steps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Normed() for _ in range(3))
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.last(x.transpose(0, 1))


def test_the_first_layer_goes_where_it_reads_another_memory_layout_than_the_next():
    """Those after it then took its steps in the record, and its masks (FSMT's decoder)."""
    torch.manual_seed(0)
    model = fill(TimeFirst().eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    plan = plan_of(graph, {"layers:layer": (1, 2), "layers.0.up:neuron": (0, 1)})
    cut_alone = apply(model, graph, plan_of(graph, {"layers:layer": (1, 2)}), strict=True)
    pruned = apply(model, graph, plan, strict=True)
    assert_close(run(pruned, graph), run(cut_alone, graph), what="without the layer")


class Pooling(nn.Module):
    """The first layer of its stack reads twice as many positions as it hands on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Reading() for _ in range(3))
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        for number, layer in enumerate(self.layers):
            pooled = x[:, ::2] if number == 0 else x
            x = layer(pooled, x)
        return self.last(x)


class Reading(Inner):
    def forward(self, x, read):
        return super().forward(x + read.mean(1, keepdim=True))


def test_a_layer_that_is_given_tensors_of_other_sizes_stays():
    """The code gives them to the first of a stack, whichever that is (Funnel)."""
    torch.manual_seed(0)
    model = fill(Pooling().eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    assert graph.groups["layers:layer"].layers == ("layers.1", "layers.2")
    apply(model, graph, plan_of(graph, {"layers:layer": (1,)}), strict=True)
