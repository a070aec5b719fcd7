"""Targets: plans that their readers take, and files that they load."""

import contextlib
import copy
import json
import logging
import os
import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers

import sosp_hub
from sosp_hub.errors import BudgetError, CheckpointError, ModelError, OutputError
from sosp_hub.export import main
from sosp_hub.recipe.load import load_recipe
from sosp_hub.recipe.targets import TARGETS
from sosp_hub.targets.openvino import OpenVino
from sosp_hub.targets.writers.forms import write_onnx
from tests.checkpoint import cuts
from tests.compare import assert_close

pytestmark = pytest.mark.slow


def llama(**keys):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "intermediate_size": 1280, "num_hidden_layers": 3, "vocab_size": 96,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **keys})).eval()


def traced_llama(**keys):
    model = llama(**keys)
    tokens = {"input_ids": torch.arange(3, 13).reshape(2, 5), "use_cache": False}
    return model, sosp_hub.trace(model, tokens)


@pytest.fixture(scope="module")
def traced():
    return traced_llama()


def shape(num_heads, num_kv, head_dim=8, width=1280):
    return {
        "hidden_size": num_heads * head_dim, "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv, "head_dim": head_dim, "intermediate_size": width,
    }  # fmt: skip


SHAPES = {
    "8 heads, 4 KV": shape(8, 4),
    "9 heads, 3 KV": shape(9, 3, width=1536),
    "12 heads, 12 KV": shape(12, 12, 16, 768),
    "8 heads, 1 KV": shape(8, 1, 32, 1024),
}


@dataclass(frozen=True)
class Sizes:
    """Of a layer that a plan leaves."""

    heads: int
    kv: int
    width: int


def deci_takes(processes=1):
    """Factors and groups of equal heads: vLLM's and SGLang's nemotron_nas, mlx-lm, llama.cpp."""

    def takes(layers, num_heads, _):
        return num_heads % processes == 0 and all(
            num_heads % each.kv == 0
            and num_heads // each.kv >= each.heads // each.kv
            and (each.kv % processes == 0 or processes % each.kv == 0)
            and each.width % 256 == 0
            and each.width % processes == 0
            for each in layers
        )

    return takes


def rows(step):
    """llama.cpp's types pack so many values of a row; what was not cut stays as it was."""

    def takes(layers, num_heads, head_dim):
        return all(
            each.width % step == 0
            and (each.heads == num_heads or each.heads * head_dim % step == 0)
            for each in layers
        )

    return takes


def alike(layers, *_):
    return len(set(layers)) == 1


TAKES = [
    ("deci", {}, deci_takes()),
    ("deci", {"tensor_parallel": 2}, deci_takes(2)),
    ("deci", {"tensor_parallel": 3}, deci_takes(3)),
    ("mlx", {}, deci_takes()),
    ("gguf", {"quantization": "q8_0"}, rows(32)),
    ("gguf", {"quantization": "q4_k_m"}, rows(256)),
    ("transformers", {}, alike),
]
CASES = [
    (name, options, takes, shape)
    for name, options, takes in TAKES
    for shape, sizes in SHAPES.items()
    if not (sizes["num_attention_heads"] % options.get("tensor_parallel", 1))
    and not (sizes["intermediate_size"] % options.get("tensor_parallel", 1))
]
"""Every reader with every shape that it can share out before the cut."""


def random_plans(graph, target, num, *, all_kv):
    """Sizes of every layer, for random saliencies and budgets that can be met.

    Args:
        graph: Of a Llama of three layers.
        target: Whose plans these are.
        num: How many saliencies and budgets.
        all_kv: Whether every query head has a KV head of its own.
    """
    generator, shares = torch.Generator().manual_seed(0), random.Random(0)
    kinds = ("kv_group", "head", "neuron")
    groups = {n: g for n, g in graph.groups.items() if g.kind in kinds}

    def counts(plan, layer):
        kept = plan.num_kept()
        return {g.kind: kept.get(n, g.size) for n, g in groups.items() if f"layers.{layer}." in n}

    for _ in range(num):
        saliency = {n: torch.rand(g.size, generator=generator) ** 4 for n, g in groups.items()}
        share = shares.uniform(0.3, 1.0)
        try:
            plan = sosp_hub.allocate(graph, saliency, params=share, target=target)
        except BudgetError as error:
            assert f"target {target.name}" in str(error)  # noqa: PT017 - both may happen
            continue
        assert plan.provenance["predicted"]["params"] <= share * graph.num_params
        layers = []
        for layer in range(3):
            left = counts(plan, layer)
            heads = left["head"] * left.get("kv_group", 1)  # with KV groups: of each
            kv = left.get("kv_group", heads if all_kv else 1)
            layers.append(Sizes(heads, kv, left["neuron"]))
        yield layers


