"""Smoke tests of `sosp_hub.compat.accelerate`."""

import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from sosp_hub.compat import accelerate as compat
from sosp_hub.compat.smoke import expect, smoke
from sosp_hub.errors import ModelError


@smoke("scores of offloaded models")
def offloaded_models() -> None:
    model = cpu_offload(nn.Sequential(nn.Linear(1, 1)), execution_device=torch.device("cpu"))
    given = compat.running_device(model)
    expect(given is not None and torch.device(given).type == "cpu", f"it runs on {given}")
    expect(compat.running_device(nn.Linear(1, 1)) is None, "a plain model has a hook")
    compat.check_weights(model, "score")
    try:
        compat.check_weights(nn.Linear(1, 1, device="meta"), "score")
    except ModelError:
        return
    expect(False, "a model without weights passes for an offloaded one")


@smoke("a warning where `accelerate launch` started one process instead of several")
def launchers() -> None:
    parser = launch_command_parser()
    for number, expected in (("1", False), ("2", True)):
        given = ["--cpu", "--num_processes", number, "--num_machines", "1", "train.py"]
        options = parser.parse_args([*given[:-1], "--mixed_precision", "no", given[-1]])
        options.dynamo_backend, options.num_cpu_threads_per_process = "no", 1
        _, variables = prepare_simple_launcher_cmd_env(options)
        with mock.patch.dict(os.environ, variables, clear=True):
            said = compat.launched_for_several()
        expect(said is expected, f"{number} processes: {said}")


@smoke("fine-tuning with FSDP2 on CPUs")
def sharding_on_cpus() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with compat.process_state_kept():
        accelerator = Accelerator(cpu=True)
        with mock.patch.dict(os.environ, asked):
            compat.shard_on_cpus_too(accelerator)
            expect(not accelerator.is_fsdp2, "one process shards")
            compat.shard_on_cpus_too(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU))
        expect(accelerator.is_fsdp2, "several processes do not shard")
        plugin: Any = accelerator.state.fsdp_plugin
        model = nn.Sequential(nn.Linear(1, 1))
        model._no_split_modules = ["Linear", "Conv2d"]  # pyright: ignore[reportArgumentType]
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        with compat.plugin_of_one_model(accelerator, model):
            plugin.set_auto_wrap_policy(model)
            expect(plugin.transformer_cls_names_to_wrap == ["Linear"], "other layers are sharded")
        expect(plugin.transformer_cls_names_to_wrap is None, "the next model has the same layers")


@smoke("weights in every process under `accelerate launch --use_fsdp`")
def loading_in_every_process() -> None:
    parser = launch_command_parser()
    given = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1"]
    options = parser.parse_args([*given, "--mixed_precision", "no", "train.py"])
    options.dynamo_backend, options.num_cpu_threads_per_process = "no", 1
    variables = prepare_multi_gpu_env(options)
    with mock.patch.dict(os.environ, variables), compat.process_state_kept():
        expect(compat.sharding_asked(), "what is launched is not told of FSDP")
        before = FullyShardedDataParallelPlugin().cpu_ram_efficient_loading
        compat.load_whole_models()
        after = FullyShardedDataParallelPlugin().cpu_ram_efficient_loading
        expect(before and not after, f"loading in one process alone: {before}, then {after}")


@smoke("going on with a training that was stopped")
def states_of_a_training() -> None:
    weight = torch.ones(2, requires_grad=True)
    first, second = (torch.optim.SGD([weight], 0.1, momentum=0.5) for _ in range(2))
    weight.sum().backward()
    first.step()
    with compat.process_state_kept(), tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=True)
        accelerator.step = 3
        drawn = random.getstate(), torch.get_rng_state()
        compat.save_states(accelerator, Path(folder), first.state_dict())
        accelerator.step, made = 0, [random.random(), torch.rand(1)]
        for in_place in (False, True):
            compat.load_states(accelerator, Path(folder), second.load_state_dict, in_place=in_place)
            again = [random.random(), torch.rand(1)]
            expect(made == again and accelerator.step == 3, "other numbers are drawn, or counted")
        random.setstate(drawn[0])
        torch.set_rng_state(drawn[1])
    kept = second.state[weight]["momentum_buffer"]
    expect(torch.equal(kept, torch.ones(2)), f"the optimizer's state is {kept}")


@smoke("saving models that lie on several devices")
def spread_models() -> None:
    layers = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model = dispatch_model(layers, {"0": "cpu", "1": "cpu"}, force_hooks=True)
    expect(compat.is_spread(model), "nothing says so")
    expect(not compat.is_spread(nn.Linear(1, 1)), "a plain model is spread")


@smoke("an accelerator of one's own for a model that was trained")
def models_that_were_prepared() -> None:
    with compat.process_state_kept():
        model = nn.Linear(1, 1)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        with compat.unprepared_afterwards(model):
            accelerator.prepare(model)
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            expect(len(vars(model)) > len(vars(nn.Linear(1, 1))), "nothing says it is prepared")
        expect(vars(model).keys() == vars(nn.Linear(1, 1)).keys(), "something is left on the model")
        accelerator.prepare(model)
        expect("forward" in vars(model), "it is not prepared again")


@smoke("saving models while they train in mixed precision")
def models_in_mixed_precision() -> None:
    with compat.process_state_kept():
        model, x = nn.Linear(1, 1), torch.ones(1, 1)
        Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        own = nn.Linear(1, 1)
        own.load_state_dict(model.state_dict())
        with compat.in_own_precision(model):
            expect(torch.equal(model(x), own(x)), "it runs in another precision")
        expect("forward" in vars(model), "the accelerator's pass is not put back")


@smoke("an accelerator of one's own after sosp_hub.prune(...)")
def state_of_the_process() -> None:
    with compat.process_state_kept():
        with compat.process_state_kept():
            Accelerator(cpu=True, mixed_precision="no")
        again = Accelerator(cpu=True, mixed_precision="bf16")
        expect(again.mixed_precision == "bf16", "the first accelerator's precision is kept")
        with compat.process_state_kept():
            inner = Accelerator(cpu=True, mixed_precision="no")
            expect(inner.mixed_precision == "no", "a caller's precision is in the way")
