"""Whole blocks that go beside the width: chosen by measured loss, cut for real, saved, loaded."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import sosp_hub
from sosp_hub.errors import TraceError
from sosp_hub.pipeline import blocks as module
from sosp_hub.pipeline.blocks import Block, blocks_of, shares, without
from sosp_hub.plan import PruningPlan
from sosp_hub.prune import main
from sosp_hub.structure.trace import trace
from tests.cases import CASES
from tests.compare import assert_close
from tests.structure.oracles import fill

pytestmark = pytest.mark.slow


def traced(name):
    case = next(case for case in CASES if case.name == name)
    model = fill(case.model())
    outputs = None if case.library == "timm" else "logits"
    return case, model, trace(model, case.inputs(), outputs=outputs)


def test_blocks_are_those_of_the_layers_in_their_order():
    _, _, graph = traced("llama")
    found = [(block.kind, block.layer) for block in blocks_of(graph, ("attention", "mlp", "layer"))]
    layers = ["model.layers.0", "model.layers.1"]
    assert found == [
        *[("layer", layer) for layer in layers],
        *[(kind, layer) for layer in layers for kind in ("attention", "mlp")],
    ]
    assert [b.kind for b in blocks_of(traced("bert")[2], ("mlp",))] == ["mlp", "mlp"]  # no pooler
    with pytest.raises(TraceError, match=r"blocks\.kinds.*no attention"):
        blocks_of(trace(torch.nn.Linear(3, 2), (torch.randn(2, 3),)), ("attention",))


@pytest.mark.parametrize("kind", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_block_that_goes_is_cut_saved_loaded_and_computes_what_the_mask_does(
    name, kind, tmp_path
):
    case, model, graph = traced(name)
    block = blocks_of(graph, (kind,))[1]
    before = copy.deepcopy(model.state_dict())
    with without(model, graph, [block]), torch.no_grad():
        masked = model(**case.inputs()).logits
    assert_close(model.state_dict(), before, relative=0)
    with torch.no_grad():
        assert (model(**case.inputs()).logits - masked).abs().max() > 1e-4
    saliency = {block.group: torch.ones(graph.groups[block.group].size)}
    if kind == "layer":
        saliency[block.group][1] = 0
    kinds = (graph.groups[block.group].kind,)
    plan = sosp_hub.allocate(graph, saliency, groups=shares(graph, [block]), kinds=kinds)
    assert plan.num_kept() == {block.group: int(kind == "layer")}
    small = sosp_hub.apply(model, graph, plan, strict=True)
    sosp_hub.save_pretrained(small, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert_close(loaded(**case.inputs()).logits, masked, relative=1e-5)
    assert loaded.num_parameters() < model.num_parameters()
    if name == "llama":
        tokens = case.inputs()["input_ids"][:, :5]
        made = {
            cache: loaded.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=cache)
            for cache in (True, False)
        }
        assert_close(made[True], made[False], relative=0)
        assert made[True].shape[1] == 9


def test_a_rebuild_goes_on_beside_a_block_that_goes():
    case, model, graph = traced("bert")
    block = blocks_of(graph, ("mlp",))[0]
    other = blocks_of(graph, ("mlp",))[1].group
    size = graph.groups[other].size
    plan = PruningPlan(
        {block.group: (), other: tuple(range(0, size, 2))},
        {block.group: graph.groups[block.group].size, other: size},
    )
    small = sosp_hub.rebuild(model, graph, plan, [case.batch(8)])
    bias = small.bert.encoder.layer[0].output.dense.bias
    assert not torch.equal(bias, model.bert.encoder.layer[0].output.dense.bias)  # takes the mean
    assert bias.isfinite().all()


# Which ones go: against trying every one after each removal --------------------------------------


class Table:
    """Losses by what is gone, and how often they were measured."""

    def __init__(self, alone, more):
        self.alone, self.more, self.asked = alone, more, []

    def __call__(self, gone):
        self.asked.append(frozenset(gone))
        pairs = [{one, two} for i, one in enumerate(gone) for two in gone[:i]]
        return sum(self.alone[n] for n in gone) + sum(self.more.get(frozenset(p), 0) for p in pairs)


@pytest.mark.parametrize("budget", [0.01, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_the_least_loss_for_what_is_saved_goes_first_and_is_measured_anew(
    seed, budget, monkeypatch
):
    generator = torch.Generator().manual_seed(seed)
    _, model, graph = traced("llama")
    able = blocks_of(graph, ("attention", "mlp"))
    alone = {
        b.name: x for b, x in zip(able, torch.rand(4, generator=generator).tolist(), strict=True)
    }
    names = list(alone)
    more = {
        frozenset({one, two}): float(torch.rand((), generator=generator))
        for i, one in enumerate(names)
        for two in names[:i]
    }
    table = Table(alone, more)
    gone = []
    monkeypatch.setattr(module, "without", lambda model, graph, blocks: _Noting(gone, blocks))
    monkeypatch.setattr(module, "_loss", lambda *_: table(list(gone)))
    section = SimpleNamespace(kinds=("attention", "mlp"), most=3, num_samples=2)
    context = SimpleNamespace(
        recipe=SimpleNamespace(
            structure=SimpleNamespace(blocks=section),
            budget=SimpleNamespace(targets=lambda: {"params": budget}),
        ),
        graph=graph,
        model=model,
        stuck=set(),
    )
    found = [one["name"] for one in module.blocks._make(context)["removed"]]
    sizes, whole = {b.name: _params(graph, b) for b in able}, sosp_hub.cost.cost(graph).params
    expected = []
    for _ in range(3):  # the slow way
        now = table(expected)
        price = {n: (table([*expected, n]) - now) / sizes[n] for n in names if n not in expected}
        left = whole - sum(sizes[n] for n in expected)
        price = {n: each for n, each in price.items() if left - sizes[n] >= budget * whole}
        if price:
            expected.append(min(price, key=lambda name: price[name]))
    assert found == expected
    assert (len(found) == 3) == (budget == 0.01)  # the most, or fewer


def test_of_a_layer_either_it_goes_or_its_blocks(monkeypatch):
    _, model, graph = traced("llama")
    able = blocks_of(graph, ("attention", "mlp", "layer"))
    first = next(block for block in able if block.kind == "layer")
    parts = [b.name for b in able if b.kind != "layer" and b.layer != first.layer]
    costs = {b.name: 0.1 if b is first else 0.2 if b.name in parts else 0.9 for b in able}
    table, gone = Table(costs, {}), []
    monkeypatch.setattr(module, "without", lambda model, graph, blocks: _Noting(gone, blocks))
    monkeypatch.setattr(module, "_loss", lambda *_: table(list(gone)))
    section = SimpleNamespace(kinds=("attention", "mlp", "layer"), most=len(able), num_samples=2)
    context = SimpleNamespace(
        recipe=SimpleNamespace(
            structure=SimpleNamespace(blocks=section),
            budget=SimpleNamespace(targets=lambda: {"params": 0.01}),
        ),
        graph=graph,
        model=model,
        stuck=set(),
    )
    found = [one["name"] for one in module.blocks._make(context)["removed"]]
    assert found[0] == first.name
    assert sorted(found[1:]) == sorted(parts)


class _Noting:
    def __init__(self, gone, blocks):
        self.gone, self.blocks = gone, blocks

    def __enter__(self):
        self.gone[:] = [block.name for block in self.blocks]

    def __exit__(self, *_):
        pass


def _params(graph, block):
    plan = PruningPlan({block.group: ()}, {block.group: graph.groups[block.group].size})
    whole, cut = sosp_hub.cost.cost(graph), sosp_hub.cost.cost(graph, plan)
    return whole.params - cut.params


# In a recipe --------------------------------------------------------------------------------------


RECIPE = """
model: {library: timm, id: test_vit, task: image-classification, pretrained: false, num_labels: 10}
data: {id: sklearn/digits, num_train: 64, num_test: 32}
structure: {kinds: [head, neuron], blocks: {kinds: [attention, mlp, layer], most: 2}}
criterion: {name: taylor, num_samples: 24, batch_size: 16}
budget: {params: 0.6}
finetune: {epochs: 0}
evaluate: {metrics: [loss], latency: false}
output: {dir: OUTPUT, figures: false}
"""


def test_blocks_and_width_in_one_recipe_and_once_more_at_another_budget(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "out")))
    assert main([str(path)]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    gone = report["plan"]["provenance"]["blocks"]
    assert len(gone) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "whole blocks, by measured loss on calibration samples" in card
    assert report["cost"]["after"]["params"] <= 0.6 * report["cost"]["before"]["params"]
    sosp_hub.from_pretrained(tmp_path / "out")
    again = ["--from-scores", str(tmp_path / "out"), "budget.params=0.5"]
    assert main([*again, f"output.dir={tmp_path / 'again'}"]) == 0
    plan = json.loads((tmp_path / "again" / "sosp_report.json").read_text())["plan"]
    assert plan["provenance"]["blocks"] == gone
    assert load_file(tmp_path / "again" / "model.safetensors")


def test_a_block_that_cannot_go_stays_and_another_goes(tmp_path, caplog, monkeypatch):
    """A Llama asks its first layer's cache for positions, which nothing fills without attention."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {"[UNK]": 0, **{f"w{number}": number + 1 for number in range(63)}}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[UNK]"
    ).save_pretrained(folder)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(3000)))
    losses = module._loss
    monkeypatch.setattr(
        module, "_loss", lambda context, model, number: _first(model, losses, context, number)
    )
    recipe = ["--task", "text-generation", "--data", str(tmp_path / "text.txt"), "--params", "0.8"]
    keys = [
        "data.max_length=16", "data.num_train=32", "data.num_test=8", "finetune.epochs=0",
        "structure.blocks={kinds: [attention], most: 1}", f"output.dir={tmp_path / 'out'}",
    ]  # fmt: skip
    assert main([str(folder), *recipe, *keys]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    (gone,) = report["plan"]["provenance"]["blocks"]
    assert gone["layer"] != "model.layers.0"
    assert "model.layers.0.self_attn.q_proj:kv_group cannot be left out" in caplog.text
    sosp_hub.from_pretrained(tmp_path / "out")


def _first(model, losses, context, number):
    """A loss by which the first layer's attention goes before all others."""
    off = not model.model.layers[0].self_attn.o_proj.weight.any()
    return losses(context, model, number) - 5 * off


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("structure.blocks={kinds: [attentions]}", "structure.blocks.kinds"),
        ("structure.blocks={most: 0}", "structure.blocks.most"),
        ("structure.blocks={kinds: []}", "structure.blocks.kinds"),
        ("budget={max_drop: {loss: 5%}}", "structure.blocks"),
        ("schedule={rounds: 2}", "structure.blocks"),
    ],
)
def test_what_is_no_block_is_refused(given, told, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "out")))
    assert main([str(path), given]) == 2
    assert told in capsys.readouterr().err


def test_a_layer_takes_its_blocks_along():
    _, _, graph = traced("llama")
    gone = [Block("model.layers.0", "layer", "model.layers:layer", "model.layers.0")]
    assert shares(graph, gone) == {"model.layers:layer": 0.5}
