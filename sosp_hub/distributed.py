"""Processes and devices: the only file that knows Accelerate's state."""

import atexit
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    DynamoBackend,
    broadcast_object_list,
    gather_object,
    reduce,
    send_to_device,
)
from torch import Tensor, nn

from sosp_hub.compat.accelerate import (
    launched_for_several,
    shard_on_cpus_too,
    sharding_asked,
)
from sosp_hub.errors import ModelError
from sosp_hub.progress import progress

_SPREAD = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

logger = logging.getLogger("sosp_hub")


def process_state() -> PartialState:
    """Which of the processes this is; the first call joins them, the interpreter's end leaves."""
    joined = _is_joined()
    state = PartialState(cpu=not torch.accelerator.is_available())
    if _is_joined() and not joined:
        atexit.register(_leave)
    return state


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave() -> None:
    """Ends gloo's threads, which abort the process now and then when they outlive the interpreter.

    Other backends would wait here for processes that may have failed.
    """
    if _is_joined() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def num_shards() -> int:
    """Over how many processes a training will spread weights, gradients and optimizer state."""
    return process_state().num_processes if sharding_asked() else 1


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return process_state().is_main_process


def wait_for_everyone() -> None:
    """Returns when every process has come here."""
    process_state().wait_for_everyone()


def process_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the device that it came from."""
    state = process_state()
    if state.num_processes == 1:
        return tensor
    total: Any = reduce(tensor.to(state.device), reduction="sum")
    return total.to(tensor.device)


def process_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, one behind the other."""
    state = process_state()
    lengths = torch.zeros(state.num_processes, dtype=torch.float64)
    lengths[state.process_index] = len(rows)
    lengths = process_sum(lengths).long().tolist()
    whole = rows.new_zeros(sum(lengths), *rows.shape[1:])
    start = sum(lengths[: state.process_index])
    whole[start : start + len(rows)] = rows
    return process_sum(whole)


def processes_together(entries: list[Any]) -> list[Any]:
    """The entries of all processes, one behind the other; of any kind."""
    return gather_object(entries) if process_state().num_processes > 1 else entries


def to_device(batch: Any) -> Any:
    """A batch on the device of this process."""
    return send_to_device(batch, process_state().device)


def to_model(batch: Any, model: nn.Module) -> Any:
    """A batch where the weights of a model are; of an offloaded one, on this process's device."""
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    return to_device(batch) if device.type == "meta" else send_to_device(batch, device)


def make_accelerator(mixed_precision: str | None = None, seed: int = 0) -> Accelerator:
    """The accelerator of a run.

    Loaders that it prepares shuffle by ``seed`` and epoch alone, and repeat no sample to even out
    the processes.

    Args:
        mixed_precision: ``no``, ``bf16``, ``fp16``; None = as ``accelerate launch`` says.
        seed: Of the order of the samples.

    Raises:
        ModelError: Accelerate is set up to spread a model's weights over processes in a way that
            nothing here trains.
    """
    process_state()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(
            even_batches=False, use_seedable_sampler=True, data_seed=seed
        ),
    )
    shard_on_cpus_too(accelerator)
    if accelerator.distributed_type in _SPREAD:
        _check_spread(accelerator)
    if accelerator.num_processes == 1 and launched_for_several():
        logger.warning(
            "this is one process alone: `accelerate launch --cpu` starts several with "
            "--mpirun_hostfile only; write torchrun --nproc_per_node NUMBER -m ..."
        )
    return accelerator


def _check_spread(accelerator: Any) -> None:
    """Refuses all but FSDP2 of whole models, and has it add up gradients in float32."""
    kind = accelerator.distributed_type
    if kind != DistributedType.FSDP:
        raise ModelError(
            f"Accelerate is set up for {kind.value}; expected a whole model on each device (DDP), "
            "as `accelerate launch --multi_gpu` or torchrun start, or FSDP2: `accelerate launch "
            "--use_fsdp --fsdp_version 2`"
        )
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy  # slow to import

    plugin, state = accelerator.state.fsdp_plugin, accelerator.state
    if plugin.fsdp_version != 2:
        raise ModelError(
            "Accelerate is set up for FSDP of version 1; expected 2: write --fsdp_version 2, or "
            "fsdp_version: 2 in its configuration"
        )
    refused = {
        "cpu_ram_efficient_loading": "false: scores need whole weights in each process",
        "offload_params": "false: lower finetune.batch_size, or take more devices",
        "activation_checkpointing": "false, and finetune.gradient_checkpointing: true",
        "ignored_modules": "nothing: all weights are spread",
    }
    set_to = {
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "activation_checkpointing": plugin.activation_checkpointing,
        "ignored_modules": plugin.ignored_modules,
    }
    for key, instead in refused.items():
        if set_to[key]:
            raise ModelError(f"fsdp_{key} is {set_to[key]}; expected {instead}")
    if state.parallelism_config is not None:
        raise ModelError(
            "Accelerate is set up with a parallelism_config; expected FSDP2 over all processes "
            "alone: leave it out"
        )
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ModelError(
            "Accelerate is set up to compile models, which are not compiled while they are sharded "
            "(FSDP2); write --dynamo_backend no"
        )
    if accelerator.mixed_precision == "fp16":
        raise ModelError(
            "finetune.mixed_precision: fp16 is not trained with sharded weights (FSDP2); write bf16"
        )
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32
        )


def from_main(value: Any) -> Any:
    """The main process's value, on all processes."""
    return broadcast_object_list([value])[0]


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """One for all processes of a machine, which the main process makes and removes."""
    with tempfile.TemporaryDirectory() if is_main() else nullcontext() as made:
        yield Path(from_main(made))
        wait_for_everyone()


class OnDevice(Sequence[Any]):
    """Batches that go to the device one by one, with a bar for each pass that is described."""

    def __init__(self, batches: Sequence[Any], description: str | None = None) -> None:
        self._batches, self._description = batches, description

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return to_device(self._batches[index])

    def __iter__(self) -> Iterator[Any]:
        moved = map(to_device, self._batches)
        return progress(moved, self._description, len(self)) if self._description else moved
