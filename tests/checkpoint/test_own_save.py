"""A model that was just cut, saved by its library's own means, and read in another process."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.errors import CheckpointError
from sosp_hub.plan import PruningPlan
from tests.checkpoint import cuts
from tests.checkpoint.test_families import output
from tests.compare import assert_close

pytestmark = pytest.mark.slow

TRANSFORMERS = ["llama", "bert", "gpt2", "t5", "vit", "mixtral", "clip", "whisper"]
TIMM = {
    "test_resnet": {},
    "test_vit": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": cuts._SMALLER["swin_tiny_patch4_window7_224"],
}


def dense(family):
    torch.manual_seed(0)
    if family in TIMM:
        return timm.create_model(family, num_classes=7, **TIMM[family]).eval()
    cls, config, _ = cuts.FAMILIES[family]
    return cls(copy.deepcopy(config)).eval()


def inputs_of(model):
    inputs = made_up_inputs(model)
    if isinstance(inputs, dict) and hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def neurons(graph):
    """A share of the neurons or channels, another one in each group."""
    names = [n for n, g in graph.groups.items() if g.kind in ("neuron", "channel") and g.exact]
    names = [name for name in names if graph.groups[name].multiple <= 8]
    kept = {}
    for i, name in enumerate(names):
        size, step = graph.groups[name].size, 8
        kept[name] = tuple(range(max(step, (size - step * (1 + i % 2)) // step * step)))
    kept = {
        name: indices for name, indices in kept.items() if len(indices) < graph.groups[name].size
    }
    return PruningPlan(kept, {name: graph.groups[name].size for name in kept})


def cut(model, verb=None):
    graph = sosp_hub.trace(model, inputs_of(model))
    plan = neurons(graph)
    assert plan.kept
    return (verb or sosp_hub.apply)(model, graph, plan)


def save_by_own_means(model, folder):
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        timm.models._hub.save_for_hf(model, folder, safe_serialization=True)
    return folder


LOAD = """
import sys, timm, torch, transformers
from safetensors.torch import save_file
{imports}
transformers.logging.set_verbosity_error()
for folder, cls in [pair.split("=") for pair in sys.argv[2:]]:
    try:
        if cls == "timm":
            model = timm.create_model("local-dir:" + folder, pretrained=True)
        else:
            model = getattr(transformers, cls).from_pretrained(folder)
    except Exception as error:
        print(folder, type(error).__name__)
        continue
    print(folder, "LOADED")
    state = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
    save_file(state, folder + "/" + sys.argv[1])
