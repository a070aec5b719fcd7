"""What the package uses of accelerate and accelerate does not promise."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from sosp_hub.errors import ModelError


def launched_for_several() -> bool:
    """Whether ``accelerate launch`` was asked for several processes and has numbered none.

    On CPUs it starts others through MPI alone; else all that comes of it is an address for them.
    """
    given = os.environ.keys()
    return {"ACCELERATE_DYNAMO_MODE", "MASTER_ADDR"} <= given and "RANK" not in given


def sharding_asked() -> bool:
    """Whether the environment asks for weights that are spread over processes in training."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard_on_cpus_too(accelerator: Any) -> None:
    """FSDP that the environment asks for counts on CPUs, where Accelerate passes it over.

    Also in an accelerator that is not the first of its process.
    """
    kinds = DistributedType.MULTI_CPU, DistributedType.FSDP
    if (
        sharding_asked()
        and accelerator.distributed_type in kinds
        and "fsdp_plugin" not in vars(_state())
    ):
        PartialState().distributed_type = DistributedType.FSDP
        _state().distributed_type = DistributedType.FSDP
        _state().fsdp_plugin = FullyShardedDataParallelPlugin()


def _state() -> Any:
    return AcceleratorState()


_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def load_whole_models() -> None:
    """Has transformers load weights in every process; `process_state_kept` undoes it.

    ``accelerate launch --use_fsdp`` tells it to load them in the first alone.
    """
    os.environ.pop(_LOADING, None)


@contextmanager
def plugin_of_one_model(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Layers that are sharded one by one are those of this model; the next one has its own.

    Of the classes that a library names, those that occur in the model, as others would be refused,
    and hold no embeddings: these Accelerate shards by themselves, and after the layers.
    """
    plugin = accelerator.state.fsdp_plugin
    kept, own = dict(vars(plugin)), dict(vars(model))
    embeddings: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings.add(id(getattr(model, name, lambda: None)()))
        except NotImplementedError:  # of a model that has none: Accelerate asks it all the same
            vars(model)[name] = lambda: None
    if plugin.transformer_cls_names_to_wrap is None:
        named = getattr(model, "_no_split_modules", None) or ()
        present = {type(module).__name__ for module in model.modules()}
        around = {type(m).__name__ for m in model.modules() if embeddings & {*map(id, m.modules())}}
        plugin.transformer_cls_names_to_wrap = [n for n in named if n in present - around]
    try:
        yield
    finally:
        vars(plugin).clear()
        vars(plugin).update(kept)
        for name in ("get_input_embeddings", "get_output_embeddings"):
            if name not in own:
                vars(model).pop(name, None)


def save_states(accelerator: Any, folder: Path, optimizer: Mapping[str, Any]) -> None:
    """An optimizer's state dict, the loss scale and random numbers, as `save_state` leaves them."""
    holder = SimpleNamespace(state_dict=lambda: optimizer)
    which = accelerator.process_index, accelerator.step, accelerator.scaler
    save_accelerator_state(str(folder), [], [holder], [], [], *which)


def load_states(
    accelerator: Any, folder: Path, take: Callable[[dict[str, Any]], None], *, in_place: bool
) -> None:
    """Takes over what `save_states` left.

    Args:
        accelerator: Of the run.
        folder: Where it is.
        take: Gets the optimizer's state dict.
        in_place: Its tensors lie in the file, until they are copied.
    """
    holder = SimpleNamespace(load_state_dict=take)
    which = accelerator.process_index, accelerator.scaler
    options = {"mmap": True} if in_place else {}
    left = load_accelerator_state(str(folder), [], [holder], [], [], *which, load_kwargs=options)
    accelerator.step = left.get("step", accelerator.step)


def is_spread(model: nn.Module) -> bool:
    """Whether a model lies on several devices, or partly outside them."""
    return hasattr(model, "hf_device_map")


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Accelerators in between are free in their precision; what they share is then as it was.

    Else the first ``Accelerator()`` of a caller, made after a run, would refuse another precision.
    """
    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    loading = {name: os.environ[name] for name in (_LOADING,) if name in os.environ}
    AcceleratorState._shared_state.clear()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(kept)
        os.environ.update(loading)


@contextmanager
def unprepared_afterwards(model: nn.Module) -> Iterator[None]:
    """An accelerator prepares the model, also one that another has, and leaves nothing on it.

    Marked as prepared, it would be handed back as it is. Of a model that is unwrapped what lies
    inside the decorators of its class's ``forward`` is left as an attribute, which goes too.
    """
    kept, names = vars(model), (_PREPARED, _OWN_FORWARD, "forward")
    before = {name: kept.pop(name) for name in names if name in kept}
    if own := before.get(_OWN_FORWARD, before.get("forward")):
        kept["forward"] = own
    try:
        yield
    finally:
        for name in names:
            kept.pop(name, None)
        kept.update(before)


_PREPARED = "_is_accelerate_prepared"


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """The model runs without the mixed precision that an accelerator put around its pass."""
    kept = vars(model)
    prepared = kept.get("forward") if _OWN_FORWARD in kept else None
    if prepared is not None:
        kept["forward"] = kept[_OWN_FORWARD]
    try:
        yield
    finally:
        if prepared is not None:
            kept["forward"] = prepared


_OWN_FORWARD = "_original_forward"


def check_weights(model: nn.Module, verb: str) -> None:
    """Refuses a model on the meta device; one that is offloaded has its weights when it runs.

    Raises:
        ModelError: Says how weights come into it.
    """
    if any(parameter.is_meta for parameter in model.parameters()) and not running_device(model):
        raise ModelError(
            f"{verb}: the {type(model).__name__} has no weights (meta device); load them, "
            "or build it outside of torch.device('meta')"
        )


def running_device(model: nn.Module) -> Any:
    """Where the weights of an offloaded model come when it runs; None where nothing says so."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)
