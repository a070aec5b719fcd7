"""Training with FSDP2 gives what one process gets, on as much of the model as each one holds.

In float64, where the order of sums costs 1e-13 and an optimizer that divides by it some digits
more; loss curves are printed in float32.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from sosp_hub import distributed
from sosp_hub.compat.accelerate import plugin_of_one_model
from sosp_hub.errors import DataError, ModelError
from sosp_hub.prune import main
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.best import held_out_loader
from sosp_hub.sharding import check_sharding
from tests.cases import CASES
from tests.compare import assert_close
from tests.pipeline import sharded_training as script
from tests.pipeline.test_from_scores import save_bert, write_reviews
from tests.pipeline.test_processes import launch

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets, among others."""
ACCELERATE = (
    "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
    "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--num_processes",
)  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """Of one process."""
    found = {name: script.train(name) for name in script.WAYS}
    for name, each in found.items():
        assert each.pop("held") == 1
        assert not each["held out"] or each["epoch"] > 0, name  # the training shows
    return found


def weights_of(found):
    return {name: torch.tensor(values).double() for name, values in found["weights"].items()}


def assert_same_training(found, expected, what):
    for key in ("held out", "rates", "loss", "epoch"):
        if expected[key] in ([], None):
            assert found[key] == expected[key]
        else:
            assert_close(found[key], expected[key], relative=1e-9, what=f"{what}: {key}")
    assert_close(weights_of(found), weights_of(expected), relative=1e-9, what=what)
    assert_close(found["history"], expected["history"], relative=1e-6, what=what)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("TRANSFORMER_BASED_WRAP", list(script.WAYS)),
        ("NO_WRAP", ["tied, outputs from disk", "clipped"]),
        ("DDP", ["clipped"]),
    ],
    ids=["FSDP2 of layers", "FSDP2", "DDP"],
)
def test_several_processes_train_as_one(kind, names, alone, tmp_path, monkeypatch):
    """Also from the state that one left, and one from theirs."""
    variables = {} if kind == "DDP" else {**FSDP2, "FSDP_AUTO_WRAP_POLICY": kind}
    script.stopped(tmp_path / "of one", names[0])
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        done = launch(2, script.__name__, str(tmp_path), *names, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        losses = found.pop("in 16 bits")["losses"]
        assert losses[-1] < 0.9 * losses[0]
        for name, each in found.items():
            share = 1 if kind == "DDP" else 0.5  # of odd widths a little more or less
            assert abs(each.pop("held") - share) < 0.02
            source = name if name in alone else names[0]
            assert_same_training(each, alone[source], f"{kind}: {name}")
        assert found["resumed"] == found[names[0]]  # bit for bit
    assert ranks[0] == ranks[1]
    goes_on = script.train(names[0], tmp_path / "for one")
    assert_same_training(goes_on, alone[names[0]], f"{kind}: one goes on")
    gone = [(tmp_path / f"{rank}.nan").read_text() for rank in range(2)]
    assert gone == [str(kind != "DDP")] * 2  # no process can gather what others still have


@pytest.mark.slow
def test_accelerate_launch_trains_and_prunes_as_one_process(tmp_path):
    """Also a new head, which transformers leaves out where Accelerate loads in one process."""
    save_bert(tmp_path / "bert")
    write_reviews(tmp_path / "reviews.csv")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    keys = [
        str(tmp_path / "bert"), "--task", "text-classification", "--params", "0.9",
        "--data", str(tmp_path / "reviews.csv"), "criterion.num_samples=32",
        "model.train={epochs: 2, learning_rate: 0.1, optimizer: sgd, batch_size: 8}",
        "finetune={epochs: 2, learning_rate: 0.1, optimizer: sgd, batch_size: 8, held_out: 0.2}",
        "evaluate.metrics=[loss]", "evaluate.latency=false", "output.figures=false",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*keys, f"output.dir={one}"]) == 0
    keys += ["model.train.batch_size=4", "finetune.batch_size=4", f"output.dir={two}"]
    done = launch(2, "sosp_hub.prune", *keys, launcher=ACCELERATE, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("spread over 2 processes (FSDP2)") == 2
    reports = [json.loads((out / "sosp_report.json").read_text()) for out in (one, two)]
    before, after = (report["metrics"] for report in reports)
    assert list(after) == list(before)
    for stage in before:
        assert_close(after[stage], before[stage], relative=1e-4, what=stage)
    assert after["final"]["loss"]["value"] < 0.9 * after["rebuilt"]["loss"]["value"]
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
    weights = [load_file(out / "model.safetensors") for out in (two, one)]
    assert [(n, t.dtype) for n, t in weights[0].items()] == [
        (n, t.dtype) for n, t in weights[1].items()
    ]
    # sums of float32 in another order, over 42 steps; some biases get no gradient but rounding
    assert_close(
        *[torch.cat([t.flatten() for t in each.values()]) for each in weights], relative=1e-4
    )


@pytest.mark.slow
def test_every_kind_of_model_makes_the_step_that_it_makes_alone(tmp_path, monkeypatch):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    done = launch(2, script.__name__, str(tmp_path), "every model")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == {case.name for case in CASES}
        assert max(found.values()) < 1e-6


def test_layers_are_sharded_one_by_one_without_what_accelerate_shards_itself():
    """That comes after what holds it, which cannot be; and a model without it raises."""
    made = fake()
    bert = next(case for case in CASES if case.name == "bert").model()
    assert {"BertEmbeddings", "BertLayer"} <= set(bert._no_split_modules)
    with plugin_of_one_model(made, bert):
        assert made.state.fsdp_plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    assert made.state.fsdp_plugin.transformer_cls_names_to_wrap is None
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    net = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    with plugin_of_one_model(made, net):
        assert net.get_input_embeddings() is None
    with pytest.raises(NotImplementedError):
        net.get_input_embeddings()


def fake(plugin=None, kind="FSDP", **more):
    """An accelerator that was set up for several processes, without them."""
    plugin = plugin or FullyShardedDataParallelPlugin(fsdp_version=2)
    state = SimpleNamespace(
        fsdp_plugin=plugin,
        parallelism_config=more.pop("parallelism_config", None),
        dynamo_plugin=SimpleNamespace(backend=more.pop("backend", DynamoBackend.NO)),
    )
    given = {"mixed_precision": "no", "num_processes": 2, "is_fsdp2": True, **more}
    return SimpleNamespace(state=state, distributed_type=DistributedType(kind), **given)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"fsdp_version": 1}, {}, "FSDP of version 1; expected 2: write --fsdp_version 2"),
        ({"cpu_ram_efficient_loading": True}, {}, "efficient_loading is True; expected false"),
        ({"cpu_offload": CPUOffloadPolicy()}, {}, "fsdp_offload_params is True; expected false"),
        ({"activation_checkpointing": True}, {}, "finetune.gradient_checkpointing: true"),
        ({"ignored_modules": "head"}, {}, "fsdp_ignored_modules is head; expected nothing"),
        ({}, {"parallelism_config": object()}, "parallelism_config; expected FSDP2"),
        ({}, {"backend": DynamoBackend.INDUCTOR}, "write --dynamo_backend no"),
        ({}, {"mixed_precision": "fp16"}, "fp16 is not trained with sharded .*; write bf16"),
        ({}, {"kind": "DEEPSPEED"}, "set up for DEEPSPEED; expected a whole model on each"),
        ({}, {"kind": "MEGATRON_LM"}, "set up for MEGATRON_LM; expected a whole model"),
    ],
)
def test_what_is_no_fsdp2_of_whole_models_is_refused(options, more, message, monkeypatch):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    vars(plugin).update(options)
    made = fake(plugin, **more)
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: made)
    with pytest.raises(ModelError, match=message):
        distributed.make_accelerator()


