"""Training whose weights, gradients and optimizer state are spread over processes: FSDP2.

Accelerate shards a model where it is. Afterwards it is whole again on every process, so that only
a training knows of it. The state that a training leaves is whole too, under the names that one
process alone would give: whoever wrote it, one process or several go on with it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, convert_to_fp32
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from sosp_hub.compat.accelerate import (
    load_states,
    plugin_of_one_model,
    save_states,
    unprepared_afterwards,
)
from sosp_hub.compat.torch import (
    BatchNorm,
    forget_sharding,
    hook_tables,
    is_sharded,
    parameter_table,
)
from sosp_hub.distributed import is_main, logger
from sosp_hub.errors import ModelError
from sosp_hub.recipe.training import TrainSection

_WEIGHTS = "model.safetensors"
_NARROW = (torch.float16, torch.bfloat16)


def check_sharding(
    accelerator: Accelerator, model: nn.Module, config: TrainSection, *, penalized: bool = False
) -> None:
    """Refuses what FSDP2 cannot train; any other training passes.

    Args:
        accelerator: Of this run.
        model: Is trained, or what is trained is cut from it.
        config: How.
        penalized: With something added to the loss.

    Raises:
        ModelError: Masks, an optimizer, weights, or a class of layers that is not in the model.
    """
    if not accelerator.is_fsdp2:
        return
    if penalized:
        raise ModelError(
            "criterion: a training with masks counts what they leave of whole weights, which FSDP2 "
            "spreads over processes; choose another criterion, or train with DDP (torchrun without "
            "FSDP)"
        )
    if config.optimizer == "adamw_8bit":
        raise ModelError(
            "finetune.optimizer: adamw_8bit keeps a state that FSDP2 cannot spread over processes; "
            "write adamw, whose state is spread, or train with DDP (torchrun without FSDP)"
        )
    if accelerator.mixed_precision == "bf16":
        for name, module in model.named_modules():
            if isinstance(module, BatchNorm) and module.running_mean is not None:
                raise ModelError(
                    f"finetune.mixed_precision: {name} is a {type(module).__name__} whose "
                    "statistics are in float32, which FSDP2 does not mix with bfloat16; write "
                    "mixed_precision: 'no', or train with DDP (torchrun without FSDP)"
                )
    classes = {type(module).__name__ for module in model.modules()}
    plugin: Any = accelerator.state.fsdp_plugin
    for name in plugin.transformer_cls_names_to_wrap or ():
        if name not in classes:
            raise ModelError(
                f"fsdp_transformer_layer_cls_to_wrap: {name}, which this {type(model).__name__} "
                "does not have; leave it out, or name the class of its layers"
            )
    for name, parameter in model.named_parameters():
        if not parameter.dim() or not parameter.numel():
            raise ModelError(
                f"{name} has the shape {tuple(parameter.shape)}, which FSDP2 cannot spread over "
                "processes; train with DDP (torchrun without FSDP)"
            )
        narrow = parameter.requires_grad and parameter.dtype in _NARROW
        if narrow and accelerator.mixed_precision == "no":
            raise ModelError(
                f"finetune.mixed_precision: {name} is in {parameter.dtype}, and FSDP2 makes steps "
                "in the precision of the weights, which would round them away; write "
                "finetune.mixed_precision: bf16 (a script is launched with --mixed_precision "
                "bf16), which trains them in float32 and computes in bfloat16"
            )


@contextmanager
def prepared(accelerator: Accelerator, model: nn.Module, *others: Any) -> Iterator[tuple[Any, ...]]:
    """What an accelerator makes of a model and what belongs to it, for a training.

    Afterwards, also after an error, nothing of the accelerator is left on the model, and its
    weights are whole. After an error in a sharded training they are NaN: processes that stopped at
    different places cannot gather them.
    """
    wrapped = model
    whole = _whole_afterwards(accelerator, model) if accelerator.is_fsdp2 else nullcontext(None)
    with unprepared_afterwards(model), whole as release:
        try:
            wrapped, *rest = accelerator.prepare(model, *others)
            if release is not None:
                release()
                if accelerator.mixed_precision == "bf16":  # as for whole models
                    wrapped.register_forward_hook(lambda _, __, outputs: convert_to_fp32(outputs))
                logger.info(
                    "weights, gradients and optimizer state are spread over %d processes (FSDP2)",
                    accelerator.num_processes,
                )
            yield wrapped, *rest
        finally:
            accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            accelerator.free_memory()


@contextmanager
def _whole_afterwards(accelerator: Accelerator, model: nn.Module) -> Iterator[Callable[[], None]]:
    """The modules are as they were, with whole weights in the same parameters.

    Yields what frees the memory of the whole weights, once the sharded ones are there.
    """
    modules = [
        (
            module,
            type(module),
            set(vars(module)),
            [(table, dict(table)) for table in (parameter_table(module), *_hooks(module))],
        )
        for module in model.modules()
    ]
    parameters = {
        name: (parameter, torch.empty_like(parameter, device="meta"), parameter.device)
        for name, parameter in model.named_parameters()
    }
    for parameter in model.parameters():  # each process shards what it has itself
        parameter.data = parameter.data.contiguous()
        broadcast(parameter.data)
    for buffer in model.buffers():
        broadcast(buffer)
    gathered: dict[str, Tensor] | None = None
    released = False

    def release() -> None:
        nonlocal released
        released = True
        for parameter, _, device in parameters.values():
            parameter.data = torch.empty(0, device=device)

    try:
        with plugin_of_one_model(accelerator, model):
            yield release
        _reshard(model)
        sharded: Any = model.named_parameters()
        gathered = {name: parameter.full_tensor() for name, parameter in sharded}
    finally:
        for module, kind, names, tables in modules:
            forget_sharding(module)
            module.__class__ = kind
            for name in vars(module).keys() - names:
                del vars(module)[name]
            for table, kept in tables:
                table.clear()
                table.update(kept)
        for name, (parameter, like, device) in parameters.items():
            whole = torch.empty_like(like, device=device)
            if not released:
                whole.copy_(parameter.data)
            elif gathered is not None:
                whole.copy_(gathered.pop(name))
            elif whole.is_floating_point():
                whole.fill_(math.nan)
            parameter.data = whole


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    return list(hook_tables(module).values())


def _reshard(model: nn.Module) -> None:
    """Each process has its part alone, also of what a pass has left whole."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore[reportCallIssue]


