"""Eval mode for a while; afterwards every module is in the mode that it was in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sosp_hub.errors import ModelError


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