assert ("sosp_hub" in sys.modules) == bool({imports!r})
"""


def in_another_process(folders, imports):
    """What a fresh process says of each folder: an error's name, or LOADED."""
    pairs = [f"{folder}={cls}" for folder, cls in folders.items()]
    code = LOAD.format(imports=imports)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "read.safetensors", *pairs],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {
        Path(folder): said for folder, said in (line.split() for line in answer.stdout.splitlines())
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models that were cut, with the folders that their libraries wrote."""
    root = tmp_path_factory.mktemp("own")
    return {
        family: (model := cut(dense(family)), save_by_own_means(model, root / family))
        for family in [*TRANSFORMERS, *TIMM]
    }


@pytest.fixture(scope="module")
def answers(saved):
    folders = {
        folder: "timm" if family in TIMM else type(model).__name__
        for family, (model, folder) in saved.items()
    }
    return {imports: in_another_process(folders, imports) for imports in ("import sosp_hub", "")}


@pytest.mark.parametrize("family", [*TRANSFORMERS, *TIMM])
def test_what_the_library_saves_loads_in_another_process(family, saved, answers):
    model, folder = saved[family]
    assert answers["import sosp_hub"][folder] == "LOADED"
    read = load_file(folder / "read.safetensors")
    for name, tensor in model.state_dict().items():
        assert_close(read[name], tensor, relative=0, what=name)
    inputs = inputs_of(model)
    assert_close(
        output(sosp_hub.from_pretrained(folder), inputs), output(model, inputs), relative=1e-6
    )


@pytest.mark.parametrize("family", [*TRANSFORMERS, *TIMM])
def test_without_the_package_it_raises(family, saved, answers):
    _, folder = saved[family]
    assert answers[""][folder] in ("RuntimeError", "ValueError")


def test_a_cut_leaves_the_callers_config_alone():
    model = dense("llama")
    before = model.config.to_dict()
    cut(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("family", ["llama", "test_vit"])
def test_in_place_and_cut_twice(family, tmp_path):
    model = dense(family)
    cut(cut(model, sosp_hub.apply_), sosp_hub.apply_)
    loaded = sosp_hub.from_pretrained(save_by_own_means(model, tmp_path / "small"))
    inputs = inputs_of(model)
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-6)
    cut(loaded, sosp_hub.apply_)  # one that came from files
    again = sosp_hub.from_pretrained(save_by_own_means(loaded, tmp_path / "smaller"))
    assert_close(output(again, inputs), output(loaded, inputs), relative=1e-6)


@pytest.mark.parametrize("family", ["llama", "swin_tiny_patch4_window7_224"])
def test_another_dtype(family, tmp_path):
    model = cut(dense(family)).to(torch.bfloat16)
    loaded = sosp_hub.from_pretrained(save_by_own_means(model, tmp_path / "small"))
    for name, tensor in model.state_dict().items():
        assert_close(loaded.state_dict()[name], tensor, relative=0, what=name)
        assert loaded.state_dict()[name].dtype == tensor.dtype


@pytest.mark.filterwarnings("ignore")  # the trainer's own deprecations
def test_trainer_saves_a_fresh_cut(tmp_path):
    model = cut(dense("llama"))
    arguments = transformers.TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments).save_model(tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    inputs = inputs_of(model)
    assert_close(output(loaded, inputs), output(model, inputs), relative=1e-6)


@pytest.mark.filterwarnings("ignore")  # peft asks deprecated properties
@pytest.mark.parametrize("adapters", ["before", "after"])
def test_adapters_merged(adapters, tmp_path):
    """Cut and then adapted, or cut together with the adapters: what is left is saved."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = dense("llama")
    inputs = inputs_of(model)
    if adapters == "after":
        tuned = peft.get_peft_model(cut(model), options).eval()
    else:
        tuned = peft.get_peft_model(model, options).eval()
        graph = sosp_hub.trace(tuned, inputs)
        tuned = sosp_hub.apply(tuned, graph, neurons(graph))
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "small")
    assert "sosp_hub" in json.loads((tmp_path / "small" / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert_close(output(loaded, inputs), output(merged, inputs), relative=1e-6)


def test_a_model_inside_another_one(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = dense("bert")

        def forward(self, input_ids):
            return self.body(input_ids).logits

    model = Wrapped().eval()
    inputs = (torch.arange(3, 13).reshape(2, 5),)
    graph = sosp_hub.trace(model, inputs)
    pruned = sosp_hub.apply(model, graph, neurons(graph))
    pruned.body.save_pretrained(tmp_path / "small")
    loaded = sosp_hub.from_pretrained(tmp_path / "small")
    assert_close(output(loaded, inputs), output(pruned, inputs), relative=1e-6)


@pytest.mark.parametrize("family", ["llama", "test_vit"])
def test_what_cannot_be_described_is_not_saved(family, tmp_path):
    """The cut holds; its library must not write files that build another model."""
    model = dense(family)
    if family == "llama":
        model.model.layers[0].self_attn.is_causal = False  # no number: no delta can say it
    else:
        model.blocks[0].mlp.act = torch.nn.Tanh()
    pruned = cut(model)
    with pytest.raises(CheckpointError, match="was cut"):
        save_by_own_means(pruned, tmp_path / "small")


def test_switched_off_the_libraries_save_as_they_come(tmp_path):
    model = cut(dense("test_vit"))
    sosp_hub.disable()
    try:
        save_by_own_means(model, tmp_path / "plain")
    finally:
        sosp_hub.enable()
    assert "sosp_hub" not in (tmp_path / "plain" / "config.json").read_text()
    with pytest.raises(CheckpointError):
        sosp_hub.from_pretrained(tmp_path / "plain")


def test_models_that_were_not_cut_save_as_before(tmp_path):
    for family in ("llama", "test_vit"):
        model = dense(family)
        with_hooks = save_by_own_means(model, tmp_path / family / "with")
        sosp_hub.disable()
        try:
            without = save_by_own_means(model, tmp_path / family / "without")
        finally:
            sosp_hub.enable()
        assert (with_hooks / "config.json").read_bytes() == (without / "config.json").read_bytes()


def test_a_cut_says_nothing_of_the_config_that_is_not_saved_yet(caplog):
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    graph = sosp_hub.trace(model, (torch.randn(2, 1, 32, 32),))
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    sosp_hub.apply(model, graph, sosp_hub.allocate(graph, scores, macs=0.7))
    assert not [each for each in caplog.records if each.name.startswith("timm")]
