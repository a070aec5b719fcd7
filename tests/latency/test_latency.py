"""Times of layers in a table, and what a plan takes by them; what a model holds while it serves."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import sosp_hub
from sosp_hub import latency
from sosp_hub.cost import cost
from sosp_hub.errors import BudgetError
from sosp_hub.latency import Decoder, LatencyTable, ServingMemory, table_path
from tests.compare import assert_close


@pytest.fixture
def by_products(monkeypatch):
    """Layers take a nanosecond a product, and the dense model a tenth more than its layers."""

    def timed(runs):
        return {key: 1e-9 * products(make()) for key, make in runs.items()}

    def products(run):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 2

    def whole(models, inputs, budget_s):
        return [1.1 * products(lambda: models[0](*inputs)) * 1e-9]

    monkeypatch.setattr(latency, "_timed", timed)
    monkeypatch.setattr(latency, "measure_latency", whole)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x).relu()


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def plan_of(graph, counts):
    kept = {name: tuple(range(count)) for name, count in counts.items()}
    return sosp_hub.PruningPlan(kept, {name: graph.groups[name].size for name in kept})


@pytest.mark.parametrize("counts", [(16, 24), (8, 24), (16, 6), (11, 17), (3, 2), (2, 2)])
def test_between_widths_it_is_what_the_layers_of_the_cut_model_take(by_products, counts):
    model, inputs = conv_net(), (torch.randn(2, 3, 12, 12),)
    graph = sosp_hub.trace(model, inputs)
    table = LatencyTable(model, graph, inputs)
    plan = plan_of(graph, dict(zip(graph.groups, counts, strict=True)))
    cut = sosp_hub.apply(model, graph, plan)
    expected = LatencyTable(cut, sosp_hub.trace(cut, inputs), inputs)
    rest = table.dense_s - table.layers_s  # what is outside of the layers stays
    assert_close(table(plan), expected.layers_s + rest, relative=1e-6)
    assert_close(table.layers_s, table.dense_s / 1.1, relative=1e-6)


def test_layers_that_go_take_no_time(by_products):
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(12) for _ in range(3)), nn.Linear(12, 5)).eval()
    inputs = (torch.randn(2, 12),)
    graph = sosp_hub.trace(model, inputs)
    (name,) = [name for name, group in graph.groups.items() if group.kind == "layer"]
    table = LatencyTable(model, graph, inputs)
    plan = sosp_hub.PruningPlan({name: (0, 2)}, {name: 3})
    cut = sosp_hub.apply(model, graph, plan)
    expected = LatencyTable(cut, sosp_hub.trace(cut, inputs), inputs)
    rest = table.dense_s - table.layers_s
    assert_close(table(plan), expected.layers_s + rest, relative=1e-6)


def test_attention_takes_what_it_takes_in_the_cut_model(by_products, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    def attention(model, inputs):
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        flops = counter.get_flop_counts()["Global"]
        return 1e-9 * sum(num for op, num in flops.items() if "bmm" in str(op)) / 2

    monkeypatch.setattr(latency, "_products_s", attention)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    for block in model.blocks:
        block.attn.fused_attn = False  # in steps that are counted
    inputs = (torch.randn(2, 3, 160, 160),)
    graph = sosp_hub.trace(model, inputs)
    table = LatencyTable(model, graph, inputs)
    heads = {name: 1 for name, group in graph.groups.items() if group.kind == "head"}
    plan = plan_of(graph, heads)
    cut = sosp_hub.apply(model, graph, plan)
    expected = LatencyTable(cut, sosp_hub.trace(cut, inputs), inputs)
    assert 0 < expected.products_s < table.products_s
    rest = table.dense_s - table.layers_s - table.products_s
    assert_close(table(plan), expected.layers_s + expected.products_s + rest, relative=1e-6)


def test_what_goes_over_the_numbers_that_layers_give_is_less_by_those_that_are_cut(
    by_products, monkeypatch
):
    timed = latency._timed
    monkeypatch.setattr(latency, "_timed", lambda runs: {**timed(runs), "elements": 1.0})
    model, inputs = conv_net(), (torch.randn(2, 3, 12, 12),)
    graph = sosp_hub.trace(model, inputs)
    table = LatencyTable(model, graph, inputs)
    plan = plan_of(graph, dict(zip(graph.groups, (4, 12), strict=True)))
    cut = sosp_hub.apply(model, graph, plan)
    expected = LatencyTable(cut, sosp_hub.trace(cut, inputs), inputs)
    dense_numbers, numbers = (2 * (a * 144 + b * 25 + 5) for a, b in ((16, 24), (4, 12)))
    rest = (table.dense_s - table.layers_s) * numbers / dense_numbers
    assert_close(table(plan), expected.layers_s + rest, relative=1e-6)


class WithItsBias(nn.Linear):
    """Gives its bias beside its result, as layers of tensor-parallel models do."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight), self.bias


class ReadsPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = WithItsBias(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden, bias = self.up(x)
        return self.down((hidden + bias).relu())


def test_layers_that_give_more_than_a_tensor_have_times_too(by_products):
    model, inputs = ReadsPairs().eval(), (torch.randn(2, 6),)
    graph = sosp_hub.trace(model, inputs)
    table = LatencyTable(model, graph, inputs)
    assert_close(table.layers_s, 1e-9 * 2 * (6 * 8 + 8 * 3), relative=1e-6)


def test_layers_that_take_longer_alone_are_scaled_to_the_model(by_products, monkeypatch):
    """Timed one by one they may miss what the model has in its caches."""
    model, inputs = conv_net(), (torch.randn(2, 3, 12, 12),)
    graph = sosp_hub.trace(model, inputs)
    layers_s = LatencyTable(model, graph, inputs).layers_s
    monkeypatch.setattr(latency, "measure_latency", lambda *_: [layers_s / 2])
    table = LatencyTable(model, graph, inputs)
    assert_close(table(plan_of(graph, {})), table.dense_s, relative=1e-6)


def test_a_budget_is_planned_without_a_cut(by_products, monkeypatch):
    model, inputs = conv_net(), (torch.randn(2, 3, 12, 12),)
    graph = sosp_hub.trace(model, inputs)
    table = LatencyTable(model, graph, inputs)
    monkeypatch.setattr(sosp_hub.surgery.apply, "apply", None)
    scores = {name: torch.arange(float(group.size)) for name, group in graph.groups.items()}
    plan = sosp_hub.allocate(graph, scores, latency_s=0.6, measure=table)
    assert 0.5 < table(plan) / table.dense_s <= 0.6


@pytest.mark.parametrize("depth", [2, 6])
def test_a_layer_is_timed_with_weights_as_far_away_as_in_the_model(depth, monkeypatch):
    """One weight again and again lies in a cache, and a decoded token's time is that of memory."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(depth))).eval()
    graph, inputs = sosp_hub.trace(model, (torch.randn(2, 64),)), (torch.randn(2, 64),)
    linear, asked, places = F.linear, set(), {}
    monkeypatch.setattr(F, "linear", lambda x, w, *b: asked.add(w.data_ptr()) or linear(x, w, *b))

    def timed(runs):
        for key, make in runs.items():
            run = make()
            asked.clear()
            for _ in range(300):
                run()
            places[key] = len(asked)
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(latency, "_timed", timed)
    LatencyTable(model, graph, inputs)
    whole = next(number for key, number in places.items() if key.endswith("[64, 64]"))
    assert whole == {2: 2, 6: 8}[depth]  # of 64 x 64 x 4 bytes, the next power of two
    small = next(number for key, number in places.items() if key.endswith("[16, 64]"))
    assert small == 4 * whole


def test_times_are_kept_for_the_same_conditions(tmp_path, monkeypatch):
    model, inputs = conv_net(), (torch.randn(2, 3, 12, 12),)
    graph = sosp_hub.trace(model, inputs)
    path = tmp_path / "cache" / "table.json"
    rng = torch.get_rng_state()
    first = LatencyTable(model, graph, inputs, path=path, conditions="one")
    assert torch.equal(torch.get_rng_state(), rng)
    assert first.layers_s > 0
    (times,) = json.loads(path.read_text()).values()
    num_widths = 5 + 25 + 5  # of each layer, those of the second in both directions
    assert len(times) == num_widths + 1  # and a product of numbers one by one
    asked = []
    monkeypatch.setattr(latency, "_timed", lambda runs: asked.append(len(runs)) or {})
    again = LatencyTable(model, graph, inputs, path=path, conditions="one")
    assert asked == [0]
    assert again.layers_s == first.layers_s
    with pytest.raises(KeyError):  # other conditions, other times, of which there are none
        LatencyTable(model, graph, inputs, path=path, conditions="two")
    path.write_text("{broken")
    with pytest.raises(KeyError):
        LatencyTable(model, graph, inputs, path=path, conditions="one")


def test_a_table_lies_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = table_path("../A CPU (R) @ 2 GHz")
    assert path == tmp_path / "sosp_hub" / "latency" / "A-CPU--R----2-GHz.json"


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    return model, sosp_hub.trace(model, {"input_ids": ids, "use_cache": False}), ids


def test_what_is_held_is_that_of_the_cut_model(llama):
    model, graph, _ = llama
    names = [name for name, group in graph.groups.items() if group.kind == "kv_group"]
    assert len(names) == 2
    plan = plan_of(graph, {names[0]: 1})
    held = ServingMemory(model, graph, batch=3, length=20)
    cut = sosp_hub.apply(model, graph, plan)
    with torch.no_grad():
        cache = Decoder(cut, torch.zeros(3, 20, dtype=torch.long)).cache
    num_bytes = sum(
        each.numel() * each.element_size()
        for layer in cache.layers
        for each in (layer.keys, layer.values)
    )
    state = {t.data_ptr(): t for t in cut.parameters()}
    weights = sum(t.numel() * t.element_size() for t in state.values())
    assert held(plan) == weights + num_bytes
    assert held.cache_bytes == 2 * 2 * 2 * 8 * 4 * 3 * 20  # layers, k and v, heads, width, bytes


def test_a_cache_of_one_head_is_held_whole():
    """Query heads may go, what they share is cached all the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(24).reshape(2, 12)
    graph = sosp_hub.trace(model, {"input_ids": ids, "use_cache": False})
    heads = [name for name, group in graph.groups.items() if group.kind == "head"]
    assert len(heads) == 2
    held = ServingMemory(model, graph, batch=3, length=20)
    num_bytes = 2 * 2 * 8 * 4 * 3 * 20  # layers, k and v, width, bytes
    assert held.cache_bytes == num_bytes
    plan = plan_of(graph, dict.fromkeys(heads, 2))
    assert held(plan) == cost(graph, plan).bytes + num_bytes


def test_a_layer_with_a_window_holds_no_more_than_that():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    graph = sosp_hub.trace(model, {"input_ids": torch.arange(24).reshape(2, 12)})
    for length in (5, 20):
        with torch.no_grad():
            cache = model(torch.zeros(3, length, dtype=torch.long), use_cache=True).past_key_values
        held = ServingMemory(model, graph, batch=3, length=length)
        state = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        assert held.cache_bytes == sum(each.numel() * each.element_size() for each in state)


def test_a_step_of_decoding_is_the_same_each_time(llama):
    model, graph, ids = llama
    step = Decoder(model, ids)
    with torch.no_grad():
        first, second = (step(ids[:, :1]) for _ in range(2))
        whole = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    assert torch.equal(first, second)
    assert_close(first, whole, relative=1e-4)
    prefill = LatencyTable(model, graph, {"input_ids": ids, "use_cache": False})
    decode = LatencyTable(step, graph, (ids[:, :1],))
    assert len(decode._layers) == len(prefill._layers) == 2 * 7 + 1
    assert {layer.shape[1] for layer in prefill._layers} == {12}
    assert {layer.shape[1] for layer in decode._layers} == {1}


def test_a_model_without_a_cache_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, ids, use_cache):
            return {"logits": self.layer(ids.float())}

    with pytest.raises(BudgetError, match="has no cache of keys and values"):
        Decoder(Net(), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("kind", ["window", "state"])
def test_a_cache_that_cannot_be_set_back_is_refused_and_not_timed(kind, monkeypatch):
    """A run of such a model died at its end, where the step is timed for the report."""
    from types import SimpleNamespace

    from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

    from sosp_hub.pipeline import result

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
    if kind == "window":
        config = MistralConfig(
            **sizes, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
            sliding_window=4,
        )  # fmt: skip
        model = MistralForCausalLM(config).eval()
    else:
        model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    with pytest.raises(BudgetError, match=r"budget.decode_s: .*write latency_s or prefill_s"):
        Decoder(model, torch.zeros(1, 9, dtype=torch.long))
    if kind == "state":
        graph = sosp_hub.trace(model, {"input_ids": torch.zeros(1, 9, dtype=torch.long)})
        with pytest.raises(BudgetError, match=r"budget.serving_bytes: .*write bytes"):
            ServingMemory(model, graph, batch=1, length=9)
    given = {"input_ids": torch.zeros(1, 9, dtype=torch.long)}
    monkeypatch.setattr(result, "_for_latency", lambda *_: (given, {}))
    loaded = SimpleNamespace(model=model, task="text-generation")
    assert result.decoding_of(None, loaded, model) == {}


@pytest.mark.parametrize("name", ["latency_s", "prefill_s", "decode_s", "serving_bytes"])
def test_measured_budgets_need_a_measure(name):
    model, inputs = conv_net(), (torch.randn(2, 3, 12, 12),)
    graph = sosp_hub.trace(model, inputs)
    scores = {name: torch.arange(float(group.size)) for name, group in graph.groups.items()}
    with pytest.raises(BudgetError, match=f"{name} is measured; give measure="):
        sosp_hub.allocate(graph, scores, **{name: 0.5})


def test_a_plan_that_cuts_nothing_takes_what_the_dense_model_takes(by_products, monkeypatch):
    class Summed(nn.Module):
        """Its product of activations is none that the graph counts."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x).relu()
            return self.last(h + torch.einsum("nt,nd->nd", x, h))

    monkeypatch.setattr(latency, "_products_s", lambda *_: 1e-8)
    model, inputs = Summed().eval(), (torch.ones(4, 16),)
    table = LatencyTable(model, sosp_hub.trace(model, inputs), inputs)
    assert_close(table(sosp_hub.PruningPlan({}, {})), table.dense_s, relative=1e-6)


def test_layers_that_are_called_by_keyword_are_timed(by_products):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(input=self.first(input=x).relu())

    model, inputs = ByKeyword().eval(), (torch.ones(4, 6),)
    table = LatencyTable(model, sosp_hub.trace(model, inputs), inputs)
    assert table.layers_s == pytest.approx(4e-9 * (6 * 8 + 8 * 3))