def test_fsdp2_in_16_bits_adds_gradients_in_float32(monkeypatch):
    made = fake(mixed_precision="bf16")
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: made)
    policy = distributed.make_accelerator().state.fsdp_plugin.mixed_precision_policy
    kinds = policy.param_dtype, policy.reduce_dtype, policy.output_dtype
    assert kinds == (torch.bfloat16, torch.float32, None)


class Scaled(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    ("model", "options", "more", "message"),
    [
        (nn.Linear(2, 2), {"optimizer": "adamw_8bit"}, {}, "adamw_8bit keeps .*; write adamw"),
        (nn.BatchNorm1d(2), {"mixed_precision": "bf16"}, {}, "BatchNorm1d .*mixed_precision: 'no'"),
        (nn.Linear(2, 2), {}, {"penalized": True}, "training with masks .* another criterion"),
        (Scaled(), {}, {}, r"scale has the shape \(\), which FSDP2 cannot spread"),
        (Scaled(0, 3), {}, {}, r"scale has the shape \(0, 3\), which FSDP2 cannot spread"),
        (nn.Linear(2, 2).bfloat16(), {}, {}, "weight is in torch.bfloat16.*mixed_precision: bf16"),
    ],
)
def test_what_fsdp2_cannot_train_is_refused_before(model, options, more, message):
    config = FinetuneSection(learning_rate=0.1, **options)
    precision = config.mixed_precision or "no"
    check_sharding(fake(is_fsdp2=False, mixed_precision=precision), model, config, **more)
    with pytest.raises(ModelError, match=message):
        check_sharding(fake(mixed_precision=precision), model, config, **more)


def test_masks_are_refused_before_anything_is_trained(recipe, tmp_path, monkeypatch, capsys):
    """In a run that Accelerate started for FSDP2."""
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    keys = ["model.train.epochs=1", "criterion={name: scp}", "budget={}"]
    assert main([str(recipe), *keys]) == 2
    assert "training with masks counts what they leave of whole weights" in capsys.readouterr().err
    assert not list((tmp_path / "out.partial").glob("dense*"))


def test_layers_that_are_not_in_the_model_are_refused_before():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.transformer_cls_names_to_wrap = ["Linear", "LlamaDecoderLayer"]
    with pytest.raises(ModelError, match="LlamaDecoderLayer, which this Linear does not have"):
        check_sharding(fake(plugin), nn.Linear(2, 2), FinetuneSection())
    plugin.transformer_cls_names_to_wrap = ["Linear"]
    check_sharding(fake(plugin), nn.Linear(2, 2), FinetuneSection())


def test_bfloat16_that_is_not_trained_or_in_mixed_precision_is_taken():
    model = nn.Linear(2, 2).bfloat16()
    check_sharding(fake(mixed_precision="bf16"), model, FinetuneSection())
    check_sharding(fake(), model.requires_grad_(False), FinetuneSection())


def test_too_few_held_out_samples_for_processes_that_share_weights():
    with pytest.raises(DataError, match="1 held-out samples for 2 processes that share weights"):
        held_out_loader([0], 8, fake())
