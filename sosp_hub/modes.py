"""Modes of models and of torch that a verb does not take over from its caller, nor leave to it."""

import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sosp_hub.errors import ModelError

Given = ParamSpec("Given")
Result = TypeVar("Result")


def in_own_modes(verb: Callable[Given, Result]) -> Callable[Given, Result]:
    """A verb that also works in its caller's ``torch.inference_mode`` and with a default device.

    In inference mode operations below Python are not seen, and what is made there can never be
    trained. Its own tensors and generators are on the CPU, where it asks for no device; a model on
    the caller's default device still runs with it, as its forward may count on that.

    Raises:
        ModelError: A model that was made in inference mode, or whose sizes are not known yet.
    """

    @functools.wraps(verb)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for value in (*args, *kwargs.values()):
            if not isinstance(value, nn.Module):
                continue
            if lazy := [
                name
                for name, p in value.named_parameters()
                if isinstance(p, nn.UninitializedParameter)
            ]:
                raise ModelError(
                    f"{verb.__qualname__}: {lazy[0]!r} of the {type(value).__name__} has no size "
                    "before the first forward pass (lazy modules); run the model once, on inputs "
                    "of the size that it is for"
                )
            if any(p.is_inference() for p in value.parameters()):
                raise ModelError(
                    f"{verb.__qualname__}: the {type(value).__name__} was made in "
                    "torch.inference_mode(), where weights are neither followed nor trained; build "
                    "or load it outside of that, or in torch.no_grad()"
                )
        device = torch.get_default_device()
        callers = _callers_device.set(device)
        try:
            with ExitStack() as stack:
                if torch.is_inference_mode_enabled():
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.no_grad())
                if device != _CPU:
                    stack.enter_context(_CPU)
                    stack.enter_context(_models_as_the_caller(device))
                    if callable(loss_fn := kwargs.get("loss_fn")):
                        kwargs["loss_fn"] = called_as_the_caller(loss_fn)
                return verb(*args, **kwargs)
        finally:
            _callers_device.reset(callers)

    return run


_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of devices that the caller may be in it for
_CPU = torch.device("cpu")
_callers_device: ContextVar[torch.device] = ContextVar("_callers_device", default=_CPU)


def callers_device() -> torch.device:
    """The default device of whoever called the innermost verb."""
    return _callers_device.get()


@contextmanager
def _models_as_the_caller(device: torch.device) -> Iterator[None]:
    """Models with a tensor on this kind of device run with it as the default."""
    thread = threading.get_ident()
    running: list[ExitStack] = []

    def before(module: nn.Module, _: Any) -> None:
        if thread == threading.get_ident():
            running.append(ExitStack())
            held = chain(module.parameters(), module.buffers())
            if len(running) == 1 and any(tensor.device.type == device.type for tensor in held):
                running[-1].enter_context(device)

    def after(*_: Any) -> None:
        if thread == threading.get_ident():
            running.pop().close()

    hooks = (
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for left in running:  # an interrupt passes by the hooks
            left.close()


def called_as_the_caller(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function of the caller's, with the default device of whoever called the innermost verb."""
    device = callers_device()
    of = getattr(function, "func", function)  # of a partial
    if device == _CPU or str(getattr(of, "__module__", "")).startswith("torch."):
        return function  # torch's own losses are recognised by what they are

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with device:
            return function(*args, **kwargs)

    return call


def as_the_caller(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches that are made with the default device of the caller of the verb that asks for this.

    An iterator stays one, and what has a length keeps it.
    """
    device = callers_device()
    if device == _CPU or isinstance(batches, list | tuple):
        return batches
    if isinstance(batches, Iterator):
        return _made_on(device, batches)
    return _MadeOn(device, batches)


@dataclass(frozen=True)
class _MadeOn(Iterable[Any]):
    device: torch.device
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return _made_on(self.device, self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _made_on(device: torch.device, batches: Iterable[Any]) -> Iterator[Any]:
    with device:
        iterator = iter(batches)
    while True:
        with device:
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Operations are in the dtype of the weights, whatever context the caller is in.

    Also on an accelerator to which the model goes later.
    """
    kinds = {kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)}
    kinds |= {parameter.device.type for parameter in model.parameters()} - {"meta"}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def building_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made in this dtype, whatever the caller has as its default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's collector of reference cycles rests: for work whose many objects all stay in use."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models are in eval mode; norms that a caller froze in a training model stay so.

    Modes belong to the names of modules: a cut in place puts others where they were.

    Raises:
        ModelError: Not a module, or one without an eval mode.
    """
    check_models(*models)
    before = [{name: each.training for name, each in model.named_modules()} for model in models]
    try:
        for model in models:
            _set_eval(model)
        yield
    finally:
        for model, modes in zip(models, before, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])


def _set_eval(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError as error:
        raise ModelError(
            f"model: this {type(model).__name__} has no eval mode ({error}), as what torch.export "
            "makes of a module; give the module that it was made from"
        ) from error


def check_models(*models: object) -> None:
    """Raises ModelError where something else than a model is given as one."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model: got a {type(model).__name__}, expected an nn.Module; "
                "sosp_hub.from_pretrained(folder) loads one"
            )