def num_refused(graph, name, options, takes, sizes, num):
    """How many plans there are, and how many of them the reader refuses."""
    heads, head_dim = sizes["num_attention_heads"], sizes["head_dim"]
    all_kv = heads == sizes["num_key_value_heads"]
    target = TARGETS.known()[name](**options)
    plans = list(random_plans(graph, target, num, all_kv=all_kv))
    whole = Sizes(heads, sizes["num_key_value_heads"], sizes["intermediate_size"])
    assert 2 * sum(plan != [whole] * 3 for plan in plans) > len(plans) > 0
    return len(plans), sum(not takes(plan, heads, head_dim) for plan in plans)


@pytest.mark.parametrize(("name", "options", "takes", "shape"), CASES)
def test_no_budget_gives_a_plan_that_the_reader_refuses(name, options, takes, shape):
    """10 random budgets each; ``tests/bench/serving/budgets.py`` tries 1,000."""
    _, graph = traced_llama(**SHAPES[shape])
    assert num_refused(graph, name, options, takes, SHAPES[shape], 10)[1] == 0


def test_what_a_target_costs_is_said_in_one_line(traced, caplog):
    """One layer of two widths: 3 of 5 steps of 256 where 800 of 1,280 would do."""
    _, graph = traced
    (name, *_) = [n for n, g in graph.groups.items() if g.kind == "neuron"]
    saliency = {name: torch.arange(1.0, 1281)}
    with caplog.at_level(logging.INFO, "sosp_hub"):
        params = 1 - 480 * 3 * 64 / graph.num_params
        plan = sosp_hub.allocate(graph, saliency, params=params, target="deci")
    assert plan.num_kept() == {name: 768}
    share = 1 - 512 * 3 * 64 / graph.num_params
    more = sum(range(513)) / sum(range(481))
    line = (
        f"target deci: keeps {share:.1%} of the parameters, a free plan {params:.1%}, and takes "
        f"out {more:.2f} times as much saliency"
    )
    assert [plan.provenance["target_cost"], caplog.messages[-1]] == [line, line]


def test_several_targets_must_all_be_met(traced):
    _, graph = traced
    saliency = {
        n: torch.rand(g.size, generator=torch.Generator().manual_seed(1))
        for n, g in graph.groups.items()
        if g.kind == "neuron"
    }
    packed = {"name": "gguf", "quantization": "q8_0"}  # takes finer steps than deci does
    for other in ("transformers", packed):
        plan = sosp_hub.allocate(graph, saliency, params=0.85, target=["deci", other])
        assert set(plan.num_kept().values()) == {1024}
        names = [each["name"] for each in plan.provenance["target"]]
        assert names == ["deci", "gguf" if other is packed else other]


def test_a_plan_for_deci_is_written_without_zeros(traced, tmp_path):
    model, graph = traced
    generator = torch.Generator().manual_seed(2)
    saliency = {
        n: torch.rand(g.size, generator=generator)
        for n, g in graph.groups.items()
        if g.kind == "neuron"
    }
    pruned = sosp_hub.apply(
        model, graph, sosp_hub.allocate(graph, saliency, params=0.7, target="deci")
    )
    folder = sosp_hub.export(pruned, "deci", tmp_path / "deci")
    from sosp_hub.checkpoint.format.headers import read_tensors

    numbers = sum(torch.Size(each.shape).numel() for each in read_tensors(folder).values())
    assert numbers == sum(parameter.numel() for parameter in pruned.parameters())


@pytest.mark.parametrize("name", sorted(TARGETS.known().keys() - {"executorch"}))
def test_every_target_is_written_from_a_folder_by_the_command(name, traced, tmp_path, capsys):
    if name in ("onnx", "gguf", "openvino"):
        pytest.importorskip(name)
    model, graph = traced
    saliency = {n: torch.arange(g.size) for n, g in graph.groups.items() if g.kind == "neuron"}
    pruned = sosp_hub.apply(model, graph, sosp_hub.allocate(graph, saliency, params=0.7))
    sosp_hub.save_pretrained(pruned, tmp_path / "small")
    assert main([str(tmp_path / "small"), "--to", name.replace("_", "-")]) == 0
    there = [path for path in tmp_path.iterdir() if path.name != "small"]
    (written,) = (path for path in there if path.suffix != ".bin")  # OpenVINO's weights, beside it
    assert str(written) in capsys.readouterr().out
    if name in ("padded", "transformers"):
        again = transformers.AutoModelForCausalLM.from_pretrained(written)
        tokens = torch.arange(3, 13)[None]
        assert_close(again(tokens).logits, pruned(tokens).logits, relative=1e-5)
    assert main([str(tmp_path / "small"), "--to", name]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_says_how_large_a_file_is(tmp_path, monkeypatch, capsys):
    with (tmp_path / "small.gguf").open("wb") as file:
        file.truncate(30_000_000)
    written = tmp_path / "small.gguf"
    monkeypatch.setattr(sys.modules["sosp_hub.export"], "export", lambda *_: written)
    assert main([str(tmp_path), "--to", "gguf"]) == 0
    assert f"{written}: 30.0 MB, for " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["deci", "padded"])
