"""Smoke tests of `sosp_hub.compat.accelerate`."""

import os
from unittest import mock

import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch import nn

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
        accelerator.prepare(model)
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        expect(len(vars(model)) > len(vars(nn.Linear(1, 1))), "nothing says that it is prepared")
        compat.forget_prepared(model)
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
