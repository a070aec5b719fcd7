"""Modes of models and of torch that a verb does not take over from its caller, nor leave to it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from sosp_hub.errors import ModelError

Given = ParamSpec("Given")
Result = TypeVar("Result")


def outside_inference(verb: Callable[Given, Result]) -> Callable[Given, Result]:
    """A verb that also works where its caller is in ``torch.inference_mode``.

    Operations below Python are not seen there, and what is made there can never be trained.

    Raises:
        ModelError: A model that was made in that mode.
    """

    @functools.wraps(verb)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for value in (*args, *kwargs.values()):
            if isinstance(value, nn.Module) and any(p.is_inference() for p in value.parameters()):
                raise ModelError(
                    f"{verb.__qualname__}: the {type(value).__name__} was made in "
                    "torch.inference_mode(), where weights are neither followed nor trained; build "
                    "or load it outside of that, or in torch.no_grad()"
                )
        if not torch.is_inference_mode_enabled():
            return verb(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return verb(*args, **kwargs)

    return run


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Operations are in the dtype of the weights, whatever context the caller is in."""
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"} or {"cpu"}
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
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models are in eval mode; norms that a caller froze in a training model stay so.

    Modes belong to the names of modules: a cut in place puts others where they were.

    Raises:
        ModelError: Not a module.
    """
    check_models(*models)
    before = [{name: each.training for name, each in model.named_modules()} for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, modes in zip(models, before, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])


def check_models(*models: object) -> None:
    """Raises ModelError where something else than a model is given as one."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model: got a {type(model).__name__}, expected an nn.Module; "
                "sosp_hub.from_pretrained(folder) loads one"
            )