def test_a_checkpoint_of_16_bits_is_filled_up(target, dtype, tmp_path):
    """Its angles of positions are in float32, and sums over more zeros are rounded otherwise."""
    model = llama(hidden_size=512, head_dim=64, intermediate_size=1376)
    for i, layer in enumerate(model.model.layers):
        kept = torch.arange(i, 1376, 2)[: 650 + i]
        cuts.keep(layer.mlp.gate_proj, out=kept)
        cuts.keep(layer.mlp.up_proj, out=kept)
        cuts.keep(layer.mlp.down_proj, inp=kept)
        layer.mlp.intermediate_size = len(kept)
    folder = sosp_hub.save_pretrained(model.to(dtype), tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder)
    assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}
    assert {tensor.dtype for tensor in loaded.buffers()} == {torch.float32}
    written = sosp_hub.export(folder, target, tmp_path / "wide")
    if target == "deci":
        return  # tests/targets/test_deci.py reads such files
    again = transformers.AutoModelForCausalLM.from_pretrained(written)
    assert {tensor.dtype for tensor in again.parameters()} == {dtype}
    tokens = torch.arange(3, 13)[None]
    assert_close(again.double()(tokens).logits, loaded.double()(tokens).logits, relative=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["deci", "padded"])
def test_values_in_other_places_than_their_zeros_leave_are_noticed(
    target, dtype, traced, tmp_path, monkeypatch
):
    model, graph = traced
    name = next(n for n, g in graph.groups.items() if g.kind == "neuron")
    plan = sosp_hub.PruningPlan({name: tuple(range(1, 1280))}, {name: 1280})
    pruned = sosp_hub.apply(model, graph, plan).to(dtype)
    right = torch.meshgrid

    def moved(*indices, **keys):
        *others, last = indices
        return right(*others, last.roll(1) if len(last) == 1279 else last, **keys)

    monkeypatch.setattr(torch, "meshgrid", moved)
    with pytest.raises(CheckpointError, match="zeros it computes other outputs"):
        sosp_hub.export(pruned, target, tmp_path / "wide")
    assert not list(tmp_path.iterdir())


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


class Unsaved:
    """A tokenizer whose files cannot be written."""

    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", sorted(TARGETS.known().keys()))
def test_writing_leaves_the_model_and_the_process_as_they_were(name, tmp_path):
    if name in ("onnx", "gguf", "openvino", "executorch"):
        pytest.importorskip(name)
    model = llama().train()
    model.model.layers[1].eval()
    modes, before = [each.training for each in model.modules()], random_states()
    config = copy.deepcopy(vars(model.config))
    place = tmp_path / "new" / f"out{TARGETS.known()[name].suffix}"
    written = None
    with contextlib.suppress(ModelError):  # executorch, of a model that generates
        written = sosp_hub.export(model, name, place)
    assert [each.training for each in model.modules()] == modes
    assert random_states() == before
    assert written in (place, None)
    left = {path.name for path in place.parent.iterdir()}
    assert left <= {place.name, place.with_suffix(".bin").name}
    assert (place.name in left) == (written is not None)
    if name != "transformers":  # whose own save notes the class and the type
        assert vars(model.config) == config