def _gathered(value: Any) -> Any:
    """The same with whole tensors in the memory of the main process's CPU; of others nothing."""
    if isinstance(value, Mapping):
        return {key: _gathered(each) for key, each in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor()  # one after the other, whatever is to be gathered
    return whole.cpu() if is_main() else None


def _part(whole: Any, like: Any) -> Any:
    """What this process has of a whole tensor that is sharded like another one."""
    if not hasattr(like, "full_tensor") or getattr(whole, "shape", None) != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor  # slow to import, and seldom needed

    here, mesh, placements = whole.to(like.device), like.device_mesh, like.placements
    return distribute_tensor(here, mesh, placements, src_data_rank=None).clone()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, under all names of those that are tied."""
    kinds = model.named_parameters, model.named_buffers
    return {name: each for named in kinds for name, each in named(remove_duplicate=False)}


def save_weights(model: nn.Module, path: Path) -> None:
    """Whole weights in a file that the main process writes; all processes call it together."""
    if not is_sharded(model):
        if is_main():
            save_model(model, str(path))
        return
    _reshard(model)
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(model).items()}
    state = model.state_dict()
    whole = {name: _gathered(state[name]) for name in state if names[name] == name}
    if is_main():
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path)


def _load_weights(model: nn.Module, path: Path) -> None:
    if not is_sharded(model):
        load_model(model, path)
        return
    held = _tensors(model)
    with safe_open(path, "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - it is no dict
            held[name].copy_(_part(file.get_tensor(name), held[name]))


def save_state(accelerator: Accelerator, model: nn.Module, optimizer: Any, folder: Path) -> None:
    """The state of a training, from which any number of processes go on.

    Args:
        accelerator: Of this run.
        model: As it was before it was prepared.
        optimizer: As it was prepared.
        folder: Is made; all processes see it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / _WEIGHTS)
    save_states(accelerator, folder, _gathered(optimizer.state_dict()))


def load_state(accelerator: Accelerator, model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Takes over what `save_state` left; the arguments are its."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def take(state: dict[str, Any]) -> None:
        for number, values in state["state"].items():
            values |= {key: _part(value, parameters[number]) for key, value in values.items()}
        optimizer.load_state_dict(state)

    _load_weights(model, folder / _WEIGHTS)
    load_states(accelerator, folder, take, in_place=is_sharded(model))
