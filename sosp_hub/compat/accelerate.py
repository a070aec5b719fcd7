"""What the package uses of accelerate and accelerate does not promise."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from sosp_hub.errors import ModelError


def launched_for_several() -> bool:
    """Whether ``accelerate launch`` was asked for several processes and has numbered none.

    On CPUs it starts others through MPI alone; else all that comes of it is an address for them.
    """
    given = os.environ.keys()
    return {"ACCELERATE_DYNAMO_MODE", "MASTER_ADDR"} <= given and "RANK" not in given


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
    AcceleratorState._shared_state.clear()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(kept)


def forget_prepared(model: nn.Module) -> None:
    """Another accelerator prepares the model, instead of handing it back as one that is.

    Of a model that was unwrapped its class's own method is left as an attribute, which goes too.
    """
    vars(model).pop(_PREPARED, None)
    if getattr(vars(model).get("forward"), "__func__", None) is type(model).forward:
        del model.forward


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