@pytest.mark.skipif(os.name != "posix", reason="permissions of Unix")
@pytest.mark.parametrize("name", ["deci", "padded", "transformers"])
def test_what_is_written_everybody_may_read_who_may_read_other_new_files(name, tmp_path):
    before = os.umask(0o022)
    try:
        folder = sosp_hub.export(llama(), name, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*")} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["deci", "mlx", "padded", "transformers"])
def test_what_could_not_be_written_as_a_whole_is_not_there(name, tmp_path):
    with pytest.raises(OutputError, match="No space left"):
        sosp_hub.export(llama(), name, tmp_path / "out", tokenizer=Unsaved())
    assert not list(tmp_path.iterdir())


def test_a_file_beside_that_is_somebody_elses_stays(tmp_path, monkeypatch):
    """OpenVINO has two files; the one that is not named counts too."""

    def write(self, model, path, tokenizer=None):
        path.write_text("xml")
        path.with_suffix(".bin").write_text("bin")
        return path

    monkeypatch.setattr(OpenVino, "write", write)
    (tmp_path / "out.bin").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out\.bin: is there already"):
        sosp_hub.export(llama(), "openvino", tmp_path / "out.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]
    assert (tmp_path / "out.bin").read_text() == "mine"


def test_quantised_rows_stay_close_to_the_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = llama()
    path = sosp_hub.export(model, "gguf", tmp_path / "q8.gguf", quantization="q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    up = tensors["blk.0.ffn_up.weight"]
    assert up.tensor_type.name == "Q8_0"
    assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    read = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (read - weight).abs().max() <= weight.abs().max() / 127
    assert not torch.equal(read, weight)


@pytest.mark.parametrize(("kind", "bits"), [("q4_k_m", 5), ("q6_k", 6.7)])
def test_k_quants_are_llama_cpps_own(kind, bits, tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    path = sosp_hub.export(llama(hidden_size=256), "gguf", tmp_path / "k.gguf", quantization=kind)
    tensors = [each for each in gguf.GGUFReader(path).tensors if "ffn" in each.name]
    matrices = [each for each in tensors if len(each.shape) > 1]
    assert all(each.tensor_type.name in ("Q4_K", "Q6_K") for each in matrices)
    size = sum(int(each.n_bytes) for each in matrices)
    assert 8 * size / sum(int(each.n_elements) for each in matrices) < bits
    assert [each.name for each in tmp_path.iterdir()] == ["k.gguf"]


def test_k_quants_without_llama_cpp_are_refused_by_name(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(CheckpointError, match=r"q4_k_m .*llama-quantize FILE OUT q4_k_m; q8_0"):
        sosp_hub.export(llama(), "gguf", tmp_path / "k.gguf", quantization="q4_k_m")
    assert not list(tmp_path.iterdir())


RECIPE = """
model: {library: transformers, id: org/model, task: causal-lm}
data: {id: org/text}
budget: {params: 0.8, target: TARGET}
"""


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("deci", [("deci", {"tensor_parallel": 1})]),
        ("torch-export", [("torch_export", {})]),
        ("{name: gguf, quantization: k}", [("gguf", {"quantization": "k", "fill": False})]),
        (
            "[deci, {name: gguf}]",
            [("deci", {"tensor_parallel": 1}), ("gguf", {"quantization": "none", "fill": False})],
        ),
        ("null", []),
    ],
)
def test_a_recipe_names_targets(written, read, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TARGET", written))
    found = load_recipe(path, [], "prune").budget.target
    assert [(each.name, each.model_dump(exclude={"name"})) for each in found] == read


def test_what_is_wrong_is_said(tmp_path, traced, capsys):
    model, graph = traced
    saliency = {n: torch.rand(g.size) for n, g in graph.groups.items() if g.kind == "neuron"}
    with pytest.raises(BudgetError, match=r"unknown target 'decy' \(did you mean 'deci'"):
        sosp_hub.allocate(graph, saliency, params=0.7, target="decy")
    with pytest.raises(CheckpointError, match=r"target 'gguf': quantization: .*'q9'"):
        sosp_hub.export(model, "gguf", tmp_path / "x.gguf", quantization="q9")
    with pytest.raises(CheckpointError, match=r"no option 'cach' \(did you mean 'cache'\?\); its"):
        sosp_hub.export(llama(), "onnx", tmp_path / "x.onnx", cach=True)
    with pytest.raises(CheckpointError, match="give out="):
        sosp_hub.export(model, "deci")
    with pytest.raises(BudgetError, match=r"params=0.05 was asked.*target deci"):
        sosp_hub.allocate(graph, saliency, params=0.05, target="deci")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TARGET", "gguff"))
    with pytest.raises(sosp_hub.errors.RecipeError, match=r"budget.target.*gguff"):
        load_recipe(path, [], "prune")
    for option in ("nonsense", "quantization=[q8"):
        assert main([str(tmp_path), "--to", "deci", option]) == 2
        assert "KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("given", [3, None, ["deci"], {}, ""])
def test_what_is_no_name_of_a_target_is_said(given, traced, tmp_path):
    model, graph = traced
    with pytest.raises(CheckpointError, match=r"unknown target .*there are deci, exec"):
        sosp_hub.export(model, given, tmp_path / "x")
    if given not in (None, ["deci"]):  # no target at all, and several
        saliency = {n: torch.rand(g.size) for n, g in graph.groups.items() if g.kind == "neuron"}
        with pytest.raises(BudgetError, match=r"unknown target .*there are deci, exec"):
            sosp_hub.allocate(graph, saliency, params=0.7, target=given)


def test_a_target_is_given_as_a_recipe_gives_it(traced):
    _, graph = traced
    saliency = {n: torch.rand(g.size) for n, g in graph.groups.items() if g.kind == "neuron"}
    section = {"name": "deci", "tensor_parallel": 2}
    plan = sosp_hub.allocate(graph, saliency, params=0.8, target=section)
    assert plan.provenance["target"] == [section]


MISUSES = {
    "no model": (lambda m: ({"a": 1}, "deci", {}), ModelError, "got a dict, expected a model"),
    "nothing": (lambda m: (None, "gguf", {}), ModelError, "got a NoneType"),
    "no weights": (lambda m: (m.to("meta"), "padded", {}), ModelError, "no weights .*load them"),
    "a tokenizer's name": (
        lambda m: (m, "gguf", {"tokenizer": "gpt2"}), CheckpointError, "AutoTokenizer.* got 'gpt2'",
    ),
    "no path": (lambda m: (m, "deci", {"out": 5}), CheckpointError, "out is a path, got 5"),
    "options of a target that has its own": (
        lambda m: (m, TARGETS.known()["gguf"](), {"quantization": "q8_0"}), CheckpointError,
        "a target and the options quantization",
    ),
    "another target's name": (
        lambda m: (m, "gguf", {"name": "deci"}), CheckpointError, "name: .*'gguf'",
    ),
    "a model of no library": (
        lambda m: (torch.nn.Linear(2, 2), "onnx", {}), CheckpointError, r"torch\.onnx\.export",
    ),
    "processes that share no heads": (
        lambda m: (m, "deci", {"tensor_parallel": 3}), CheckpointError, "8 query heads .*divisor",
    ),
    "a file with another ending": (
        lambda m: (m, "openvino", {"out": "m.openvino"}), CheckpointError, r"give m\.openvino\.xml",
    ),
    "a folder for a file": (
        lambda m: (m, "gguf", {"out": "."}), CheckpointError, r"give model\.gguf$",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks it
@pytest.mark.parametrize("name", sorted(TARGETS.known().keys()))
def test_adapters_are_merged_before_an_export(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"adapters beside its weights.*merge_and_unload"):
        sosp_hub.export(model, name, tmp_path / f"out{TARGETS.known()[name].suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_of_export_is_answered(name, tmp_path):
    make, kind, words = MISUSES[name]
    model, target, options = make(llama())
    out = tmp_path / f"x{(TARGETS.known()[target] if isinstance(target, str) else target).suffix}"
    with pytest.raises(kind, match=words):
        sosp_hub.export(model, target, **{"out": out, **options})
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder_of_a_model(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("x")
    assert main([str(tmp_path / "model.safetensors"), "--to", "deci"]) == 2
    assert "is a file; give the folder" in capsys.readouterr().err


def test_processes_share_what_is_written(tmp_path):
    """Widths are filled up until three processes share them; 4 KV heads of 3 queries stay 4."""
    model = llama(**shape(12, 12, width=1000))
    folder = sosp_hub.export(model, "deci", tmp_path / "deci", tensor_parallel=3)
    (first, *_) = json.loads((folder / "config.json").read_text())["block_configs"]
    assert first["ffn"]["ffn_mult"] == 3 * 1536 / (2 * 96)  # and not 1024
    with pytest.raises(CheckpointError, match="4 KV heads of layer 0 with 3 query heads"):
        sosp_hub.export(llama(**shape(12, 4)), "deci", tmp_path / "x", tensor_parallel=3)


def test_the_module_and_the_function_have_one_name():
    import sosp_hub.export

    assert callable(sosp_hub.export)
    assert sosp_hub.export.main is main
    assert json.dumps(sorted(TARGETS.known()))


def test_onnx_is_written_without_warnings_of_what_could_not_be_computed_ahead(
    tmp_path, monkeypatch, caplog
):
    log = logging.getLogger("onnxscript.optimizer")

    real = torch.onnx.export

    def export(*args, **given):
        log.warning("Evaluation failed")
        log.error("a fault")
        return real(*args, **given)

    monkeypatch.setattr("torch.onnx.export", export)
    write_onnx(torch.nn.Linear(2, 2), tmp_path / "x.onnx", (torch.ones(1, 2),), None)
    assert "a fault" in caplog.text
    assert "Evaluation failed" not in caplog.text
    log.warning("as before")
    assert "as before" in caplog.text
