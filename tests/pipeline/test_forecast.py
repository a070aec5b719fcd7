"""What a run will need is told by the config alone, and as the model itself would tell it."""

import json

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

import sosp_hub
from sosp_hub.cost import cost
from sosp_hub.errors import BudgetError, ModelError
from sosp_hub.pipeline import forecast as module
from sosp_hub.pipeline.forecast import forecast
from sosp_hub.prune import main
from sosp_hub.recipe.load import as_recipe

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    """A recipe of a folder that holds nothing but a config, and of data that is not there."""
    config = transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "llama")
    assert [path.name for path in (tmp_path / "llama").iterdir()] == ["config.json"]
    return {
        "model": {
            "library": "transformers",
            "id": str(tmp_path / "llama"),
            "task": "text-generation",
        },
        "data": {"path": str(tmp_path / "none.txt"), "max_length": 24},
        "criterion": {"num_samples": 8, "batch_size": 4},
        "budget": {"params": 0.8},
        "output": {"dir": str(tmp_path / "out")},
    }


@pytest.fixture
def file_of(tmp_path):
    def write(recipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        return str(path)

    return write


def test_a_config_tells_what_the_model_would(llama):
    told = forecast(as_recipe(llama, ("criterion.name=sosp_h",), "prune"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    tokens = torch.zeros(2, 24, dtype=torch.long)
    graph = sosp_hub.trace(model, {"input_ids": tokens, "use_cache": False})
    dense = cost(graph)
    assert (told.macs, told.params, told.bytes) == (dense.macs, dense.params, dense.bytes)
    kinds = {}
    for group in graph.groups.values():
        if group.kind in as_recipe(llama, (), "prune").structure.kinds:
            kinds[group.kind] = kinds.get(group.kind, 0) + group.size
    assert {kind: each["structures"] for kind, each in told.groups.items()} == kinds
    assert told.fits
    assert all(stage.memory_bytes >= told.bytes // 2 for stage in told.stages)
    scored = next(stage for stage in told.stages if stage.name == "saliency")
    assert scored.num_samples == 8
    assert scored.seconds > 3 * 8 * dense.macs / told.macs_per_s  # more than one plain pass


@pytest.mark.parametrize("key", ["macs", "params"])
def test_the_least_budget_is_where_allocation_gives_up(llama, key):
    recipe = as_recipe(llama, (), "prune")
    least = forecast(recipe).least[key]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    tokens = torch.zeros(2, 24, dtype=torch.long)
    graph = sosp_hub.trace(model, {"input_ids": tokens, "use_cache": False}, "logits")
    equal = {
        name: torch.ones(group.size)
        for name, group in graph.groups.items()
        if group.kind in recipe.structure.kinds
    }
    kinds = recipe.structure.kinds
    sosp_hub.allocate(graph, equal, **{key: least + 1e-9}, kinds=kinds)
    with pytest.raises(BudgetError, match="least that can be reached"):
        sosp_hub.allocate(graph, equal, **{key: least * 0.98}, kinds=kinds)


def test_what_a_backward_pass_holds_is_within_the_estimate():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.GELU(), torch.nn.Flatten(),
        torch.nn.Linear(288, 10),
    ).eval()  # fmt: skip
    inputs = torch.randn(4, 3, 8, 8, requires_grad=True)
    graph = sosp_hub.trace(model, (inputs.detach(),))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | {inputs.untyped_storage().data_ptr()}:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs).sum()
    estimate, largest = module._activation_bytes(graph)
    measured = sum(size for size, _ in held.values()) / 4
    assert measured <= estimate <= 2 * measured
    assert largest == 8 * 6 * 6 * 4


def test_a_budget_out_of_reach_is_told_with_what_can_be_reached(llama, file_of, capsys):
    llama["budget"] = {"params": 0.05}
    assert main([file_of(llama), "--plan-only"]) == 1
    told = capsys.readouterr().out
    assert "WILL BE REFUSED: budget: params=0.05 was asked" in told
    assert "least that can be reached: macs" in told


@pytest.mark.parametrize(
    ("model", "trains"),
    [
        ({}, False),  # a language model has no head of its own
        ({"pretrained": False}, True),
        ({"train": {"epochs": 1}}, True),
    ],
)
def test_a_training_of_a_new_head_is_told_where_there_may_be_one(llama, model, trains):
    llama["model"] |= {"train": {"epochs": 1, "when": "new_head"}} | model
    stages = [stage.name for stage in forecast(as_recipe(llama, (), "prune")).stages]
    assert ("dense" in stages) == trains


def test_what_does_not_fit_is_told_with_keys_that_a_recipe_takes(llama, monkeypatch):
    llama["data"]["max_length"] = 512
    recipe = as_recipe(llama, (), "prune")
    monkeypatch.setattr(module, "_free_ram", lambda: 1000)
    told = forecast(recipe)
    assert not told.fits
    for stage in told.stages:
        shorter = "data.max_length=128" in stage.change
        assert shorter == (stage.name not in ("load", "cut"))  # these are of weights alone
        assert any("sosp cut" in change for change in stage.change) != shorter
    changes = {change for stage in told.stages for change in stage.change if "=" in change}
    for change in changes:
        words = change.split()[0]
        as_recipe(llama, (words,), "prune")
    assert {"model.dtype=bfloat16", "data.max_length=128", "criterion.batch_size=1"} <= changes
    smaller = forecast(as_recipe(llama, tuple(c.split()[0] for c in changes), "prune"))
    before = {stage.name: stage.memory_bytes for stage in told.stages}
    after = {stage.name: stage.memory_bytes for stage in smaller.stages}
    assert after
    assert all(after[name] < before[name] for name in after)


def test_a_teacher_needs_the_room_of_its_weights(llama):
    told = [
        forecast(as_recipe(llama, ("finetune.epochs=1", f"finetune.distill={share}"), "prune"))
        for share in (0.0, 0.5)
    ]
    alone, following = (
        next(stage.memory_bytes for stage in each.stages if stage.name == "final") for each in told
    )
    assert following - alone == told[0].bytes


def test_a_training_with_fsdp_spreads_all_but_what_its_samples_need(llama, monkeypatch):
    told = forecast(as_recipe(llama, ("finetune.epochs=1",), "prune"))
    whole = {stage.name: stage.memory_bytes for stage in told.stages}

    def need(num=None):
        if num is not None:
            monkeypatch.setattr("sosp_hub.pipeline.forecast.num_shards", lambda: num)
        stages = forecast(as_recipe(llama, ("finetune.epochs=1",), "prune")).stages
        return {stage.name: stage.memory_bytes for stage in stages}

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert need() == whole  # one process
    one, two, many = (need(num) for num in (1, 2, 1000))
    finals = [each.pop("final") for each in (one, two, many)]
    assert one == two == many
    left = finals[1] - finals[2]  # of many the weights remain, whole before they are spread
    assert 0.5 * told.bytes < left < told.bytes
    assert finals[0] - finals[1] == pytest.approx(2 * left, abs=4)


def test_json_on_the_command_line(llama, file_of, capsys, tmp_path):
    assert main([file_of(llama), "--plan-only", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert told["groups"]["neuron"] == {"groups": 2, "structures": 96}
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_timm_name_needs_no_weights_either(capsys):
    assert main(["imagenet_resnet50", "--plan-only", "data.path=/none"]) in (0, 1)
    told = capsys.readouterr().out
    assert "25.6 M parameters" in told
    assert "channel" in told


def test_faults_are_typed(llama, file_of, capsys):
    llama["model"]["id"] += "/nowhere"
    with pytest.raises(ModelError, match="does not exist"):
        forecast(as_recipe(llama, (), "prune"))
    assert main([file_of(llama), "--plan-only"]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([file_of(llama), "--plan-only", "--overwrite"])


def test_positions_of_a_long_text_do_not_become_pieces_of_length_one(llama):
    llama["data"]["max_length"] = 1500
    assert forecast(as_recipe(llama, (), "prune")).sample == "1500 tokens"


def test_an_output_that_cannot_be_written_is_told_before_a_run(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    for place in (tmp_path / "taken", tmp_path / "taken" / "inside"):
        assert main(["quickstart", f"output.dir={place}", "--plan-only"]) == 2
        assert "is a file; write the name of a new folder" in capsys.readouterr().err


def test_a_run_sees_what_the_forecast_sees(llama):
    llama["criterion"]["name"] = "fisher"
    recipe = as_recipe(llama, ("data.num_train=100", "data.num_test=10"), "prune")
    told = {stage.name: stage.memory_bytes for stage in forecast(recipe).stages}
    loaded = module.load_model(recipe.model, data=module.DataInfo(), weights=False)
    sized = module.example_inputs(loaded, num_tokens=24)
    short = module.example_inputs(loaded, num_tokens=8)
    graph = module.trace(loaded.model, short, outputs=("logits",), cost_inputs=sized)
    stages = module._stages(recipe, loaded, graph, 1.0, "cpu")
    seen = {stage.name: stage.memory_bytes for stage, _ in stages}
    assert seen.keys() == told.keys()
    for name in ("dense_metrics", "saliency", "rebuilt", "final"):
        assert 0.95 < seen[name] / told[name] < 1.2, name


def test_a_rebuild_holds_what_layers_give_and_no_logits(llama):
    llama["data"] |= {"max_length": 512, "num_train": 1000}
    few, many = (
        next(
            stage.memory_bytes
            for stage in forecast(as_recipe(llama, (f"rebuild.num_samples={num}",), "prune")).stages
            if stage.name == "rebuilt"
        )
        for num in (100, 200)
    )
    assert many - few == 100 * 512 * SIZES["hidden_size"] * 4


def test_no_more_samples_are_held_than_there_are(llama):
    few = ("data.num_train=3", "data.num_test=3")
    keys = ("criterion.batch", "finetune.batch", "evaluate.batch")
    small = (*few, *(f"{key}_size=3" for key in keys), "rebuild.num_samples=3")
    sizes = [
        [stage.memory_bytes for stage in forecast(as_recipe(llama, given, "prune")).stages]
        for given in (few, small)
    ]
    assert sizes[0] == sizes[1]
